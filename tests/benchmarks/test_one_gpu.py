"""The benchmark for one GPU, for real at toy size on the CPU: what it records, and that a piece which fails costs itself only."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from cluster import config, config_resolve
from cluster.config_resolve import Hardware
from tests.conftest import ROOT

sys.path += [str(ROOT / "benchmarks/gpu"), str(ROOT / "benchmarks")]

import colocated_loop

SCRIPT = ROOT / "benchmarks/gpu/one_gpu.py"
PIECES = {"segmenter_numerics", "sam2_speed", "xmem_speed", "policy_numerics", "loop"}
TOY = ["--device", "cpu", "--size", "toy"]

pytestmark = pytest.mark.timeout(2700)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("one_gpu") / "record.json"
    done = subprocess.run([sys.executable, str(SCRIPT), *TOY, "--steps", "3", "--minutes", "40", "--json", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert all(piece in done.stderr for piece in PIECES) and str(out.parent) not in out.read_text()
    return found


@pytest.mark.long
def test_every_piece_has_figures(record):
    assert set(record) == PIECES
    assert not {name: piece for name, piece in record.items() if {"failed", "missing"} & set(piece)}
    for piece in record.values():
        assert piece["machine"]["gpu"] is None and (piece["device"], piece["size"], piece["policy"]) == ("cpu", "toy", "toy") and piece["seconds"] > 0


@pytest.mark.long
def test_bfloat16_gives_the_masks_of_float32(record):
    for network in ("sam2", "xmem"):
        found = record["segmenter_numerics"][f"{network} toy"]
        (answer,) = found["against cpu float32"].values()
        assert 0 < answer["mean"] <= answer["largest"] < found["deviation"], (network, found)
        assert 0.9 < answer["iou_least"] <= answer["iou_mean"] <= 1 and 0 < found["share_in_masks"] < 0.5, (network, found)


@pytest.mark.long
def test_speeds_of_both_precisions(record):
    for dtype in ("float32", "bfloat16"):
        assert record["sam2_speed"][dtype]["frames_encoded_per_second"] > 0 and record["sam2_speed"][dtype]["groups_decoded_per_second"] > 0
        assert set(record["xmem_speed"][dtype]["frames_per_second"]) == {"1 object", "3 objects", "8 hypotheses"}
        assert min(record["xmem_speed"][dtype]["frames_per_second"].values()) > 0


@pytest.mark.long
def test_engine_and_learner_agree(record):
    found = record["policy_numerics"]
    engine, against = found["engine"], found["learner float32 against engine float32"]
    assert 8 <= engine["response_tokens"] <= 8 * 96 and 50 < engine["prompt_tokens"] < 256
    assert 0 < against["mean"] < 1e-4 and against["kl"] < 1e-8 and against["factor"] == pytest.approx(1, abs=1e-4)
    assert set(engine["seconds"]) == {"start", "generate", "sleep"} == set(engine["memory_gib"])  # on a CPU no engine sleeps, so none wakes up


@pytest.mark.long
def test_the_loop_was_run(record):
    found = record["loop"]
    step = found["per_step"]
    assert found["steps"] >= 3 and len(found["seconds_of_each_step"]) == found["steps"] and found["learner"] == "whole" and "refused" not in found
    assert step["tokens/per_second"] > 0 and step["learner/tflops_per_second"] > 0 and step["mismatch/kl"] < 1e-6
    assert all(step[f"seconds/{stage}"] > 0 for stage in ("rollout", "train", "sync", "step"))
    assert {"start", "rollout"} <= set(found["memory_gib"]) and all(gib > 0.5 for gib in found["memory_gib"].values())


def run_some(out, *more, **variables):
    return subprocess.Popen([sys.executable, str(SCRIPT), *TOY, "--json", str(out), *more], cwd=ROOT, env=os.environ | variables, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_a_piece_that_fails_is_recorded_and_the_others_run(tmp_path):
    """Time that is over, a process that dies, a package that is not there; what failed is asked again."""
    out, absent = tmp_path / "record.json", tmp_path / "without/vllm"
    assert run_some(out, "--only", "sam2_speed", "--minutes", "0.01").communicate() and json.loads(out.read_text())["sam2_speed"]["failed"] == "not done within 1 s"

    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError('No module named vllm', name='vllm')")
    run = run_some(out, "--only", "xmem_speed", "sam2_speed", "policy_numerics", "--minutes", "20", PYTHONPATH=str(absent.parent))
    for line in run.stderr:
        if "--- xmem_speed" in line:
            while not (pieces := [p for p in psutil.Process(run.pid).children() if "--piece=xmem_speed" in p.cmdline()]):
                time.sleep(0.05)
            pieces[0].kill()
    assert run.wait() == 0
    found = json.loads(out.read_text())
    assert found["xmem_speed"]["failed"].startswith("ended with status -9")
    assert found["policy_numerics"]["missing"] == "vllm" and "failed" not in found["policy_numerics"]
    assert found["sam2_speed"]["float32"]["frames_encoded_per_second"] > 0 and "failed" not in found["sam2_speed"]


@pytest.mark.parametrize("policy, gib, ways", [("3B", 139.8, ["whole", "optimizer in RAM", "adapters"]), ("3B", 79.6, ["optimizer in RAM", "adapters"]), ("7B", 79.6, ["adapters"])])
def test_the_recipe_of_full_size_fits_one_gpu(policy, gib, ways):
    node, fits = Hardware(1, gib, 9.0, cores=16, ram_gib=128.0), []
    for name, ours in colocated_loop.LEARNERS.items():
        asked = [f"policy.path=Qwen/Qwen2.5-VL-{policy}-Instruct", *ours]
        fits += [] if colocated_loop.no_room(asked, colocated_loop.RECIPES["full"], node) else [name]
    assert fits == ways
    settings = config_resolve.resolve(config.load(colocated_loop.RECIPES["full"]), node)
    assert settings.rollout.weight_sync == "ipc" and settings.rollout.sleep and settings.rollout.group_size == 8
    assert settings.prompt.target_size == [840, 840] and settings.rollout.max_response_tokens == 2000
