"""The worker under DeepSpeed: ZeRO 0, 1, 2, 3, one and two ranks against a plain optimiser step; resume, export, rest.

The learners run in processes of their own (learner_ranks.py), so that no process group is left in the test session.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from tiny_learner import BANNED, plain_logprobs, random_samples, save_policy

from learner.checkpoint import CheckpointError, _trained_weights, export_checkpoint
from learner.config import LearnerConfig, check_config
from learner.engine import interface_to
from learner.policy import block_of

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learner")
    save_policy(folder / "policy")
    save_policy(folder / "tied", tie=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1] % 60000 + 2000
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "learner_ranks.py"), str(folder), str(port)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return {name: json.loads((folder / f"run_{name}.json").read_text()) for name in ("1_0", "2_0", "2_1")}


@pytest.fixture(scope="module")
def expected(folder):
    """One step of the plain computation in float32: (loss, gradient norm, log-probs, name -> (old weight, gradient))."""
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(folder / "policy", dtype=torch.float32)
    samples = random_samples(groups=3, completions=3, seed=0)
    tokens = sum(len(s.response_ids) for s in samples)
    logprobs, total = [], 0.0
    for s in samples:
        lp = plain_logprobs(model, s, 0.7, BANNED)
        tis = torch.exp(lp.detach() - torch.from_numpy(s.rollout_logprobs)).clamp(max=2.0)
        total = total - (s.advantage * tis * torch.exp(lp - lp.detach())).sum() / tokens  # KL and its gradient are 0 at the reference
        logprobs.append(lp.detach())
    total.backward()
    norm = float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    from learner.weights import checkpoint_names

    names = checkpoint_names(model)
    gradients = {names[name]: p.grad for name, p in model.named_parameters()}
    start = load_file(folder / "policy" / "model.safetensors")
    assert set(start) == set(gradients), "names must be those of the checkpoint"
    return float(total.detach()), norm, logprobs, {name: (start[name], gradients[name]) for name in start}


@pytest.mark.parametrize("name", ["zero0_1", "zero2_1", "zero3_1", "whole_1", "zero0_2", "zero2_2", "zero3_2", "offload_1", "offload_2"])
def test_a_step_equals_the_plain_one(folder, expected, name):
    found = torch.load(folder / f"{name}.pt", weights_only=False)
    loss, norm, logprobs, tensors = expected
    assert found["metrics"]["loss"] == pytest.approx(loss, abs=1e-6)
    assert found["metrics"]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    squares: dict[str, float] = defaultdict(float)
    for key, (_, gradient) in tensors.items():
        squares[block_of("." + key)] += float(gradient.square().sum())
    found_norms = {key.removeprefix("grad_norm/"): value for key, value in found["metrics"].items() if key.startswith("grad_norm/")}
    assert set(found_norms) == {"vision", "projector", "embed_tokens", "layers.0", "layers.1", "norm", "lm_head"}
    assert found_norms == pytest.approx({block: square**0.5 for block, square in squares.items()}, rel=1e-4)
    for a, b in zip(found["before"], logprobs, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-5, atol=1e-5)
    for key, (old, gradient) in tensors.items():
        step = 30.0 * gradient / (gradient.abs() + 1.0)  # AdamW's first step with beta1 = 0 and epsilon 1
        error = (old - step - found["weights"][key]).norm()
        assert error < 1e-5 * step.norm() + 3e-7 * old.norm(), key


def test_ranks_agree(results):
    assert results["2_0"] == results["2_1"]


@pytest.mark.parametrize("rank, way", [("1_0", "zero0"), ("1_0", "zero2"), ("1_0", "offload"), ("2_0", "bfloat16"), ("2_0", "zero3"), ("2_0", "sequence")])
def test_a_step_in_pieces_is_the_step_at_once(results, rank, way):
    """Whatever the denominators were while pieces came: losses, clipped gradients, and the weights that two steps end with."""
    found, rough = results[rank][f"in pieces, {way}"], way == "bfloat16"
    assert found["expected"][1]["kl"] > 0, "the first step moved the weights"
    assert found["expected"][0]["grad_norm"] > 0.05, "gradients are clipped"
    for expected, pieces in zip(found["expected"], found["found"], strict=True):
        assert pieces == pytest.approx(expected, rel=0.03 if rough else 2e-4, abs=2e-3 if rough else 1e-6)
    assert found["error"] < (0.02 if rough else 2e-5)


@pytest.mark.parametrize("rank,stage", [("1_0", 0), ("1_0", 2), ("2_0", 2), ("2_0", 3)])
def test_resume_is_bit_equal(results, rank, stage):
    resumed = results[rank][f"resume{stage}"]
    assert resumed["metrics equal"] and resumed["weights equal"] and resumed["moved"]
    assert resumed["lrs"] == pytest.approx([3e-3, 3e-3, 1.5e-3])
    assert resumed["grad_norms"] == pytest.approx(results["1_0"]["resume2"]["grad_norms"], rel=1e-4)
    assert "zero_stage = 2, this run has 0" in results["1_0"]["other stage"]


@pytest.mark.parametrize("rank,stage", [("1_0", 2), ("2_0", 3)])
def test_bfloat16(folder, results, rank, stage):
    """Steps are those of float32 but for the rounding, resume is bit-equal, and weights are kept in float32 between steps, where small steps add up."""
    found, exact = results[rank][f"resume{stage}_bfloat16"], results[rank][f"resume{stage}"]
    assert found["metrics equal"] and found["weights equal"] and found["moved"]
    assert found["losses"] == pytest.approx(exact["losses"], abs=0.02) and found["losses"] != exact["losses"]
    assert found["grad_norms"] == pytest.approx(exact["grad_norms"], rel=0.05)
    trained = _trained_weights(folder / f"checkpoint{stage}_bfloat16_{rank[0]}", stage)
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    assert any((weight != weight.bfloat16().float()).any() for weight in trained.values())


@pytest.mark.parametrize("before, now, stage", [(1, 2, 0), (1, 2, 2), (2, 1, 2), (2, 1, 3)])
def test_another_number_of_ranks_goes_on(folder, results, before, now, stage):
    """Weights, AdamW's moments and counters: the next step is the one that the ranks before would have made."""
    there = results[f"{before}_0"][f"resume{stage}"]
    here = json.loads((folder / f"elsewhere_{now}_0.json").read_text())[f"elsewhere{stage}"]
    assert here["steps"] == 3 and here["lr"] == there["lrs"][-1]
    assert here["loss"] == pytest.approx(there["losses"][-1], abs=1e-5) and here["grad_norm"] == pytest.approx(there["grad_norms"][-1], rel=1e-4)
    if stage == 3:
        adapters = json.loads((folder / "elsewhere_1_0.json").read_text())["adapters elsewhere"]
        assert adapters == pytest.approx(results["2_0"]["adapters"]["losses"][-1], abs=1e-5)
    assert sorted(path.name for path in folder.glob(f"checkpoint{stage}_{before}*") if path.is_dir()) == [f"checkpoint{stage}_{before}", f"checkpoint{stage}_{before}_export"]


@pytest.mark.parametrize("rank,stage", [("1_0", 0), ("1_0", 2), ("2_0", 3)])
def test_bad_updates_leave_no_trace(results, rank, stage):
    """Not in the weights and not in AdamW's moments: the next good step is the one that would have come anyway."""
    found = results[rank][f"left out {stage}"]
    assert found["in a row"] == [0, 1, 2, 3, 0] and found["equal"]
    assert found["norms"][1] == math.inf and min(found["norms"][2:4]) > 100
    assert found["of two updates"] == 1, "the bad group's; the other is as good as ever"
    assert not math.isfinite(found["losses"][0]) and math.isfinite(found["losses"][1])


@pytest.mark.parametrize("written", ["checkpoint0_1", "checkpoint2_1", "checkpoint2_2", "checkpoint3_2", "adapters0_1", "adapters3_2"])
def test_a_checkpoint_is_exported_without_its_ranks(folder, written, tmp_path):
    """In this process, and the same to the last bit as what the learners themselves write."""
    from safetensors.torch import load_file

    config = LearnerConfig(lora_rank=4, lora_alpha=8.0) if "adapters" in written else LearnerConfig()
    export_checkpoint(folder / written, config, str(folder / "policy"), tmp_path / "out")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / f"{written}_export"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(CheckpointError, match="such as|is no learner checkpoint"):
        other = replace(config, lora_rank=8) if config.lora_rank else replace(config, lora_rank=2)
        export_checkpoint(folder / written, other, str(folder / "policy"), tmp_path / "other")


def test_nothing_moves_at_learning_rate_zero(results):
    assert results["1_0"]["at rest"] == {"weights": True, "logprobs": True, "kl": [0.0] * 20}


def test_all_but_the_defaults_on_one_and_two_ranks(results):
    one, two = (results[name]["all but the defaults"] for name in ("1_0", "2_0"))
    assert one["numbers"] == pytest.approx(two["numbers"], rel=1e-4, abs=1e-6) and one["kl"] == pytest.approx(two["kl"], rel=1e-3)
    assert one["kl error"] < 1e-5 and abs(one["kl"]) > 1e-3, "k1 is how far log-probs have moved from the reference, where training began"
    assert one["masked"] == 3 and not one["kl in the loss"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_reference_is_renewed(folder, results, ranks):
    """After the second and the fourth step it is the policy: the KL of the third and fifth is 0 before they change it."""
    found = results[f"{ranks}_0"]["renewed"]
    first, second, third, fourth, fifth = found["kls"]
    assert first == third == fifth == 0.0 and second > 1e-6 and fourth > 1e-6
    assert found["kls"] == pytest.approx(results["1_0"]["renewed"]["kls"], rel=1e-3) and found["norms"] == pytest.approx(results["1_0"]["renewed"]["norms"], rel=1e-4)
    assert found["resumed"], "a checkpoint holds the reference too"
    if ranks == 2:
        assert json.loads((folder / "elsewhere_1_0.json").read_text())["renewed elsewhere"] == pytest.approx(fourth, rel=1e-3)


def test_a_reference_that_cannot_be_renewed_is_refused():
    for settings, reason in (({"kl_coef": 0.0}, "loads none"), ({"lora_rank": 4}, "with adapters")):
        with pytest.raises(ValueError, match=f"reference_every = 5.*{reason}.*use 0"):
            check_config(LearnerConfig(reference_every=5, **settings))


ADAPTED = [f"{block}.weight" for block in sorted(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))]


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_learn_and_are_merged_into_what_they_adapt(results, ranks):
    """One rank without ZeRO, two ranks with stage 3."""
    found = results[f"{ranks}_0"]["adapters"]
    assert found["kls"][0] == 0.0 and found["kls"][1] > 0.0, "the reference is the policy without its adapters"
    assert found["changed"] == ADAPTED and found["ranks"] == [4] and found["merged error"] < 1e-5
    assert found["resumed"] and found["losses"] == pytest.approx(results["1_0"]["adapters"]["losses"], rel=1e-4)


@pytest.mark.parametrize("stage, vision, projector", [(2, 0.0, 0.0), (0, 4e-3, 5e-4), (3, 4e-3, None)])
def test_each_part_learns_at_its_rate(results, stage, vision, projector):
    longest = results["1_0"][f"rates, ZeRO {stage}, {vision}, {projector}"]
    assert longest == pytest.approx({"language": 1e-3, "vision": vision, "projector": 1e-3 if projector is None else projector}, rel=0.01)


def test_several_updates_use_the_first_logprobs(results):
    several = results["1_0"]["several updates"]
    assert several["updates"] == 4 and several["ratio"] != 1.0 and several["clip_low_fraction"] + several["clip_high_fraction"] > 0
    assert several["mismatch_abs"] == pytest.approx(several["first mismatch"], rel=1e-6)


def test_a_rank_without_samples_takes_part(results):
    assert results["2_0"]["one sample 2"] == pytest.approx(results["2_0"]["one sample 3"], rel=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_export_gives_the_same_logits(folder, world_size):
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    export = folder / f"export_{world_size}"
    trained = torch.load(folder / f"zero3_{world_size}.pt", weights_only=False)["weights"]
    written = load_file(export / "model.safetensors")
    assert written.keys() == trained.keys() and all(torch.equal(written[name], trained[name]) for name in written)
    assert {p.name for p in export.iterdir()} == {p.name for p in (folder / "policy").iterdir()}
    AutoImageProcessor.from_pretrained(export)

    sample = random_samples(groups=1, completions=1)[0]
    exported, loading = AutoModelForImageTextToText.from_pretrained(export, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    start = AutoModelForImageTextToText.from_pretrained(folder / "policy")
    from learner.weights import checkpoint_names

    names = checkpoint_names(start)
    with torch.no_grad():
        for name, parameter in start.named_parameters():
            parameter.copy_(trained[names[name]])
        assert torch.equal(plain_logprobs(exported, sample, 1.0), plain_logprobs(start, sample, 1.0))


def test_ranks_listen_where_the_others_look_for_them():
    """Not on the loopback's interface, but where the address of rank 0 is reached (a host's own name may stand for 127.0.0.1)."""
    own = [(name, a.address) for name, addresses in psutil.net_if_addrs().items() for a in addresses if a.family == socket.AF_INET]
    assert ("lo", "127.0.0.1") in own
    assert [interface_to(address) for _, address in own] == [name for name, _ in own]
    assert interface_to("localhost") == "lo"


def test_tied_head_is_left_out(folder):
    weights = torch.load(folder / "tied_1.pt", weights_only=False)["weights"]
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights
