"""Faults and signals: runs whose parts are killed, and which are then interrupted.

Groups of the next step are on their way while the learner works (`loop.max_staleness=1`), so faults meet generation, scoring and updates alike.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from cluster import checkpoints, ledger, rollout_log
from cluster.metrics import read_metrics
from tests.cluster.test_loop import settings
from tests.conftest import ROOT

LIMITS = ["loop.score_seconds=10", "loop.group_seconds=30", "rollout.sync_timeout_seconds=25", "loop.learn_seconds=30"]


class Command:
    """A `videoseg` command in a session of its own; `parts` finds the processes that it started on the way."""

    def __init__(self, mark, *arguments):
        self.mark = f"VIDEOSEG_TEST_MARK={mark}"
        environment = os.environ | {"VIDEOSEG_TEST_MARK": str(mark)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.output, self.said = [], queue.Queue()  # lines that were looked at; those still to come, at the end None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            self.said.put(line)
        self.said.put(None)

    def wait_for(self, *words):
        """Waits for a line with all of these words, among those that no one has waited for."""
        for line in iter(self.said.get, None):
            self.output.append(line)
            if all(word in line for word in words):
                return line
        pytest.fail(f"no line says {words}:\n" + "".join(self.output))

    def steps(self, count):
        """Waits until so many more steps are done, counted from the last line that was waited for."""
        for _ in range(count):
            self.wait_for("step ", " left")

    def catch_up(self):
        """What is waited for after this has not been said yet."""
        while not self.said.empty():
            if (line := self.said.get()) is None:
                return self.said.put(None)
            self.output.append(line)

    def parts(self, *kinds):
        """Processes of one of these kinds ("" for all) that have inherited the mark."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            try:
                with open(f"/proc/{process.pid}/environ", "rb") as file:
                    marked = self.mark.encode() in file.read().split(b"\0")
                if marked and any(kind in " ".join(process.info["cmdline"]) for kind in kinds):
                    found.append(process)
            except (OSError, psutil.Error):
                pass
        return found

    def fault(self, kind, how):
        (part,) = self.parts(kind)
        part.send_signal(how)

    def signal(self, how):
        os.killpg(self.process.pid, how)

    def end(self, seconds=120):
        self.process.wait(timeout=seconds)
        self.output += iter(self.said.get, None)
        return self.process.returncode, "".join(self.output)

    def assert_all_gone(self):
        deadline = time.monotonic() + 30
        while (left := self.parts("")) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left


ENGINE, CORE, SEGMENTER, LEARNER = "ray::RolloutEngine", "VLLM::EngineCore", "ray::SegmenterActor", "ray::LearnerActor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def started(toy_data, folder):
    """Starts commands, and ends what is left of them."""
    commands = []

    def start(*arguments):
        commands.append(Command(folder, *arguments))
        return commands[-1]

    yield start
    for command in commands:
        for part in command.parts(""):
            part.kill()


def test_lost_parts_start_again_and_no_group_is_lost(started, toy_data, folder):
    """vLLM's process and a segmenter, then the learner, killed; then Ctrl-C: a checkpoint, nothing left running, and every group exactly once in what survives. The KL
    is part of the reward, for which learners are asked twice a step."""
    asked = ["loop.steps=500", "eval.ends=false", f"run.dir={folder}", "run.name=run", "cluster.address=local", "loop.max_staleness=1", "learner.kl_in=reward", *LIMITS]
    asked += ["loop.score_seconds=30"]  # what is killed is noticed at once; on a machine at work for other tests one may be silent for ten seconds
    run = started("train", *settings(toy_data, *asked))
    run.steps(2)
    run.fault(CORE, signal.SIGKILL)
    run.fault(SEGMENTER, signal.SIGKILL)
    run.wait_for("engine 0 is lost", "EngineBroken")
    run.steps(2)
    run.fault(LEARNER, signal.SIGKILL)
    again = run.wait_for("learner rank 0 is lost", "starting again from step")
    run.steps(2)
    run.signal(signal.SIGINT)
    status, output = run.end()
    assert status == 0 and "SIGINT: stopping with a checkpoint" in output and "stopped: SIGINT" in output
    assert output.count("segmenter 0 is lost") == output.count("engine 0 is lost") == 1
    run.assert_all_gone()

    path = folder / "run"
    checkpoint, rejected = checkpoints.latest(path / "checkpoints")
    assert not rejected and read_metrics(path / "metrics.jsonl")[-1]["step"] == checkpoint.step >= 4
    ends = ledger.check(path / ledger.FILE, checkpoint.manifest["position"], checkpoint.manifest["unfinished"])
    lines = ledger.read(path / ledger.FILE)
    rolled_back = {line["step"] for line in lines if line.get("rolled_back")}
    assert rolled_back <= {int(again.split("from step ")[1]) + 1, int(again.split("from step ")[1]) + 2}
    trained = [row.group for _, file in rollout_log.rollout_files(path / "rollouts") for row in rollout_log.read_rollouts(file) if row.valid]
    assert sorted(trained) == sorted(4 * [line["group"] for line in ledger.surviving(lines) if line["state"] == "trained"])  # four completions each
    assert ends["trained"] == len(trained) // 4 >= 0.8 * ends.total()
    staleness = {name for record in read_metrics(path / "metrics.jsonl") for name in record if name.startswith("staleness/")}
    assert staleness == {"staleness/0", "staleness/1"}


def test_a_second_ctrl_c_leaves_at_once(started, toy_data, folder):
    """Also with learners alone; the last checkpoint is what is left."""
    run = started("sft", *settings(toy_data, "loop.steps=5000", "eval.ends=false", f"run.dir={folder}", "run.name=sft", "cluster.address=local", "loop.save_every=1"))
    run.steps(2)
    run.signal(signal.SIGINT)
    run.wait_for("SIGINT: stopping")
    run.signal(signal.SIGINT)
    status, output = run.end(60)
    assert status == 130 and "stopped at once" in output
    checkpoint, rejected = checkpoints.latest(folder / "sft" / "checkpoints")
    assert checkpoint.step >= 1 and not rejected
    run.assert_all_gone()
