"""A run that is killed five times at random moments and resumed repeats the undisturbed run to the last bit (eight minutes on two cores; docs/killed-and-resumed.json)."""

import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from cluster import checkpoints, cli, ledger, rollout_log
from cluster.metrics import read_metrics
from tests.cluster.test_faults import Command
from tests.cluster.test_loop import settings
from tests.conftest import ROOT

STEPS, KILLS, SEED = 12, 5, 0


@pytest.mark.long
def test_a_run_killed_five_times_repeats_the_undisturbed_one(toy_data, tmp_path):
    asked = [f"loop.steps={STEPS}", "loop.deterministic=true", "loop.save_every=1", "eval.ends=false", "cluster.address=local", "difficulty.source=online", f"run.dir={tmp_path}"]
    whole = Command(tmp_path, "train", *settings(toy_data, *asked, "run.name=whole"))
    assert whole.end(900)[0] == 0
    seconds = [r["seconds/step"] for r in read_metrics(tmp_path / "whole/metrics.jsonl")]

    chance, kills, path = random.Random(SEED), [], tmp_path / "killed"
    command = ("train", *settings(toy_data, *asked, "run.name=killed"))
    while len(kills) < KILLS:
        run = Command(tmp_path, *command)
        run.steps(1)
        wait = chance.uniform(0.0, 2.0 * sum(seconds) / len(seconds))
        time.sleep(wait)
        for part in run.parts(""):  # everything at once, as when a machine is switched off
            part.kill()
        run.process.wait()
        kills.append({"after_seconds": round(wait, 3), "steps_seen": read_metrics(path / "metrics.jsonl")[-1]["step"], "checkpoint": checkpoints.latest(path / "checkpoints")[0].step})
        command = ("resume", str(path))
    assert Command(tmp_path, *command).end(900)[0] == 0

    found = {name: what_happened(tmp_path / name) for name in ("whole", "killed")}
    assert found["whole"]["steps"] == found["killed"]["steps"]
    assert found["whole"]["weights"] == found["killed"]["weights"]
    final = checkpoints.latest(path / "checkpoints")[0].manifest
    assert ledger.check(path / ledger.FILE, final["position"], final["unfinished"]) == {"trained": 4 * STEPS}
    record = {"command": "pytest -m long tests/long/test_killed_and_resumed.py", "seed": SEED, "kills": kills, "equal": sorted(found["whole"]["steps"][0]), **found["whole"]}
    partial = ROOT / "docs/killed-and-resumed.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, partial.with_suffix(".json"))


def what_happened(folder: Path) -> dict:
    """Of every step what must repeat, and the SHA-256 of the final weights."""
    assert cli.main(["export", str(folder), str(folder / "exported")]) == 0
    weights = hashlib.sha256((folder / "exported/model.safetensors").read_bytes()).hexdigest()
    shutil.rmtree(folder / "exported")
    rows = {step: rollout_log.read_rollouts(file) for step, file in rollout_log.rollout_files(folder / "rollouts")}
    steps = []
    for record in (r for r in read_metrics(folder / "metrics.jsonl") if "reward/mean" in r):
        mine = rows[record["step"]]
        tokens = hashlib.sha256(json.dumps([[row.group, list(map(int, row.response_token_ids)), row.seed] for row in mine]).encode()).hexdigest()
        rewards = hashlib.sha256(json.dumps([row.reward for row in mine]).encode()).hexdigest()
        steps.append({"step": record["step"], "tokens": tokens, "rewards": rewards} | {name: record[name] for name in ("reward/mean", "learner/loss", "learner/grad_norm", "kl/reference")})
    return {"steps": steps, "weights": weights}
