"""The reward service as a Ray Serve application: replicas that score, and a bounded queue."""

from __future__ import annotations

import os

from ray import serve
from ray.serve.handle import DeploymentHandle

from reward_service.client import load
from reward_service.score_request import ScoreRequest, ScoreResponse
from reward_service.serve_config import RewardServeConfig, check
from segmentation_service import serve_app
from segmentation_service.service_request import ServiceError

APPLICATION = "reward"
ONGOING = 16
"""Requests that a replica holds: one is scored at a time, the others wait for masks or for their turn."""


class RewardReplica:
    """One process that scores. Made by Ray Serve; `client.HandleClient` calls it."""

    def __init__(self, config: RewardServeConfig) -> None:
        self._service = load(config)

    async def score(self, request: ScoreRequest, alone: bool = False) -> ScoreResponse | ServiceError:
        """Errors are returned, not raised: Ray would wrap them. Every request is alone: `alone` is what other services need."""
        try:
            return await self._service.score(request)
        except ServiceError as error:
            return error

    async def stats(self) -> dict[str, float]:
        """Of this replica: its process, requests, items, and those of them that were invalid."""
        return {"pid": os.getpid(), **self._service.counts}


def application(config: RewardServeConfig) -> serve.Application:
    """To run, or to bind to another deployment. Raises ValueError where the settings cannot work."""
    check(config)
    deployment = serve.deployment(
        RewardReplica,
        num_replicas=config.replicas,
        max_ongoing_requests=ONGOING,
        max_queued_requests=config.max_queued_requests,
        **serve_app.OPTIONS,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
    )
    return deployment.bind(config)


def start(config: RewardServeConfig) -> DeploymentHandle:
    """The handle of the running application, once all replicas are ready, in the Ray cluster to which this process belongs.

    Raises as `application`, and RuntimeError with the cause where a replica does not come up.
    """
    return serve_app.run(application(config), APPLICATION)


def stop() -> None:
    """Ends the application, and Ray Serve itself if that served nothing else."""
    serve_app.stop(APPLICATION)
