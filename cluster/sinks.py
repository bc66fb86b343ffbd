"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Prometheus by way of Ray, Weights & Biases, MLflow (`run.sinks`).

Where and as whom is said to W&B and MLflow by their own environment variables: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

PROJECT = "videoseg-r1"
"""Of W&B, and MLflow's experiment, where no variable names another."""
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The finite numbers of a step, by their names in metrics.jsonl. A resumed run writes the steps after its checkpoint again."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, config: Any, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports torch

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class Prometheus:
    """Gauges that the metrics agents of Ray's nodes offer: `ray_videoseg_reward_mean{run="..."}` for reward/mean, and ray_videoseg_step."""

    def __init__(self, folder: Path, config: Any, resume_step: int | None) -> None:
        self._run, self._gauges = folder.name, {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from ray.util.metrics import Gauge

        for name, value in {"step": float(step), **values}.items():
            gauge = "videoseg_" + re.sub(r"\W", "_", name)
            if gauge not in self._gauges:
                self._gauges[gauge] = Gauge(gauge, f"{name} of a run's last step", ("run",))
            self._gauges[gauge].set(value, {"run": self._run})

    def close(self) -> None:
        """Ray forgets them with this process."""


class WeightsAndBiases:
    """One W&B run of the run folder's name, gone on with by a resumed run. Numbers have `step` as their axis, so that steps may be written again."""

    def __init__(self, folder: Path, config: Any, resume_step: int | None) -> None:
        import wandb

        name = folder.name
        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), id=re.sub(r"[^\w-]", "_", name), name=name, resume="allow", dir=str(folder), config=config)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """One MLflow run of the run folder's name. A resumed run goes on in it: its id is kept in RUN/mlflow_run."""

    def __init__(self, folder: Path, config: Any, resume_step: int | None) -> None:
        import mlflow

        self._client, known = mlflow.MlflowClient(), folder / "mlflow_run"
        if known.exists():
            self._run = known.read_text(encoding="utf-8")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        self._run = self._client.create_run(experiment.experiment_id if experiment else self._client.create_experiment(name), run_name=folder.name).info.run_id
        self._client.log_dict(self._run, config, "config.json")
        known.write_text(self._run, encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


SINKS: Mapping[str, Callable[[Path, Any, int | None], Sink]] = {"tensorboard": TensorBoard, "prometheus": Prometheus, "wandb": WeightsAndBiases, "mlflow": MLflow}


class Sinks:
    """Those of a run. One that fails is left out from then on, with a warning: the numbers are in metrics.jsonl, and no run ends for a server's sake."""

    def __init__(self, names: Sequence[str], folder: Path, config: Any, warn: Callable[[str], None], resume_step: int | None = None) -> None:
        """config: the run's settings as plain values."""
        self._warn, self._open = warn, {}
        for name in names:
            self._try(name, lambda: self._open.update({name: SINKS[name](folder, config, resume_step)}))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, sink in list(self._open.items()):
            self._try(name, lambda: sink.write(step, values))

    def close(self) -> None:
        for name, sink in list(self._open.items()):
            self._try(name, sink.close)

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a client library raises
            self._open.pop(name, None)
            self._warn(f"warning: run.sinks: {name} gets no more numbers: {type(error).__name__}: {error}")


def not_installed(names: Sequence[str]) -> list[str]:
    """Those whose packages are missing."""
    return [name for name in names if name in PACKAGES and importlib.util.find_spec(name) is None]
