"""A run on three nodes, the network of one of which is cut: for seconds, which nothing notices, and for good, which costs its parts and no group
(ten minutes; docs/network-cut.json). Needs network namespaces: root, and `ip`."""

import json
import os
import re
import subprocess
import time

import pytest

from cluster import checkpoints, ledger
from tests.cluster.test_loop import settings
from tests.conftest import ROOT
from tests.long.nodes import namespaces_can_be_made, nodes_of
from tests.long.test_three_nodes import placed, videoseg

CPUS = (2, 4, 4)  # the head has no room for an engine, and each other node has room for all that may sit on one of them
PARTS = ["cluster.cpus_per_engine=3", "cluster.cpus_per_learner=1", "cluster.cpus_per_segmenter=0.5", "rollout.kv_cache_gb=0.1", "learner.threads=1", "cluster.start_seconds=600"]
LIMITS = ["loop.learn_seconds=60", "rollout.sync_timeout_seconds=60", "loop.group_seconds=90", "loop.score_seconds=30", "loop.save_every=2", "eval.ends=false"]
SHORT, LIMIT = 5.0, 400.0
"""Seconds: a cut that must not be noticed; and from a cut to the next steps of what is left, two starts of all parts among them."""


def step_lines(run):
    return re.findall(r"\nstep (\d+)/", run.text)


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.2)


@pytest.mark.long
def test_a_cut_network_costs_parts_and_no_group(toy_data, tmp_path):
    if not namespaces_can_be_made():
        pytest.skip("cutting a network takes network namespaces: root, and `ip`")
    with nodes_of(*CPUS) as nodes:
        asked = [*settings(toy_data, *PARTS, *LIMITS), f"run.dir={tmp_path}", "run.name=cut", "loop.steps=5000"]
        run = videoseg(nodes, "submit", *asked, "--name", "cut")
        run.wait_for("step 3/5000")
        home = placed(nodes)
        (address,) = home["engine"]
        with nodes.cut(address):
            time.sleep(SHORT)
        steps = len(step_lines(run))
        until(lambda: len(step_lines(run)) >= steps + 3, LIMIT)
        assert "warning" not in run.text, run.text

        began, said = time.monotonic(), len(run.text)
        with nodes.cut(address):
            until(lambda: "warning" in run.text[said:], LIMIT)
            noticed = time.monotonic() - began
            steps = len(step_lines(run))
            until(lambda: len(step_lines(run)) >= steps + 3, LIMIT)
            on_again = time.monotonic() - began
        warnings = [line for line in run.text[said:].splitlines() if line.startswith("warning")]
        subprocess.run(["ray", "job", "stop", "--address", nodes.url, "cut"], env=nodes.environment, check=True, capture_output=True)
        run.finish(130)
    final, rejected = checkpoints.latest(tmp_path / "cut/checkpoints")
    states = ledger.check(tmp_path / "cut" / ledger.FILE, final.manifest["position"], final.manifest["unfinished"])
    assert not rejected and states == {"trained": 4 * final.step}
    record = {
        "command": "pytest -m long tests/long/test_network_cut.py",
        "nodes": nodes.how,
        "placement": home,
        "cut_that_nothing_noticed_seconds": SHORT,
        "cut_for_good": {"node": address, "noticed_after_seconds": round(noticed, 1), "three_more_steps_after_seconds": round(on_again, 1), "warnings": warnings},
        "steps": final.step,
        "groups": states,
    }
    partial = ROOT / "docs/network-cut.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, partial.with_suffix(".json"))
