"""`videoseg plan`: sizes of policies, where parts sit, what they take, and what does not fit."""

import pytest
import torch

from cluster import cli, config, config_resolve
from cluster.errors import MissingFileError
from cluster.plan import GIB, learner_memory, plan, trained
from cluster.policy_size import PolicySize
from learner.config import LearnerConfig
from learner.lora import add_adapters
from learner.policy import load_model
from tests.conftest import TOY

GPU = dict(cuda_capability=9.0, cores=64, ram_gib=512.0)


def planned(recipe, *overrides, gpus=8, gib=80.0, nodes=1, **node):
    hardware = config_resolve.Hardware(**GPU | dict(cuda_devices=gpus, cuda_memory_gib=gib) | node)
    settings = config_resolve.resolve(config.load(recipe, overrides), hardware)
    return settings, plan(settings, hardware, nodes)


@pytest.mark.parametrize(
    "path, billions",
    [("Qwen/Qwen2.5-VL-3B-Instruct", 3.754622976), ("Qwen/Qwen2.5-VL-7B-Instruct", 8.292166656), ("Qwen/Qwen2.5-VL-32B-Instruct", 33.452718336), ("Qwen/Qwen3-VL-8B-Instruct", 8.767123696)],
)
def test_published_policies_have_the_parameters_of_their_checkpoints(path, billions):
    assert PolicySize.of(path).parameters == round(billions * 1e9)  # as the index of each repository's safetensors counts them


def test_a_folder_is_measured_and_an_unknown_name_refused():
    model = load_model(str(TOY / "policy"), torch.float32)
    size = PolicySize.of(str(TOY / "policy"))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.vision == sum(p.numel() for name, p in model.named_parameters() if "visual." in name)
    with pytest.raises(MissingFileError, match="nobody/nothing"):
        PolicySize.of("nobody/nothing")


def test_adapters_are_counted_as_they_are_made():
    model = load_model(str(TOY / "policy"), torch.float32)
    learn = LearnerConfig(lora_rank=8)
    add_adapters(model, learn)
    settings = config.load("debug", ["learner.lora_rank=8", "learner.vision_lr=null", "learner.projector_lr=null"])
    assert trained(settings, PolicySize.of(str(TOY / "policy"))) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "recipe, machine",
    [
        ("videoseg_r1_7b", {}),
        ("videoseg_r1_3b", {}),
        ("videoseg_r1_qwen3_vl_8b", {}),
        ("videoseg_r1_3b_lora_24gb", dict(gpus=1, gib=24.0, cores=8, ram_gib=64.0)),
        ("videoseg_r1_3b_lora_48gb", dict(gpus=1, gib=48.0, cores=8, ram_gib=64.0)),
        ("videoseg_r1_3b_lora_80gb", dict(gpus=1, gib=80.0, cores=8, ram_gib=64.0)),
        ("videoseg_r1_7b_two_nodes", dict(nodes=2)),
        ("videoseg_r1_32b_four_nodes", dict(nodes=4)),
        ("debug", dict(gpus=0, cores=2, ram_gib=24.0)),
    ],
)
def test_every_recipe_fits_the_machine_it_is_for(recipe, machine):
    _, found = planned(recipe, **machine)
    assert not found.problems and len(list(found.lines())) > 4


def test_disaggregated_parts_sit_apart():
    _, found = planned("videoseg_r1_7b_two_nodes", nodes=2)
    on = {role: {(p.node, p.gpu) for p in found.parts if p.role == role} for role in ("engine", "segmenter", "learner")}
    assert len(on["engine"]) == 7 and len(on["segmenter"]) == 1 and len(on["learner"]) == 8
    assert not on["engine"] & on["learner"] and not on["segmenter"] & (on["engine"] | on["learner"])


def test_what_does_not_fit_is_said_with_the_largest_part():
    _, found = planned("videoseg_r1_3b", "rollout.engines=1", "learner.ranks=1", gpus=1, gib=24.0)
    (problem,) = found.problems
    assert "GPU 0" in problem and "learner 0's optimizer, 42.0 GiB" in problem
    _, found = planned("videoseg_r1_7b_two_nodes", nodes=1)
    assert any("no node has" in problem for problem in found.problems)
    _, found = planned("videoseg_r1_7b", ram_gib=32.0)
    assert any("of RAM, it has 32 GiB" in problem for problem in found.problems)
    awake, asleep = (planned("videoseg_r1_7b", "learner.ranks=4", "rollout.engines=4", f"rollout.sleep={sleep}", gpus=4, gib=80.0)[1].problems for sleep in ("false", "true"))
    assert awake and "rollout.sleep=true" in awake[0] and not asleep


def test_zero_shards_what_its_stage_says():
    whole = {stage: learner_memory(*sized("videoseg_r1_7b", f"learner.zero_stage={stage}")) for stage in (1, 2, 3)}
    assert whole[1]["optimizer"] == whole[3]["optimizer"] == pytest.approx(12 * 8_292_166_656 / 8)
    assert whole[1]["gradients"] == 8 * whole[2]["gradients"] and whole[2]["weights"] == 8 * whole[3]["weights"]
    off = learner_memory(*sized("videoseg_r1_7b", "learner.offload=optimizer"))
    assert "optimizer" not in off and off["gradients"] == whole[3]["gradients"]


def sized(recipe, *overrides):
    settings, _ = planned(recipe, *overrides)
    return settings, PolicySize.of(settings.policy.path), config_resolve.Hardware(cuda_devices=8, cuda_memory_gib=80.0, **GPU)


def test_the_command_prints_a_table_and_fails_where_something_does_not_fit(capsys):
    assert cli.main(["plan", "videoseg_r1_7b", "--gpus", "8", "--cores", "64", "--memory", "512"]) == 0
    printed = capsys.readouterr().out
    assert "engine 0 to 7" in printed and "GPU 0 to 7" in printed and "learner 0 to 7" in printed
    assert "KV cache holds" in printed and "8.29 billion parameters" in printed
    assert cli.main(["plan", "videoseg_r1_7b", "--gpus", "2", "--gpu-memory", "24"]) == 2
    streams = capsys.readouterr()
    assert "DOES NOT FIT" in streams.out and "does not fit there" in streams.err


def test_memory_is_what_a_step_takes():
    """Weights, gradients and moments of a real learner's parameters, in bytes."""
    settings, size, node = sized("debug", "learner.dtype=float32", "policy.dtype=float32", "learner.ranks=1", "rollout.engines=1", "learner.vision_lr=null", "learner.projector_lr=null")
    model = load_model(str(TOY / "policy"), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    sum((p**2).sum() for p in model.parameters()).backward()
    optimizer.step()
    held = {"weights": sum(p.nbytes for p in model.parameters()), "gradients": sum(p.grad.nbytes for p in model.parameters())}
    held["optimizer"] = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    memory = learner_memory(settings, size, node)
    assert {name: memory[name] for name in held} == held and GIB == 2**30
