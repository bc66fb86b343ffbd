"""Weights from the learner to every engine through vLLM's weight-transfer API: by the object store, or from GPU to GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

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
    client = TimedRayClient(tuple(actors.engines), config.rollout.sync_timeout_seconds, workers)
    rendezvous = None
    if config.rollout.weight_sync == "nccl":
        host, port = await actors.learners[0].address.remote()
        rendezvous = (host, port, 1 + workers * len(actors.engines))
    await gather([learner.connect.remote(config.rollout.weight_sync, client, BUCKET_BYTES, rendezvous) for learner in actors.learners])


async def sync_weights(engines: Sequence[Any], learners: Sequence[Any], version: int, config: RunConfig, checked: bool = True) -> dict[str, float]:
    """These engines serve the learner's weights as `version` when this returns; generation is paused meanwhile.

    The SHA-256 of the bytes that each engine's process read is compared with the learner's: by the object store bucket by bucket and always, from GPU to GPU
    tensor by tensor and where `checked`. Raises `RunFailed` where they differ, TimeoutError past `rollout.sync_timeout_seconds`; an engine whose update was begun and not
    finished must not be used any more.
    """
    send = _by_object_store if config.rollout.weight_sync == OBJECT_STORE else partial(_from_gpu_to_gpu, checked=checked)
    return await asyncio.wait_for(_sent(engines, learners, str(version), send), config.rollout.sync_timeout_seconds)


async def _sent(engines: Sequence[Any], learners: Sequence[Any], version: str, send) -> dict[str, float]:
    sent = await send(engines, learners, version)
    await gather([engine.finish_weight_sync.remote(version) for engine in engines])
    return sent


async def _begin(engines: Sequence[Any]) -> None:
    await gather([engine.begin_weight_sync.remote() for engine in engines])


async def _from_gpu_to_gpu(engines: Sequence[Any], learners: Sequence[Any], version: str, checked: bool) -> dict[str, float]:
    await _begin(engines)
    if checked:
        await gather([engine.hash_weights.remote() for engine in engines])
    sent = (await gather([learner.send_weights.remote(checked) for learner in learners]))[0]
    for number, workers in enumerate(await gather([engine.hashed_weights.remote() for engine in engines]) if checked else []):
        for received in workers:
            if other := sorted(name for name in sent | received if sent.get(name) != received.get(name)):
                raise RunFailed(f"engine {number} received other weights than the learner sent (weights {version}): {other[0]}, and {len(other) - 1} more", "report this: it is a defect")
    return {"sync/checked": float(checked)}


async def _by_object_store(engines: Sequence[Any], learners: Sequence[Any], version: str) -> dict[str, float]:
    # Every rank streams: gathering a bucket is a collective under ZeRO-3. Only rank 0's buckets hold data.
    streams = [learner.weight_buckets.options(num_returns="streaming").remote(BUCKET_BYTES) for learner in learners]
    await _begin(engines)  # while the learners gather the first bucket
    count, total = 0, 0
    async for ref in streams[0]:
        for stream in streams[1:]:
            await (await anext(stream))
        bucket = await ref
        count, total = count + 1, total + bucket.nbytes
        plain = ray.put({"data": bucket.data, "index": [(e.name, e.dtype, e.shape, e.offset) for e in bucket.entries]})
        for number, digest in enumerate(await gather([engine.receive_weights.remote(plain) for engine in engines])):
            if digest != bucket.sha256:
                raise RunFailed(f"engine {number} read other bytes than the learner sent (weights {version}, bucket {count})", "report this: it is a defect")
    return {"sync/bytes": float(total), "sync/buckets": float(count)}
