"""Weights from the learner to every engine through vLLM's weight-transfer API, bucket by bucket, with hashes compared."""

from __future__ import annotations

import asyncio

import ray

from cluster.errors import RunFailed
from cluster.placement import Actors, gather

BUCKET_BYTES = 256 * 2**20


async def sync_weights(actors: Actors, version: int, timeout_seconds: float) -> dict[str, float]:
    """All engines serve the learner's weights as `version` when this returns; generation is paused meanwhile.

    The SHA-256 of the bytes that each engine's process read is compared with the learner's, bucket by bucket.
    Raises `RunFailed` where they differ, or past the time limit.
    """
    try:
        return await asyncio.wait_for(_sync(actors, str(version)), timeout_seconds)
    except asyncio.TimeoutError as error:
        raise RunFailed(f"weights {version} did not reach all engines within {timeout_seconds:.0f} s", "raise rollout.sync_timeout_seconds") from error


async def _sync(actors: Actors, version: str) -> dict[str, float]:
    await gather([engine.begin_weight_sync.remote() for engine in actors.engines])
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
    await gather([engine.finish_weight_sync.remote(version) for engine in actors.engines])
    return {"sync/bytes": float(total), "sync/buckets": float(count)}
