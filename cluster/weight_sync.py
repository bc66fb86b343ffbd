"""Weights from the learner to every engine through vLLM's weight-transfer API: by the object store, or from GPU to GPU."""

from __future__ import annotations

import asyncio

import ray

from rollout.weight_transfer import BACKEND as OBJECT_STORE
from rollout.weight_transfer import TimedRayClient

from cluster.config import RunConfig
from cluster.errors import RunFailed
from cluster.placement import Actors, gather

BUCKET_BYTES = 256 * 2**20


async def connect(actors: Actors, config: RunConfig) -> None:
    """Once, before the first sync: on GPUs the learner's ranks join the engines."""
    if config.rollout.weight_sync == OBJECT_STORE:
        return
    workers = config.rollout.tensor_parallel
    client = TimedRayClient(actors.engines, config.rollout.sync_timeout_seconds, workers)
    rendezvous = None
    if config.rollout.weight_sync == "nccl":
        host, port = await actors.learners[0].address.remote()
        rendezvous = (host, port, 1 + workers * len(actors.engines))
    await gather([learner.connect.remote(config.rollout.weight_sync, client, BUCKET_BYTES, rendezvous) for learner in actors.learners])


async def sync_weights(actors: Actors, version: int, config: RunConfig) -> dict[str, float]:
    """All engines serve the learner's weights as `version` when this returns; generation is paused meanwhile.

    By the object store, the SHA-256 of the bytes that each engine's process read is compared with the learner's, bucket by
    bucket. Raises `RunFailed` where they differ, or past `rollout.sync_timeout_seconds`.
    """
    limit = config.rollout.sync_timeout_seconds
    send = _by_object_store if config.rollout.weight_sync == OBJECT_STORE else _from_gpu_to_gpu
    try:
        return await asyncio.wait_for(_paused(actors, str(version), send), limit)
    except asyncio.TimeoutError as error:
        raise RunFailed(f"weights {version} did not reach all engines within {limit:.0f} s", "raise rollout.sync_timeout_seconds") from error


async def _paused(actors: Actors, version: str, send) -> dict[str, float]:
    await gather([engine.begin_weight_sync.remote() for engine in actors.engines])
    sent = await send(actors, version)
    await gather([engine.finish_weight_sync.remote(version) for engine in actors.engines])
    return sent


async def _from_gpu_to_gpu(actors: Actors, version: str) -> dict[str, float]:
    await gather([learner.send_weights.remote() for learner in actors.learners])
    return {}


async def _by_object_store(actors: Actors, version: str) -> dict[str, float]:
    # Every rank streams: gathering a bucket is a collective under ZeRO-3. Only rank 0's buckets hold data.
    streams = [learner.weight_buckets.options(num_returns="streaming").remote(BUCKET_BYTES) for learner in actors.learners]
    count, total = 0, 0
    async for ref in streams[0]:
        for stream in streams[1:]:
            await (await anext(stream))
        bucket = await ref
        count, total = count + 1, total + bucket.nbytes
        plain = ray.put({"data": bucket.data, "index": [(e.name, e.dtype, e.shape, e.offset) for e in bucket.entries]})
        for number, digest in enumerate(await gather([engine.receive_weights.remote(plain) for engine in actors.engines])):
            if digest != bucket.sha256:
                raise RunFailed(f"engine {number} read other bytes than the learner sent (weights {version}, bucket {count})", "report this: it is a defect")
    return {"sync/bytes": float(total), "sync/buckets": float(count)}
