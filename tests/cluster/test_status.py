"""`videoseg status`: what a run's folder tells, and that it does not claim more."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cluster import checkpoints, cli, config, run_folder, status
from cluster.metrics import MetricsWriter
from tests.cluster.test_cli import HEAVY
from tests.conftest import ROOT

NOW = 2_000_000_000.0


@pytest.fixture
def run(tmp_path):
    """A folder as a run of 20 steps leaves it after its start."""
    folder = run_folder.plan(tmp_path, "one", "debug")
    folder.create(config.load("debug", ["loop.steps=20", "loop.mismatch_warn=0.01"]), {"cores": 2}, ["videoseg", "train"])
    return folder


def write(folder, steps, **values):
    with MetricsWriter(folder.path) as metrics:
        for step in steps:
            metrics.write(step, {"reward/mean": 5.0 + step, "seconds/step": 30.0, "mismatch/kl": 0.0, "failures/scoring": 0.0, **values})


def save(folder, step, text="weights"):
    with checkpoints.writing(folder.checkpoints, step, {"position": step}) as temporary:
        (temporary / "learner").write_text(text)


def at(folder, seconds):
    """What is seen `seconds` after everything was written."""
    for path in [folder.path, *folder.path.rglob("*")]:
        os.utime(path, (NOW, NOW))
    return status.look(folder, NOW + seconds)


def test_a_run_that_writes_seems_alive_and_one_that_does_not_is_called_silent(run):
    assert at(run, 100)["state"] == "alive"  # before its first step it may take cluster.start_seconds
    write(run, range(1, 9))
    save(run, 4)
    found = at(run, 60)
    assert (found["state"], found["step"], found["steps"], found["checkpoint"]["step"]) == ("alive", 8, 20, 4)
    assert found["seconds_left"] == 12 * 30 and found["metrics"]["reward/mean"] == 13 and found["warnings"] == []
    text = "\n".join(status.lines(found))
    assert "step 8 of 20; seems alive: written 0:01:00 ago, a step takes 30 s, about 0:06:00 left" in text and "reward 13" in text
    assert "newest whole checkpoint: step 4" in text and "videoseg resume" not in text

    found = at(run, 121)
    text = "\n".join(status.lines(found))
    assert found["state"] == "silent" and found["seconds_left"] is None
    assert "nothing written for 0:02:01" in text and "cannot tell which" in text and f"videoseg resume {run.path}" in text and "as after a stop" not in text
    save(run, 8)
    assert "as after a stop" in "\n".join(status.lines(at(run, 3600)))


def test_a_checkpoint_being_written_is_a_sign_of_life(run):
    write(run, range(1, 9))
    at(run, 0)
    temporary = checkpoints.begin(run.checkpoints, 8) / "learner"
    temporary.write_text("half")
    for path in (temporary.parent, run.checkpoints):
        os.utime(path, (NOW, NOW))
    os.utime(temporary, (NOW + 1000, NOW + 1000))
    found = status.look(run, NOW + 1010)
    assert found["state"] == "alive" and found["seconds_since_written"] == 10 and found["checkpoint"] is None


def test_finished_is_the_last_step_with_its_checkpoint_and_evaluation(run):
    write(run, range(1, 21))
    assert at(run, 1)["state"] == "alive"
    save(run, 20)
    assert at(run, 1)["state"] == "alive"  # eval.ends: its last evaluation is still to come
    with MetricsWriter(run.path) as metrics:
        metrics.write(20, {"eval/iou/box": 0.5, "eval/reward/mean": 6.0})
    found = at(run, 10**6)
    assert found["state"] == "finished" and "held-out, after step 20: reward 6  box IoU 0.5" in "\n".join(status.lines(found))


def test_what_looks_wrong_is_said(run, monkeypatch):
    write(run, [1], **{"failures/scoring": 99.0, "mismatch/kl": 9.0})  # longer ago than what is looked at
    write(run, range(2, 12))
    write(run, [12], **{"failures/scoring": 3.0, "mismatch/kl": 0.5, "failures/video": 2.0, "failures/video/slow": 2.0, "learner/loss": float("nan"), "learner/skipped_in_a_row": 1.0})
    save(run, 4)
    save(run, 8)
    (run.checkpoints / "step_000008" / "learner").write_text("w")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    found = at(run, 1)
    assert found["checkpoint"]["step"] == 4
    said = found["warnings"]
    assert [w.split(" in ")[0] for w in said[:3]] == ["failures/scoring 3", "failures/video 2", "nonfinite_values 1"]
    assert "mismatch/kl reached 0.5" in said[3] and "updates were left out" in said[4]
    assert "learner has 1 bytes instead of 7" in said[5] and "are free, less than two checkpoints" in said[6] and len(said) == 7


def test_a_long_run_is_read_from_its_end_and_a_line_being_written_is_left_out(run, monkeypatch):
    write(run, range(1, 51))
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write('{"step": 51, "seconds/st')
    monkeypatch.setattr(status, "TAIL_BYTES", 600)
    found = at(run, 1)
    assert found["step"] == 50 and found["seconds_per_step"] == 30


def test_the_command_answers_without_anything_heavy(run):
    write(run, range(1, 4))
    code = f"import sys; from cluster import cli; status = cli.main(sys.argv[1:])\nprint([m for m in {HEAVY} if m in sys.modules], status, file=sys.stderr)"
    ask = [sys.executable, "-c", code, "status", str(run.path)]
    asked = subprocess.run([*ask, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert asked.stderr.strip() == "[] 0" and json.loads(asked.stdout)["step"] == 3
    asked = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True)
    assert asked.stdout.startswith(f"{run.path}: step 3 of 20; ")


def test_no_run_and_a_broken_configuration_are_errors(run, tmp_path, capsys):
    assert cli.main(["status", str(tmp_path / "none")]) == 2 and "is not a run folder" in capsys.readouterr().err
    run.config.write_text("loop: 3\n")
    assert cli.main(["status", str(run.path)]) == 2 and "config.yaml cannot be read" in capsys.readouterr().err
