"""Where numbers go besides metrics.jsonl: real event files, Ray's own exporter, and the real W&B (offline) and MLflow (a folder), each read back."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import ray

from cluster import config, config_resolve
from cluster.config_rules import hardware_problems
from cluster.metrics import MetricsWriter, read_metrics
from cluster.sections import SINKS as NAMES
from cluster.sinks import SINKS, Sinks
from tests.conftest import ROOT

STACKS = Path(sys.prefix) / "stacks"  # requirements/stacks.txt


def test_a_run_may_name_each_of_them(monkeypatch):
    assert tuple(SINKS) == NAMES
    settings = config_resolve.resolve(config.load("debug", ["run.sinks=[wandb,mlflow]"]), config_resolve.detect_hardware())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = [p for p in hardware_problems(settings, config_resolve.detect_hardware(), settings.cluster.build) if p.key == "run.sinks"]
    assert "wandb, mlflow, which is not installed" in str(problem) and "pip install wandb mlflow-skinny" in str(problem)


def test_tensorboard_events_are_written_and_purged_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, None, Sinks(["tensorboard"], tmp_path, {}, print)) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"reward/mean": float(step), "bad": float("nan")})
    with MetricsWriter(tmp_path, 2, Sinks(["tensorboard"], tmp_path, {}, print, 2)) as writer:
        writer.write(3, {"reward/mean": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert events.Tags()["scalars"] == ["reward/mean"]


def test_prometheus_finds_the_last_step_at_rays_exporter(ray_session, tmp_path):
    run = tmp_path / "a-run"
    run.mkdir()
    sinks = Sinks(["prometheus"], run, {}, pytest.fail)
    for step, reward in ((1, 4.0), (2, 5.5)):
        sinks.write(step, {"reward/mean": reward, "reward/term/weighted_iou": 0.25})
    (node,) = [n for n in ray.nodes() if n["Alive"]]
    url, found = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", {}
    for _ in range(60):
        lines = httpx.get(url, trust_env=False).text.splitlines()
        found = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("ray_videoseg_") and 'run="a-run"' in line}
        if found.get("ray_videoseg_step") == 2.0:
            break
        time.sleep(0.5)
    assert found == {"ray_videoseg_step": 2.0, "ray_videoseg_reward_mean": 5.5, "ray_videoseg_reward_term_weighted_iou": 0.25}
    shown = json.loads((ROOT / "examples/cluster/grafana.json").read_text())
    asked = {target["expr"] for panel in shown["panels"] for target in panel.get("targets", ())}
    assert any("ray_videoseg_reward_mean" in expr for expr in asked) and all('run=~"$run"' in expr for expr in asked)


SCRIPT = """
import json, sys
from pathlib import Path
from cluster.metrics import MetricsWriter
from cluster.sinks import Sinks
folder, resume = Path(sys.argv[1]), json.loads(sys.argv[2])
warnings = []
sinks = Sinks(["wandb", "mlflow"], folder, {"learner": {"lr": 0.5}}, warnings.append, resume)
with MetricsWriter(folder, resume, sinks) as writer:
    for step, reward in json.loads(sys.argv[3]):
        writer.write(step, {"reward/mean": reward, "learner/grad_norm/layers.0": 0.5, "bad": float("nan")})
assert warnings == [], warnings
"""
READ = """
import json, sys
import mlflow
client = mlflow.MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("videoseg-r1").experiment_id])
history = sorted((m.timestamp, m.step, m.value) for m in client.get_metric_history(run.info.run_id, "reward/mean"))
print(json.dumps([run.info.run_name, run.info.status, sorted(run.data.metrics), [m[1:] for m in history]]))
"""


def test_wandb_and_mlflow_get_every_step_and_a_resumed_run_goes_on_in_theirs(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{STACKS}", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip

    def python(script, *arguments):
        done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    python(SCRIPT, str(folder), "null", "[[1, 1.0], [2, 2.0]]")
    python(SCRIPT, str(folder), "1", "[[2, 2.5], [3, 3.0]]")
    name, status, metrics, history = json.loads(python(READ).splitlines()[-1])
    assert (name, status, metrics) == ("a run", "FINISHED", ["learner/grad_norm/layers.0", "reward/mean"])
    assert history == [[1, 1.0], [2, 2.0], [2, 2.5], [3, 3.0]]
    runs = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.stem for file in runs] == ["run-a_run", "run-a_run"]
    assert all(b"reward/mean" in file.read_bytes() and b"layers.0" in file.read_bytes() for file in runs)
    assert [(r["step"], r["reward/mean"], r["bad"]) for r in read_metrics(folder / "metrics.jsonl")] == [(1, 1.0, None), (2, 2.5, None), (3, 3.0, None)]


def test_one_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *arguments):
            self.written = 0

        def write(self, step, values):
            self.written += 1
            raise ConnectionError("no server")

        def close(self):
            raise AssertionError("it was left out")

    broken, warnings = Broken(), []
    monkeypatch.setattr("cluster.sinks.SINKS", SINKS | {"wandb": lambda *arguments: broken, "mlflow": lambda *arguments: 1 / 0})
    with MetricsWriter(tmp_path, None, Sinks(["mlflow", "wandb", "tensorboard"], tmp_path, {}, warnings.append)) as writer:
        for step in (1, 2):
            writer.write(step, {"a": 1.0})
    assert warnings == [
        "warning: run.sinks: mlflow gets no more numbers: ZeroDivisionError: division by zero",
        "warning: run.sinks: wandb gets no more numbers: ConnectionError: no server",
    ]
    assert broken.written == 1 and len(read_metrics(tmp_path / "metrics.jsonl")) == 2 and list((tmp_path / "tensorboard").iterdir())
