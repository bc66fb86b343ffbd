"""Weights from GPU to GPU by vLLM's own trainer-side engines: `ipc` where engine and learner share GPUs, `nccl` where not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .weights import iterate_weights, weight_metadata


def make_sender(model: nn.Module, backend: str, client: Any, rank: int, bucket_bytes: int, rendezvous: tuple[str, int, int] | None = None):
    """vLLM's trainer engine for this rank; call `send_weights()` on all ranks at the same time.

    client: vLLM's `VLLMWeightSyncClient` protocol over the rollout engines; rank 0 drives it. rendezvous: (address, port,
    world size: this sender and all engine workers), for nccl. Raises ValueError for another backend.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Gathered(WeightSource):
        """Names, dtypes and whole shapes also under ZeRO-3, whose parameters are empty until they are gathered."""

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*entry) for entry in weight_metadata(model)]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for bucket in iterate_weights(model, bucket_bytes):
                yield from bucket

    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        # Packed: unpacked handles would point to parameters that ZeRO-3 frees again.
        info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)
    elif backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address, port, world_size = rendezvous
        info = NCCLTrainerInitInfo(address, port, world_size, rank=rank, packed_buffer_size_bytes=bucket_bytes)
    else:
        raise ValueError(f"weights go by ipc or nccl on GPUs, not by {backend!r}")
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Gathered())
