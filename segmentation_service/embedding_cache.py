"""Image embeddings kept for the next request about the same frame: the least recently used go first, bounded in bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


class EmbeddingCache:
    """Embeddings by key. What alone is larger than `max_bytes` is not kept. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = self.evictions = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any | None:
        if key not in self._kept:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, embedding: Any) -> None:
        _, before = self._kept.pop(key, (None, 0))
        self.bytes -= before
        size = bytes_of(embedding)
        if size > self.max_bytes:
            return
        while self.bytes + size > self.max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self.bytes -= freed
            self.evictions += 1
        self._kept[key] = embedding, size
        self.bytes += size

    def stats(self) -> dict[str, int]:
        return {"cache_hits": self.hits, "cache_misses": self.misses, "cache_bytes": self.bytes, "cache_evictions": self.evictions}


def bytes_of(embedding: Any) -> int:
    """Bytes of all tensors and arrays in dataclasses, mappings and sequences."""
    if hasattr(embedding, "nbytes"):
        return int(embedding.nbytes)
    if is_dataclass(embedding):
        return sum(bytes_of(getattr(embedding, f.name)) for f in fields(embedding))
    if isinstance(embedding, Mapping):
        return sum(map(bytes_of, embedding.values()))
    if isinstance(embedding, (tuple, list)):
        return sum(map(bytes_of, embedding))
    return 0


def fingerprint(backend: Any) -> str:
    """Of a SAM2 backend: its program, precision and weights. The same weights give the same, wherever they were loaded from."""
    import torch

    digest = hashlib.blake2b(f"{type(backend).__name__} {backend.device} {backend.dtype}".encode(), digest_size=16)
    for name, tensor in backend.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
