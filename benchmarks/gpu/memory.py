"""Memory in use on the device, by whomever, and by the tensors of this process."""

from __future__ import annotations

import subprocess

import torch

from side_by_side import memory_gib


def used_gib(device: str, pid: int | None = None) -> float:
    """In use on the GPU, by whomever; on a CPU the memory of a process (by default this one) and all that it started."""
    if device == "cuda":
        said = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True).stdout
        return round(float(said.split()[0]) / 1024, 2)
    return round(memory_gib(pid), 2)


def peak(device: str) -> dict[str, float]:
    """Largest memory of tensors on a GPU since the last call; what is cached and free goes back."""
    if device == "cpu":
        return {}
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {"gpu_gib": round(most, 2)}
