"""Weights out of the learner: names as published checkpoints have them, gathered from ZeRO's shards in buckets of bounded size."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .lora import adapted_layers, low_rank_parts, merged

ALIGNMENT = 16


@dataclass(frozen=True)
class WeightEntry:
    """Where one tensor lies in a bucket: dtype as torch names it ("bfloat16"), offset in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class WeightBucket:
    """Some weights as one flat uint8 array. On ranks other than 0 `data` and `sha256` are None.

    Rank 0 of the learner sends; the others take part because gathering is a collective under ZeRO-3.
    """

    entries: tuple[WeightEntry, ...]
    nbytes: int
    data: np.ndarray | None
    sha256: str | None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) views into `data`, without a copy: do not write to them."""
        with warnings.catch_warnings():
            # What comes out of Ray's object store cannot be written to, of which torch warns.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(self.data)
        for e in self.entries:
            dtype = getattr(torch, e.dtype)
            size = int(np.prod(e.shape, dtype=np.int64)) * dtype.itemsize
            yield e.name, flat[e.offset : e.offset + size].view(dtype).view(e.shape)


def checkpoint_names(model: nn.Module) -> dict[str, str]:
    """Parameter name in `model` (a transformers model) -> name in a published checkpoint, by transformers' own mapping.

    vLLM's Qwen-VL loaders take these names. A tied language head has no entry: it is the embedding. Adapters have none either: they
    are part of the weight that they adapt. Raises ValueError if the checkpoint format needs more than renaming.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = {}
    for name, _ in model.named_parameters():
        if ".lora_" in name:
            continue
        renamed = list(revert_weight_conversion(model, {name.replace(".base_layer.", "."): torch.empty(0)}))
        if len(renamed) != 1:
            raise ValueError(f"parameter {name} is stored as {renamed} in checkpoints; only renaming is supported")
        names[name] = renamed[0]
    return names


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The whole shape, also while ZeRO-3 holds a shard of it (whose own shape is (0,))."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def plan_buckets(shapes: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], max_bytes: int) -> list[tuple[list[WeightEntry], int]]:
    """Deal (name, dtype, shape) out, in order, to buckets of at most `max_bytes` -> (entries, bytes of the bucket).

    A tensor larger than that gets a bucket of its own: vLLM loads whole tensors. Offsets are multiples of 16.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes = {max_bytes}; a bucket needs at least one byte")
    buckets: list[tuple[list[WeightEntry], int]] = []
    entries, used = [], 0
    for name, dtype, shape in shapes:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if entries and used + size > max_bytes:
            buckets.append((entries, used))
            entries, used = [], 0
        entries.append(WeightEntry(name, str(dtype).removeprefix("torch."), tuple(shape), used))
        used += -(-size // ALIGNMENT) * ALIGNMENT
    return [*buckets, (entries, used)] if entries else buckets


def weight_metadata(model: nn.Module) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(checkpoint name, dtype, whole shape) of every parameter, in the order in which `iterate_weights` gives them."""
    parameters = dict(model.named_parameters())
    return [(stored, parameters[name].dtype, full_shape(parameters[name])) for name, stored in checkpoint_names(model).items()]


def iterate_weights(model: nn.Module, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Lists of (checkpoint name, whole tensor on its device), a bucket at a time; every rank must iterate in lockstep.

    The tensors are valid until the next bucket is asked for. Under ZeRO-3 a bucket is gathered, then given back. Adapters are merged.
    """
    parameters, layers = dict(model.named_parameters()), adapted_layers(model)
    own_names = {stored: name for name, stored in checkpoint_names(model).items()}
    for entries, _ in plan_buckets(weight_metadata(model), bucket_bytes):
        names = [own_names[e.name] for e in entries]
        needed = [parameters[name] for name in names] + [part for name in names if name in layers for part in low_rank_parts(layers[name])]
        with gathered(needed):
            yield [(e.name, merged(layers[name]) if name in layers else parameters[name].detach()) for e, name in zip(entries, names)]


def gathered(parameters: Sequence[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """Inside, the whole parameters, also under ZeRO-3; what rank `modifier_rank` writes to them there goes to all."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank)


def bytes_of(tensor: Tensor) -> Tensor:
    """Flat uint8 on the CPU."""
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8)


def weight_buckets(model: nn.Module, max_bytes: int, rank: int = 0) -> Iterator[WeightBucket]:
    """All weights as `WeightBucket`s; every rank must consume its own iterator to the end, in lockstep under ZeRO-3."""
    plan = plan_buckets(weight_metadata(model), max_bytes)
    for (entries, nbytes), tensors in zip(plan, iterate_weights(model, max_bytes), strict=True):
        if rank != 0:
            yield WeightBucket(tuple(entries), nbytes, None, None)
            continue
        data = np.zeros(nbytes, np.uint8)
        flat = torch.from_numpy(data)
        for entry, (_, tensor) in zip(entries, tensors, strict=True):
            raw = bytes_of(tensor)
            flat[entry.offset : entry.offset + raw.numel()] = raw
        yield WeightBucket(tuple(entries), nbytes, data, hashlib.sha256(data).hexdigest())
