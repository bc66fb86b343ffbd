"""Costs of a run's stages: found again from the files of a run that had them, exactly; what cannot give them is refused."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import cli, config, config_dump
from cluster.errors import UserError
from cluster.rollout_log import file_of
from cluster.run_folder import RunFolder
from cluster.sections import LoopConfig
from cluster.simulate import simulate
from cluster.stage_costs import measure, sizes_of
from cluster.timeline import FILE as TRACE

TRUE = dict(step_seconds=0.02, sequence_seconds=0.0005, prompt_seconds=0.03, score_seconds=0.05, learn_seconds=0.7, token_seconds=0.002, sync_seconds=0.4)
OVERRIDES = ["rollout.prompts_per_step=6", "rollout.group_size=4", "rollout.engines=2", "learner.ranks=2", "segmentation.replicas=2"]


def write_run(path, *overrides, steps=12):
    """A run's files as `cluster.run` leaves them, with stages that took what TRUE says."""
    path.mkdir()
    settings = config.load("debug", [*OVERRIDES, *overrides])
    folder, rng, clock, events = RunFolder(path), np.random.default_rng(0), 1e9, []
    folder.config.write_text(config_dump.dump_yaml(settings, comments=False, title="a run"))
    folder.environment.write_text("{}")
    folder.rollouts.mkdir()

    def span(track, name, begin, end, **details):
        mark = {"cat": track, "id": f"{track}/{len(events)}"}
        events.extend([{"name": name, "ph": "b", "ts": begin * 1e6, "args": details, **mark}, {"name": name, "ph": "e", "ts": end * 1e6, **mark}])

    with open(folder.metrics, "w") as metrics:
        metrics.write(json.dumps({"step": 0, "eval/iou/box": 0.4}) + "\n")
        for step in range(1, steps + 1):
            lengths = rng.integers(10, 80, (6, 4))
            ends = []
            for engine in range(2):
                mine = lengths[engine::2]
                seconds = 3 * TRUE["prompt_seconds"] + mine.max() * TRUE["step_seconds"] + mine.sum() * TRUE["sequence_seconds"]
                for n in range(engine, 6, 2):  # all are asked at once, and end when their own longest does
                    last = lengths[n].max() == mine.max()
                    span(f"engine {engine}", "generate", clock, clock + (seconds if last else 0.5 * seconds), number=6 * (step - 1) + n)
                for wait, n in enumerate(range(engine, 6, 2), 1):  # one after the other
                    span(f"segmenter {engine}", "segment_group", clock + seconds, clock + seconds + wait * TRUE["score_seconds"], number=6 * (step - 1) + n)
                ends.append(seconds + 3 * TRUE["score_seconds"])
            rollout, train = max(ends), TRUE["learn_seconds"] + TRUE["token_seconds"] * lengths.sum() / 2
            span("loop", "rollout", clock, clock + rollout, version=step - 1)
            record = {"seconds/rollout": rollout, "seconds/train": train, "seconds/sync": TRUE["sync_seconds"], "seconds/step": rollout + train + TRUE["sync_seconds"]}
            metrics.write(json.dumps({"step": step} | record) + "\n")
            rows = {"group": np.repeat(np.arange(6), 4), "response_token_ids": [[1] * n for n in lengths.ravel()]}
            pq.write_table(pa.table(rows), file_of(folder.rollouts, step))
            clock += 100
    (path / TRACE).write_text("[\n" + "".join(json.dumps(e) + ",\n" for e in events))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "a")


def test_costs_are_found_again(run):
    found = measure(run)
    told = {name: value for name, value in asdict(found.costs).items() if name != "lengths"}
    assert told == pytest.approx(TRUE, rel=1e-4) and len(found.costs.lengths) == 11 * 24
    assert found.sizes == sizes_of(config.load("debug", OVERRIDES)) and found.steps == 11
    # The run's stages lie one behind the other; the simulator scores groups while others are generated, so it may be a little faster.
    own = simulate(found.costs, found.sizes, LoopConfig(steps=40)).step_seconds
    assert 0.9 * found.step_seconds < own < 1.05 * found.step_seconds


def test_more_parts_take_less_time_and_modes_overlap(run, capsys):
    assert cli.main(["plan", "debug", *OVERRIDES, "rollout.engines=8", "segmentation.replicas=8", "--simulate", str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {int(line.split()[0]): line for line in lines[-3:]}
    seconds = {n: float(line.replace("(configured)", "").split()[1]) for n, line in rows.items()}
    assert "(configured)" in rows[0] and seconds[1] < seconds[0] < measure(run).step_seconds
    assert seconds[1] == pytest.approx(TRUE["learn_seconds"] + TRUE["sync_seconds"] + TRUE["token_seconds"] * 24 * 44.5 / 2, rel=0.1)  # the learner rules


@pytest.mark.parametrize("overrides, steps, said", [
    (["loop.max_staleness=1"], 12, "synchronous"), (["loop.deterministic=true", "rollout.engines=1"], 12, "synchronous"), ([], 5, "5 steps"),
])  # fmt: skip
def test_runs_without_costs_are_refused(overrides, steps, said, tmp_path):
    with pytest.raises(UserError, match=said):
        measure(write_run(tmp_path / "a", *overrides, steps=steps))
