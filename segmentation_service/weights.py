"""Reads files of weights, without running what a file may hold, and tells what of them does not fit a network."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError

NAMED_AT_MOST = 3


def read_weights(path: str | Path, kind: str, remedy: str) -> dict[str, Any]:
    """What a `.pth`, `.pt` or `.safetensors` file holds, on the CPU. A pickle that is more than tensors in containers is refused.

    kind: of whom the weights should be, for messages. Raises CheckpointError where the file is missing, unreadable, or no mapping.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{kind} checkpoint {path} is a folder" if file.is_dir() else f"{kind} checkpoint {path} does not exist", remedy)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"{kind} checkpoint {path} cannot be read ({' '.join(str(error).split())[:300]})", "restore or re-download it") from error
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{kind} checkpoint {path} holds a {type(weights).__name__}, not a state dict", remedy)
    return dict(weights)


def misfit(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """What keeps `weights` from being a state dict like `expected`, the first keys of each fault named; empty if nothing does."""
    return faults(
        {
            "missing": [key for key in expected if key not in weights],
            "unexpected": [key for key in weights if key not in expected],
            "mis-shaped": [
                f"{key} {list(weights[key].shape)} for {list(tensor.shape)}"
                for key, tensor in expected.items()
                if key in weights and weights[key].shape != tensor.shape
            ],
        }
    )


def faults(keys_of: Mapping[str, list[str]]) -> str:
    """Fault -> keys, as one line: "2 missing keys (a, b); 1 unexpected keys (c)"."""
    return "; ".join(
        f"{len(keys)} {fault} keys ({', '.join(keys[:NAMED_AT_MOST])}{', …' if len(keys) > NAMED_AT_MOST else ''})" for fault, keys in keys_of.items() if keys
    )
