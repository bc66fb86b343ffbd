"""Weights from GPU to GPU by vLLM's own trainer-side engines: `ipc` where engine and learner share GPUs, `nccl` where not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .weights import bytes_of, iterate_weights, weight_metadata


class Sender:
    """A rank's end of the transfer: vLLM's trainer engine (`make_sender`), and what it is given to send."""

    def __init__(self, model: nn.Module, bucket_bytes: int) -> None:
        self.model, self.bucket_bytes, self.engine = model, bucket_bytes, None
        self.hashes: dict[str, str] | None = None

    def send_weights(self, hashed: bool = False) -> dict[str, str]:
        """On all ranks at the same time. `hashed`: {name in the checkpoint: SHA-256 (hex) of the tensor's bytes}, else {}."""
        self.hashes = {} if hashed else None
        self.engine.send_weights()
        return self.hashes or {}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor), hashed where `send_weights` was asked to."""
        for bucket in iterate_weights(self.model, self.bucket_bytes):
            for name, tensor in bucket:
                if self.hashes is not None:
                    self.hashes[name] = hashlib.sha256(bytes_of(tensor).numpy()).hexdigest()
                yield name, tensor


def make_sender(model: nn.Module, backend: str, client: Any, rank: int, bucket_bytes: int, rendezvous: tuple[str, int, int] | None = None) -> Sender:
    """This rank's sender, joined to the engines.

    client: vLLM's `VLLMWeightSyncClient` protocol over the rollout engines; rank 0 drives it. rendezvous: (address, port,
    world size: this sender and all engine workers), for nccl. Raises ValueError for another backend.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    sender = Sender(model, bucket_bytes)

    class Gathered(WeightSource):
        """Names, dtypes and whole shapes also under ZeRO-3, whose parameters are empty until they are gathered."""

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*entry) for entry in weight_metadata(model)]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return sender.weights()

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
    sender.engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=Gathered())
    return sender
