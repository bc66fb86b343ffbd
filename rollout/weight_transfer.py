"""Weights from the Ray object store into vLLM on a CPU, as an engine of vLLM's own weight-transfer API.

vLLM's engine core is a child process of the rollout actor, not a Ray worker, so it cannot read the object store. The actor
takes a bucket from the store and writes its bytes to a file in shared memory (`write_bucket`); the child maps the file,
hashes what it sees, and loads the tensors by layerwise reload (the CPU build packs weights, so a plain load does not work).

A bucket is plain data, so that learner and rollout need not share code:
`{"data": uint8 array (N,), "index": [(name, dtype, shape, offset), ...]}` with Hugging Face parameter names, dtypes like
"float32" or "bfloat16", offsets in bytes. A mapping of names to NumPy arrays is a bucket too (see `pack_bucket`).

`register` is the `vllm.general_plugins` entry point: vLLM calls it in the actor and in every process that it starts.
"""

import difflib
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping

BACKEND = "object_store"
# Set by RolloutEngine while it starts vLLM, so that vLLM engines of other programs are left alone.
EXIT_WITH_PARENT = "VIDEOSEG_EXIT_WITH_PARENT"
KEEP_IMAGE_DATA = "VIDEOSEG_KEEP_IMAGE_DATA"
_ALIGNMENT = 64


class BucketError(ValueError):
    """A bucket of weights is not what was promised: its index does not fit its bytes."""


def pack_bucket(tensors: Mapping):
    """One flat bucket `{"data", "index"}` of named NumPy arrays; offsets are multiples of 64 bytes."""
    import numpy as np

    index, offset = [], 0
    for name, array in tensors.items():
        index.append((name, str(array.dtype), tuple(array.shape), offset))
        offset += math.ceil(array.nbytes / _ALIGNMENT) * _ALIGNMENT
    data = np.zeros(offset, np.uint8)
    for (_, _, _, start), array in zip(index, tensors.values()):
        data[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"data": data, "index": index}


def bucket_digest(bucket: Mapping) -> str:
    """SHA-256 (hex) of a flat bucket's bytes: what the sender compares with what `receive_weights` returns."""
    return hashlib.sha256(memoryview(bucket["data"]).cast("B")).hexdigest()


def canonical_name(name: str) -> str:
    """One name for a weight, whether it is called as in transformers' modules or as in checkpoint files of any age."""
    for prefix, short in (("model.language_model.", "model."), ("model.visual.", "visual."), ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def checkpoint_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights in a folder's safetensors files by canonical name, from the headers alone; {} if it has none."""
    shapes = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {canonical_name(name): tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def check_shapes(bucket: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise BucketError for a tensor that the policy does not have or has in another shape.

    vLLM does not notice all of these: its loaders of fused weights silently take the first rows of a larger tensor.
    """
    for name, _, shape, _ in bucket["index"]:
        known = shapes.get(canonical_name(name))
        if known is None:
            near = difflib.get_close_matches(canonical_name(name), shapes, 1)
            raise BucketError(f"the policy has no weight {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
        if known != tuple(shape):
            raise BucketError(f"weight {name!r} has shape {tuple(shape)}, but the policy's is {known} (a shard of a partitioned weight?)")


def check_bucket(bucket: Mapping) -> None:
    """Raise BucketError unless every tensor of the index lies inside the bucket's bytes."""
    import torch

    size = bucket["data"].nbytes
    if not bucket["index"]:
        raise BucketError("a bucket of weights holds no tensor; send only buckets with at least one")
    for name, dtype, shape, offset in bucket["index"]:
        element = getattr(torch, str(dtype), None)
        if not isinstance(element, torch.dtype):
            raise BucketError(f"weight {name!r} has dtype {dtype!r}; use a torch dtype name such as float32 or bfloat16")
        end = offset + math.prod(shape) * element.itemsize
        if offset < 0 or end > size:
            raise BucketError(f"weight {name!r} needs bytes {offset} to {end}, but its bucket has {size}: the index does not fit the data")


def write_bucket(bucket: Mapping) -> str:
    """Write a flat bucket's bytes to a new file in shared memory and return its path; the caller removes it.

    A file is written, not a mapping filled: where /dev/shm is small (containers), that is an error and not a SIGBUS.
    """
    size = bucket["data"].nbytes
    folder = "/dev/shm" if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > size else None
    handle, path = tempfile.mkstemp(prefix="videoseg-weights-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(memoryview(bucket["data"]).cast("B"))
    except BaseException:
        os.unlink(path)
        raise
    return path


class ReceivedWeights:
    """vLLM worker extension: what the worker's weight-transfer engine received. Called by name through `collective_rpc`."""

    def received_weights(self) -> dict:
        """`{"digests": [sha256 of every bucket], "tensors": count, "elements": count}` of the update in progress or last finished."""
        return self.weight_transfer_engine.received()

    def hash_weights(self) -> None:
        """From here to `hashed_weights`, the SHA-256 of every tensor that any backend gives to the model."""
        import torch

        model, self._hashes = self.weight_transfer_engine.model, {}
        load = model.load_weights

        def load_weights(weights):
            weights = list(weights)
            for name, tensor in weights:
                self._hashes[name] = hashlib.sha256(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()
            return load(weights)

        model.load_weights = load_weights

    def hashed_weights(self) -> dict[str, str]:
        """{name: SHA-256 (hex) of the tensor's bytes} since `hash_weights`, which this ends."""
        del self.weight_transfer_engine.model.load_weights
        return self._hashes


class TimedRayClient:
    """vLLM's `VLLMWeightSyncClient` protocol over rollout actors, with a time limit (vLLM's own Ray client waits for ever).

    For the learner's `WeightTransferTrainerFactory.trainer_init(init_info, client=..., source=...)` with `ipc` or `nccl`.
    With `nccl` every engine's workers get their own ranks (vLLM's client would give each engine the same ones): the group's
    `world_size` is 1 + actors * `workers_per_actor`. Raises `ray.exceptions.GetTimeoutError` past `timeout_seconds`.
    """

    def __init__(self, actors, timeout_seconds: float, workers_per_actor: int = 1):
        self.actors = list(actors) if isinstance(actors, (list, tuple)) else [actors]
        self.timeout_seconds = timeout_seconds
        self.workers_per_actor = workers_per_actor

    def _call(self, method: str, arguments) -> None:
        """Call `method` of all actors at once, with the i-th of `arguments` (tuples), and wait for all."""
        import ray

        calls = [getattr(actor, method).remote(*args) for actor, args in zip(self.actors, arguments)]
        ray.get(calls, timeout=self.timeout_seconds)

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        infos = [dict(init_info) for _ in self.actors]
        for i, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] += i * self.workers_per_actor
        self._call("init_weight_transfer_engine", [(WeightTransferInitRequest(init_info=info),) for info in infos])

    def start_weight_update(self) -> None:
        self._call("start_weight_update", [()] * len(self.actors))

    def update_weights(self, update_info) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._call("update_weights", [(WeightTransferUpdateRequest(update_info=update_info),)] * len(self.actors))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", [()] * len(self.actors))


def _exit_with_parent() -> None:
    """Kill this process as soon as the one that started it is gone, even by SIGKILL: no orphans."""
    import multiprocessing
    import multiprocessing.connection
    import signal

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch():
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()


def _keep_image_data() -> None:
    """Let vLLM's worker keep the pixels of images whose KV was found in the prefix cache.

    vLLM 0.32 does not send them, to save copying between processes (vllm-project/vllm#52041). Its first model runner then crashes when such a request
    is preempted and the caches are dropped (a weight update with requests in flight), because the images must be encoded
    again. In the in-process executor there is no copying to save.
    """
    from vllm.v1.core.sched import output

    output.strip_covered_mm_data = lambda mm_features, *args, **kwargs: mm_features


def register() -> None:
    """Entry point of the `vllm.general_plugins` group; safe to call more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "rollout.object_store_engine", "ObjectStoreWeightTransferEngine")
    if os.environ.get(EXIT_WITH_PARENT):
        _exit_with_parent()
    if os.environ.get(KEEP_IMAGE_DATA):
        _keep_image_data()
