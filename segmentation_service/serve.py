"""The segmentation service as a Ray Serve application: replicas that batch, a bounded queue, and health checks that try the model."""

from __future__ import annotations

import asyncio
import os

from ray import serve
from ray.serve.handle import DeploymentHandle

from . import serve_app
from .batching import BatchThread
from .checkpoint import check_propagation, check_sam2
from .serve_config import ServeConfig, check
from .service import Answer, SegmentationService
from .service_request import SegmentRequest

APPLICATION = "segmentation"


class SegmentationReplica:
    """One process with the networks. Made by Ray Serve; `client.HandleClient` calls it."""

    def __init__(self, config: ServeConfig) -> None:
        import torch

        torch.set_num_threads(config.segmentation.cpus_per_replica)
        self._batches = BatchThread(SegmentationService.load(config))

    async def segment(self, request: SegmentRequest, alone: bool = False) -> Answer:
        """Errors are returned, not raised: Ray would wrap them."""
        return await asyncio.wrap_future(self._batches.submit(request, alone))

    async def stats(self) -> dict[str, float]:
        """Of this replica: its process, and the counters of `BatchThread.stats`."""
        return {"pid": os.getpid(), **self._batches.stats()}

    async def check_health(self) -> None:
        """Raises where the model does not answer; Ray Serve then replaces this replica."""
        await asyncio.to_thread(self._batches.check)


def application(config: ServeConfig) -> serve.Application:
    """To run, or to bind to another deployment. Raises ValueError (CheckpointError) where the settings cannot work."""
    check(config)
    s = config.segmentation
    check_sam2(s.checkpoint, s.backend, s.model_config)
    if s.propagation.checkpoint is not None:
        check_propagation(s.propagation.method, s.propagation.checkpoint, s.propagation.model_config)
    # Replicas share the machine: threads that spin for long while they wait (OpenMP's default) would take it from the one at work.
    environment = {"GOMP_SPINCOUNT": "2000", "OMP_NUM_THREADS": str(s.cpus_per_replica)}
    deployment = serve.deployment(
        SegmentationReplica,
        num_replicas=s.replicas,
        max_ongoing_requests=2 * config.batch_size,  # one batch at work, the next one ready
        max_queued_requests=config.max_queued_requests,
        **serve_app.OPTIONS,
        ray_actor_options={"num_cpus": s.cpus_per_replica, "num_gpus": config.gpus_per_replica, "runtime_env": {"env_vars": environment}},
    )
    return deployment.bind(config)


def start(config: ServeConfig) -> DeploymentHandle:
    """The handle of the running application, once all replicas are ready, in the Ray cluster to which this process belongs.

    Raises as `application`, and RuntimeError with the cause where a replica does not come up.
    """
    return serve_app.run(application(config), APPLICATION)


def stop() -> None:
    """Ends the application, and Ray Serve itself if that served nothing else."""
    serve_app.stop(APPLICATION)
