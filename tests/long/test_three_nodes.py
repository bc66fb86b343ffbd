"""The debug recipe as a job of a Ray cluster of three nodes: the first step's rewards are those of one node, no group is lost, stop and resume
go through the job server (ten minutes; docs/three-nodes.json)."""

import json
import os
import statistics
import subprocess
import sys
import threading
from collections import defaultdict

import pytest

from cluster import checkpoints, ledger, rollout_log
from cluster.metrics import read_metrics
from tests.cluster.test_loop import settings
from tests.conftest import ROOT
from tests.long.nodes import nodes_of

STEPS = 20
PARTS = ["rollout.engines=2", "learner.ranks=2", "segmentation.replicas=2", "loop.deterministic=true", "learner.lr_schedule=constant", "eval.ends=false", "rollout.kv_cache_gb=0.1"]
PARTS += ["learner.threads=1", "cluster.start_seconds=3600", "rollout.sync_timeout_seconds=1500", "loop.score_seconds=1500"]  # however busy the machine is
PARTS += ["cluster.cpus_per_engine=4", "cluster.cpus_per_learner=2", "cluster.cpus_per_segmenter=0.5"]
CPUS = (4, 2, 7)  # there is one way for them to fit: an engine on the first node, a rank on the second, the others on the third
ROLES = {"RolloutEngine": "engine", "SegmenterActor": "segmenter", "LearnerActor": "learner"}


@pytest.mark.long
def test_three_nodes_do_what_one_does_and_lose_nothing(toy_data, tmp_path):
    asked = [*settings(toy_data, *PARTS), f"run.dir={tmp_path}"]
    with nodes_of(sum(CPUS)) as nodes:
        videoseg(nodes, "submit", *asked, "run.name=one", "loop.steps=1").finish(0)
        assert {len(set(addresses)) for addresses in placed(nodes).values()} == {1}

    with nodes_of(*CPUS) as nodes:
        look = "from cluster import config, ray_cluster; print(ray_cluster.hardware(config.load('debug').cluster))"
        looked = subprocess.run(["ray", "job", "submit", "--address", nodes.url, "--", sys.executable, "-c", look], env=nodes.environment, capture_output=True, text=True)
        assert ", nodes=3)" in looked.stdout, looked.stdout + looked.stderr
        videoseg(nodes, "submit", *asked, "run.name=three", f"loop.steps={STEPS}").finish(0)
        placement = placed(nodes)
        resumed = videoseg(nodes, "submit", "--resume", str(tmp_path / "three"), "loop.steps=500", "--name", "again")
        resumed.wait_for(f"step {STEPS + 2}/500")
        subprocess.run(["ray", "job", "stop", "--address", nodes.url, "again"], env=nodes.environment, check=True, capture_output=True)
        resumed.finish(130)

    run = tmp_path / "three"
    assert len(json.loads((run / "environment.json").read_text())["hardware"]["each"]) == 3
    first, alone = ({row.seed: (row.group, row.reward, row.response_token_ids) for row in rollout_log.read_rollouts(rollout_log.file_of(path / "rollouts", 1))} for path in (run, tmp_path / "one"))
    assert len(first) == 16 and first == alone

    final, rejected = checkpoints.latest(run / "checkpoints")
    done = read_metrics(run / "metrics.jsonl")
    assert final.step == done[-1]["step"] >= STEPS + 2 and not rejected and "SIGTERM: stopping with a checkpoint" in resumed.text
    groups = [group for _, file in rollout_log.rollout_files(run / "rollouts") for group in sorted(set(rollout_log.read_columns(file, ["group"])["group"]))]
    assert groups == list(range(4 * final.step))
    states = ledger.check(run / ledger.FILE, final.manifest["position"], final.manifest["unfinished"])
    assert states == {"trained": 4 * final.step}

    if nodes.how == "network namespaces":
        assert len({address for addresses in placement.values() for address in addresses}) == 3
        assert len(set(placement["engine"])) == len(set(placement["learner"])) == 2
    record = {
        "command": "pytest -m long tests/long/test_three_nodes.py",
        "nodes": nodes.how,
        "cpus": CPUS,
        "placement": placement,
        "steps": STEPS,
        "seconds_per_step": round(statistics.median(r["seconds/step"] for r in done if r["step"] <= STEPS), 2),
        "completions_of_the_first_step_equal_to_one_node": len(first),
        "first_step_rewards": [reward for _, reward, _ in first.values()],
        "stopped_and_resumed_after_step": STEPS,
        "stopped_again_after_step": final.step,
        "groups": states,
    }
    partial = ROOT / "docs/three-nodes.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, partial.with_suffix(".json"))


class videoseg:
    """A `videoseg` command whose output is shown and kept."""

    def __init__(self, nodes, *arguments):
        self.text, self.lines = "", threading.Condition()
        self.process = subprocess.Popen([sys.executable, "-m", "cluster.cli", *arguments], cwd=ROOT, env=nodes.environment | {"RAY_API_SERVER_ADDRESS": nodes.url}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            print(line, end="", flush=True)
            with self.lines:
                self.text += line
                self.lines.notify_all()
        with self.lines:
            self.lines.notify_all()

    def wait_for(self, beginning, seconds=1800):
        with self.lines:
            assert self.lines.wait_for(lambda: f"\n{beginning}" in self.text or not self.reader.is_alive(), seconds) and f"\n{beginning}" in self.text, self.text

    def finish(self, status, seconds=3600):
        assert self.process.wait(seconds) == status, self.text
        self.reader.join()


def placed(nodes):
    """role -> addresses of the nodes on which its actors were started."""
    addresses = {node["node_id"]: node["node_ip"] for node in nodes.listed("nodes")}
    found = defaultdict(list)
    for actor in nodes.listed("actors"):
        if role := ROLES.get(actor["class_name"]):
            found[role].append(addresses[actor["node_id"]])
    return {role: sorted(found[role]) for role in ROLES.values()}
