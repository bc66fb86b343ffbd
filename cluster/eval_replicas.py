"""An evaluation shared among copies of policy and segmenter, each in a process of its own, on a GPU of its own where there are GPUs, on whatever nodes Ray has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util import ActorPool

from cluster import evaluate
from cluster.errors import RunFailed, UserError
from cluster.evaluate import Asked, Evaluation
from cluster.inference import Answered
from cluster.placement import ENVIRONMENT
from cluster.ray_cluster import joined_cluster

SHARE = 32  # expressions that a copy is given at a time, or as many as there are about a video


@ray.remote
class Copy:
    """Predictions go to the evaluation's folder, which all nodes must see; answers come back."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._open = ExitStack()
        self._evaluation, self._model = evaluation, self._open.enter_context(evaluate.here(evaluation))

    def predict(self, asked: Asked) -> list[Answered]:
        return list(evaluate.with_masks(self._model, self._evaluation, asked))

    def close(self) -> None:
        self._open.close()


@contextmanager
def copies(evaluation: Evaluation, count: int) -> Iterator[Callable[[Asked], Iterator[Answered]]]:
    """Inside, `count` copies answer and make masks, videos in any order. Raises UserError where the cluster has no room for them; where one dies,
    RunFailed while its answers are waited for."""
    settings = evaluation.policy.settings
    c, gpus = settings.cluster, float(settings.rollout.tensor_parallel if settings.cluster.device == "cuda" else 0)
    cpus = c.cpus_per_engine + c.cpus_per_segmenter
    with joined_cluster(c):
        has = ray.cluster_resources()
        room = min([int(has.get(kind, 0.0) / each + 1e-6) for kind, each in (("CPU", cpus), ("GPU", gpus)) if each])
        if count > room:
            raise UserError(f"{count} replicas of {cpus:g} CPUs and {gpus:g} GPUs each, and the cluster has room for {room}", f"use --replicas {max(room, 1)}, or lower cluster.cpus_per_engine")
        actor = Copy.options(num_cpus=cpus, num_gpus=gpus, runtime_env={"env_vars": ENVIRONMENT})
        actors = [actor.remote(replace(evaluation, out=evaluation.out.absolute())) for _ in range(count)]
        try:
            yield partial(_answers, actors)
        finally:
            ray.wait(closed := [a.close.remote() for a in actors], num_returns=len(closed), timeout=10.0)


def _answers(actors: list[Any], asked: Asked) -> Iterator[Answered]:
    pool = ActorPool(actors)
    try:
        for answered in pool.map_unordered(lambda actor, share: actor.predict.remote(share), list(shares(asked))):
            yield from answered
    except RayActorError as error:
        raise RunFailed(f"a replica is lost: {error}", "run it again: what is answered is skipped") from error


def shares(asked: Asked) -> Iterator[Sequence]:
    """In their order, whole videos, of SHARE expressions or the first number above."""
    share: list = []
    for _, of_video in groupby(asked, key=lambda one: one[0].video_id):
        share += of_video
        if len(share) >= SHARE:
            yield share
            share = []
    if share:
        yield share
