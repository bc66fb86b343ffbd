"""Some steps of `videoseg train` with all parts on one GPU: what a step takes, by stage, and how much memory is in use meanwhile."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil

import random_models
from memory import used_gib
from cluster import config, config_resolve
from cluster.metrics import read_metrics
from cluster.plan import plan
from cluster.timeline import spans

HERE = Path(__file__).resolve().parent
RECIPES = {size: str(HERE / f"{size}.yaml") for size in ("toy", "full")}
LEARNERS = {"whole": [], "optimizer in RAM": ["learner.offload=optimizer"], "adapters": ["learner.lora_rank=64"]}
"""How the policy learns, in the order in which they are tried where there is room."""
NEEDED = ("vllm", "ray", "deepspeed")
WANTED = ("seconds/", "tokens/", "length/response", "learner/seconds", "learner/tflops_per_second", "learner/mfu", "learner/response_tokens_per_second", "mismatch/", "sync/", "reward/mean")
STOPPING_SECONDS = 30.0


def loop(size: str, device: str, policy: Path, folder: Path, steps: int, seconds: float) -> Iterator[tuple[str, object]]:
    """Up to `steps` steps, fewer where `seconds` end before. Raises RuntimeError where there is none."""
    for package in NEEDED:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"no package {package}", name=package)
    deadline, hardware = time.monotonic() + seconds - STOPPING_SECONDS, config_resolve.detect_hardware()
    data, sam2 = random_models.episodes(size, folder), random_models.sam2_folder(size, folder)
    asked = [f"policy.path={policy}", f"segmentation.checkpoint={sam2}", f"data.train={data / 'train'}", f"data.evaluation={data / 'valid_u'}", f"run.dir={folder}", f"cluster.device={device}"]
    refused = {}
    for name, ours in LEARNERS.items():
        refused[name] = no_room([*asked, *ours], RECIPES[size], hardware)
        if not refused[name]:
            try:
                yield from ({"learner": name} | run([RECIPES[size], *asked, *ours], folder / name.replace(" ", "-"), device, steps, deadline)).items()
                return
            except RuntimeError as error:
                refused[name] = [str(error)]
        yield "refused", refused
        if time.monotonic() > deadline:
            break
    raise RuntimeError(f"no step; refused: {', '.join(refused)}")


def no_room(asked: list[str], recipe: str, hardware: config_resolve.Hardware) -> list[str]:
    """Why this machine is too small; all parts are awake at once while a run starts."""
    planned = plan(config_resolve.resolve(config.load(recipe, asked), hardware), hardware)
    taken = sum(part.total for part in planned.parts if part.gpu is not None) / config_resolve.GIB
    return planned.problems + ([f"all parts take {taken:.0f} GiB, the GPU has {hardware.cuda_memory_gib:g}"] if taken > hardware.cuda_memory_gib else [])


def run(arguments: list[str], folder: Path, device: str, steps: int, deadline: float) -> dict:
    """A run in `folder` that is ended, without a checkpoint, when it has made its steps or it is `deadline`."""
    log, start, memory = folder.with_suffix(".log"), time.monotonic(), []
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONWARNINGS": "ignore"}
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "train", *arguments, f"run.dir={folder.parent}", f"run.name={folder.name}"], stdout=out, stderr=out, env=environment, cwd=HERE.parents[1]
        )
    first = None
    try:
        while process.poll() is None and len(done := steps_of(folder)) < steps and time.monotonic() < deadline:
            first = first or (done and time.monotonic() - start)
            memory.append((time.time(), used_gib(device, process.pid)))
            time.sleep(0.5)
    finally:
        stop(process)
    done = steps_of(folder)
    if not done or len(done) < steps and time.monotonic() < deadline:
        raise RuntimeError(f"{len(done)} of {steps} steps within {time.monotonic() - start:.0f} s; its last words: {log.read_text()[-1500:]}")
    counted = done[2:] or done[1:] or done  # the first two warm up
    names = [name for name in counted[-1] if name.startswith(WANTED)]
    return {
        "steps": len(done), "seconds_to_first_step": round(first or time.monotonic() - start, 1), "steps_counted": len(counted),
        "per_step": {name: float(f"{statistics.median(values):.5g}") for name in names if (values := [r[name] for r in counted if r.get(name) is not None])},
        "seconds_of_each_step": [round(r["seconds/step"], 2) for r in done],
        "memory_gib": by_stage(memory, folder),
    }  # fmt: skip


def steps_of(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [record for record in read_metrics(file) if "seconds/step" in record] if file.exists() else []


def stop(process: subprocess.Popen) -> None:
    """Ctrl-C twice ends a run at once; whatever is left of it after that is killed."""
    with suppress(psutil.Error):
        left = psutil.Process(process.pid).children(recursive=True)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOPPING_SECONDS / 3)
        process.kill()
        for one in left:
            with suppress(psutil.Error):
                one.kill()
    process.wait()


def by_stage(memory: list[tuple[float, float]], folder: Path) -> dict[str, float]:
    """The most that was in use in each stage of the loop, and before the first."""
    stages = [s for s in spans(folder / "trace.json") if s.track == "loop"]
    most: dict[str, float] = {}
    for at, gib in memory:
        here = [s.name for s in stages if s.begin <= at <= s.end] or (["start"] if stages and at < stages[0].begin else [])
        for name in here:
            most[name] = max(most.get(name, 0.0), gib)
    return most
