"""Where the service's networks run, and in which precision."""

from __future__ import annotations

import torch


def resolve_device(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """Names of device and dtype with "auto" resolved: CUDA where this process sees a GPU, and bfloat16 on CUDA only."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("segmentation.device is cuda, but this process sees no CUDA GPU; use auto or cpu, or give the replica a GPU")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Layers that gain by it run in `dtype`, weights stay as they are; float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
