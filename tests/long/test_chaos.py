"""A hundred faults in real runs: every kind of process killed or stopped in every phase of a step (an hour and a half; resumable; docs/chaos.json).

The phase is read off the titles that Ray gives its processes: the method that an actor is at. Faults are drawn by seed, ten to a run; each must be followed by another
step within its limit, or, where the controller is the victim, by a resumed run that makes one; and at the end of a run its ledger must hold every group once.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from cluster import checkpoints, ledger
from tests.cluster.test_faults import CORE, ENGINE, LEARNER, LIMITS, SEGMENTER, Command
from tests.cluster.test_loop import settings
from tests.conftest import ROOT

RECORD = ROOT / "docs/chaos.json"
SEED, FAULTS, A_RUN = 0, 100, 10
CONTROLLER = "cluster.cli"
VICTIMS = {"engine": ENGINE, "vLLM's process": CORE, "segmenter": SEGMENTER, "learner": LEARNER, "controller": CONTROLLER}
PHASES = {
    "generation": f"{ENGINE}.generate",
    "scoring": f"{SEGMENTER}.segment_group",
    "gradients": f"{LEARNER}.accumulate",
    "update": f"{LEARNER}.train_step",
    "sync": f"{LEARNER}.weight_buckets",
    "checkpoint": f"{LEARNER}.save",
    "any moment": "",
}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
MODES = {"synchronous": ["loop.max_staleness=0"], "on arrival": ["loop.learn_on_arrival=true"], "one step off": ["loop.max_staleness=1"], "asynchronous": ["loop.max_staleness=2", "loop.wait_for=0.75", "loop.late_groups=next_step"]}
LIMIT = 300.0
"""Seconds from a fault to the next step: the longest time limit that can pass before it is noticed (a minute and a half), and two starts of all parts."""


def faults() -> list[dict]:
    """All combinations but a stopped controller (nothing is left to notice it), in random order, repeated until there are enough."""
    every = [c for c in itertools.product(VICTIMS, PHASES, SIGNALS) if c[0] != "controller" or c[2] == "SIGKILL"]
    rng = random.Random(SEED)
    drawn = [c for _ in range(-(-FAULTS // len(every))) for c in rng.sample(every, len(every))][:FAULTS]
    return [{"number": n, "victim": v, "phase": p, "signal": s} for n, (v, p, s) in enumerate(drawn)]


def wait_for_phase(run: Command, title: str) -> bool:
    """Until a process bears this title; False where none did for a minute, which is so for short phases. They come again with the next step."""
    actors = [part for part in run.parts("ray::") if part.is_running()]
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for part in actors:
            try:
                if title in Path(f"/proc/{part.pid}/cmdline").read_text():
                    return True
            except OSError:
                pass
        time.sleep(0.002)
    return False


def inject(run: Command, fault: dict, resume: list[str]) -> tuple[Command, dict]:
    """The run that goes on, and the fault with what was seen of it."""
    phase = "update" if fault["phase"] == "gradients" and fault["mode"] != "on arrival" else fault["phase"]  # that is where they are computed then
    met = wait_for_phase(run, PHASES[phase]) if PHASES[phase] else time.sleep(random.Random(fault["number"]).uniform(0, 2)) is None
    run.catch_up()
    if fault["victim"] == "controller":
        run.process.kill()
        run.process.wait()
        for part in run.parts(""):  # a local cluster ends with its driver, not at once
            part.kill()
        began = time.monotonic()
        run = Command(resume[0], *resume[1:])
    else:
        (victim, *_) = run.parts(VICTIMS[fault["victim"]])
        began = time.monotonic()
        try:
            victim.send_signal(SIGNALS[fault["signal"]])
        except psutil.NoSuchProcess:
            met = False
    said = len(run.output)
    run.steps(2)  # the first may have been under way
    seconds = time.monotonic() - began
    warnings = [line.strip() for line in run.output[said:] if line.startswith("warning")]
    assert seconds < LIMIT, (fault, seconds)
    return run, fault | {"met_its_phase": met, "seconds_until_two_more_steps": round(seconds, 1), "warnings": warnings}


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_no_fault_loses_a_group(toy_data, tmp_path_factory):
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"command": "pytest -m long tests/long/test_chaos.py", "seed": SEED, "faults": [], "runs": []}
    drawn = faults()
    while len(record["faults"]) < FAULTS:
        number, mode = len(record["runs"]), list(MODES)[len(record["runs"]) % len(MODES)]
        folder = tmp_path_factory.mktemp("chaos")
        asked = ["loop.steps=5000", "eval.ends=false", "loop.save_every=2", f"run.dir={folder}", "run.name=run", "cluster.address=local", "loop.max_restarts=100", *MODES[mode], *LIMITS]
        run = Command(folder, "train", *settings(toy_data, *asked))
        try:
            run.steps(2)
            seen = []
            for fault in drawn[len(record["faults"]) :][:A_RUN]:
                run, what = inject(run, fault | {"mode": mode}, [folder, "resume", str(folder / "run")])
                seen.append(what)
                print(json.dumps(what), flush=True)
            run.signal(signal.SIGINT)
            status, output = run.end(180)
            assert status == 0, output
            run.assert_all_gone()
            path = folder / "run"
            checkpoint, _ = checkpoints.latest(path / "checkpoints")
            ends = ledger.check(path / ledger.FILE, checkpoint.manifest["position"], checkpoint.manifest["unfinished"])
        finally:
            for part in run.parts(""):
                part.kill()
        rolled_back = sum(bool(line.get("rolled_back")) for line in ledger.read(path / ledger.FILE))
        record["faults"] += seen
        record["runs"].append({"number": number, "mode": mode, "faults": len(seen), "steps": checkpoint.step, "groups": dict(ends), "rolled_back": rolled_back})
        partial = RECORD.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, RECORD)
        shutil.rmtree(folder)
    assert {f["number"] for f in record["faults"]} == set(range(FAULTS))
