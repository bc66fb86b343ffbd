"""`videoseg plan`: which process would sit where, what memory it would take there, and what does not fit, before anything starts.

Seats are those of `cluster.placement`, given to GPUs in its order. Memory is an estimate: weights, gradients, optimizer and KV caches are counted from the policy's configuration,
activations by the formula of `activation_bytes`, and what a process takes besides is what such processes took on a CPU (`BASE_GIB`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from cluster.config import RunConfig
from cluster.config_resolve import GIB, Hardware
from cluster.placement import Seat, bundles, seats
from cluster.policy_size import PolicySize

ROLES = ("engine", "segmenter", "learner", "controller")
BASE_GIB = {"engine": 3.0, "segmenter": 1.0, "learner": 1.0, "controller": 1.5, "decoder": 0.3}
"""RAM of a process with its libraries and nothing else; an engine has two processes."""
CUDA_CONTEXT_GIB = 0.6
SEGMENTER_GIB = 3.0
"""SAM2.1-large in float32 with the features of one 1024x1024 frame and 64 prompts, and XMem's memory of a video: 0.9 + 0.3 for weights, the rest an estimate."""


@dataclass
class Part:
    """One process and its memory in bytes, by what it is for. `gpu` is None on a CPU, where `memory` is RAM."""

    role: str
    number: int
    node: int
    gpu: int | None
    cpus: float
    gpus: float
    memory: dict[str, float] = field(default_factory=dict)
    ram: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.role} {self.number}"

    @property
    def total(self) -> float:
        return sum(self.memory.values())


@dataclass
class Plan:
    parts: list[Part]
    problems: list[str]
    notes: list[str]

    def lines(self) -> Iterator[str]:
        """A table, processes that differ in their GPU alone on one line."""
        yield f"{'process':<16} {'where':<18} {'CPUs':>5} {'GPUs':>5}  {'memory':>9}  of which"
        alike = lambda part: (part.role, part.node, part.gpu is None, part.cpus, part.gpus, part.total)
        for _, group in groupby(sorted(self.parts, key=lambda part: (ROLES.index(part.role), part.number)), key=alike):
            first, *rest = group
            last = rest[-1] if rest else first
            numbers = "" if first.role == "controller" else f" {first.number}" + (f" to {last.number}" if rest else "")
            gpus = "" if first.gpu is None else f", GPU {first.gpu}" + (f" to {last.gpu}" if last.gpu != first.gpu else "")
            most = ", ".join(f"{name} {gib(size)}" for name, size in sorted(first.memory.items(), key=lambda m: -m[1]) if size >= 0.05 * GIB)
            each = " each" if rest else ""
            yield f"{first.role + numbers:<16} {f'node {first.node}' + gpus:<18} {first.cpus:>5g} {first.gpus:>5g}  {gib(first.total):>9}{each}  {most}"
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"DOES NOT FIT: {problem}" for problem in self.problems)


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def plan(config: RunConfig, node: Hardware, nodes: int = 1) -> Plan:
    """The resolved `config` on `nodes` nodes like `node`."""
    size, cuda = PolicySize.of(config.policy.path), config.cluster.device == "cuda"
    places, homeless = sit(config, node, nodes)
    parts, problems, notes = [], [f"{role} {number}: no node has {resources} left" for role, number, resources in homeless], []
    for seat, (where, gpu) in places.items():
        memory = {"engine": engine_memory, "segmenter": segmenter_memory, "learner": learner_memory}[seat.role](config, size, node)
        ram = BASE_GIB[seat.role] * GIB
        if seat.role == "learner" and config.learner.offload != "none":
            ram += offloaded(config, size)
        parts.append(Part(seat.role, seat.number, where, gpu, seat.cpus, seat.gpus, memory if cuda else memory | {"process": ram}, ram if cuda else sum(memory.values()) + ram))
    decoding = config.data.decoders * BASE_GIB["decoder"] * GIB + config.data.frame_cache_gb * GIB
    controller = {"process": BASE_GIB["controller"] * GIB, "decoders": decoding, "object store": config.cluster.object_store_gb * GIB}
    parts.append(Part("controller", 0, 0, None, 0, 0, controller, sum(controller.values())))
    for where in range(nodes):
        ram = sum(part.ram for part in parts if part.node == where)
        if ram > 0.95 * node.ram_gib * GIB:
            problems.append(f"node {where}: its processes take {gib(ram)} of RAM, it has {node.ram_gib:g} GiB")
    if cuda:
        problems += gpu_problems(config, parts, node)
        notes += kv_notes(config, size, node)
    notes.append(f"the policy has {size.parameters / 1e9:.2f} billion parameters; a checkpoint takes {gib(checkpoint_bytes(config, size))}, {config.loop.keep_checkpoints} are kept: run.dir needs {gib(checkpoint_bytes(config, size) * (config.loop.keep_checkpoints + 1))}")
    return Plan(parts, problems, notes)


def sit(config: RunConfig, node: Hardware, nodes: int) -> tuple[dict[Seat, tuple[int, int | None]], list[tuple]]:
    """(node, GPU) of each seat, and (role, number, resources) of those without. A bundle goes to the first node with room, as Ray's PACK would have it."""
    cpus = [float(node.cores)] * nodes
    free = [[1.0] * node.cuda_devices for _ in range(nodes)]
    places, homeless = {}, []
    members = defaultdict(list)
    for seat in seats(config):
        members[seat.bundle].append(seat)
    for number, resources in enumerate(bundles(config)):
        wanted = resources.get("GPU", 0.0)
        for where in range(nodes):
            fits = [g for g, left in enumerate(free[where]) if left >= min(wanted, 1.0) - 1e-9]
            # Ray takes the fullest GPU that a fraction fits, and whole ones for a whole number.
            fits = sorted(fits, key=lambda g: free[where][g])[:1] if wanted < 1 else [g for g in fits if free[where][g] > 1 - 1e-9][: math.ceil(wanted)]
            if cpus[where] >= resources["CPU"] - 1e-9 and len(fits) >= math.ceil(wanted):
                cpus[where] -= resources["CPU"]
                for g in fits:
                    free[where][g] -= min(wanted, 1.0)
                places |= {seat: (where, fits[0] if fits else None) for seat in members[number]}
                break
        else:
            homeless += [(seat.role, seat.number, resources) for seat in members[number]]
    return places, homeless


def number_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def engine_memory(config: RunConfig, size: PolicySize, node: Hardware) -> dict[str, float]:
    """Of one GPU of an engine: vLLM takes its whole share at once, and what weights and a forward pass leave of it is KV cache."""
    rollout, each = config.rollout, number_bytes(config.policy.dtype)
    weights = each * size.parameters / rollout.tensor_parallel
    if config.cluster.device == "cpu":
        return {"weights": weights, "KV cache": (rollout.kv_cache_gb or 1.0) * GIB}
    forward = each * rollout.max_batched_tokens * (10 * size.width + 3 * size.inner_width) / rollout.tensor_parallel
    share = rollout.gpu_memory_utilization * node.cuda_memory_gib * GIB
    cache = (rollout.kv_cache_gb * GIB) if rollout.kv_cache_gb else share - weights - forward
    return {"weights": weights, "forward pass": forward, "KV cache": max(cache, 0.0)}


def segmenter_memory(config: RunConfig, size: PolicySize, node: Hardware) -> dict[str, float]:
    return {"SAM2 and XMem": SEGMENTER_GIB * GIB * (1.0 if config.cluster.device == "cuda" else 0.3)}


def trained(config: RunConfig, size: PolicySize) -> float:
    """Parameters that learn: all but frozen parts, or adapters on the decoder's linear layers."""
    learn = config.learner
    if learn.lora_rank:  # two thin matrices, rank x (in + out), for each target
        w, kv, inner = size.width, size.kv_width // 2, size.inner_width
        sides = {"q_proj": 2 * w, "k_proj": w + kv, "v_proj": w + kv, "o_proj": 2 * w, "gate_proj": w + inner, "up_proj": w + inner, "down_proj": w + inner}
        return learn.lora_rank * size.layers * sum(sides.get(target, 2 * w) for target in learn.lora_targets)
    return size.parameters - (size.vision if learn.vision_lr == 0 and learn.projector_lr == 0 else 0)


def learner_memory(config: RunConfig, size: PolicySize, node: Hardware) -> dict[str, float]:
    """Of one rank. ZeRO 1 shards the optimizer, 2 the gradients, 3 the weights (arXiv:1910.02054); gradients add up in float32."""
    learn, each, count = config.learner, number_bytes(config.learner.dtype), trained(config, size)
    over = lambda stage: config.learner.ranks if learn.zero_stage >= stage else 1
    memory = {"weights": each * size.parameters / over(3), "gradients": 4 * count / over(2)}
    if learn.offload == "none":
        memory["optimizer"] = (8 + (4 if each == 2 else 0)) * count / over(1)
    if learn.offload == "all":
        memory["weights"] = 2 * each * size.parameters / size.layers
    if learn.kl_coef > 0 and not learn.lora_rank:
        memory["reference"] = each * size.parameters / over(3)
    memory["activations"] = activation_bytes(config, size)
    return memory


def offloaded(config: RunConfig, size: PolicySize) -> float:
    """RAM of one rank for what its GPU does not hold."""
    learn, each = config.learner, number_bytes(config.learner.dtype)
    weights = each * size.parameters / learn.ranks if learn.offload == "all" else 0.0
    return 16 * trained(config, size) / learn.ranks + weights


def activation_bytes(config: RunConfig, size: PolicySize) -> float:
    """What a micro-batch of `learner.tokens_per_microbatch` keeps for its backward pass: about ten vectors of the model's width and three of the inner width a token
    and layer; with gradient checkpointing one vector a layer, and one layer whole. And logits of a chunk, three times."""
    learn, each = config.learner, number_bytes(config.learner.dtype)
    layer = 10 * size.width + 3 * size.inner_width
    kept = size.layers * size.width + layer if learn.gradient_checkpointing else size.layers * layer
    return each * learn.tokens_per_microbatch * kept + 3 * 4 * learn.logprob_chunk_tokens * size.vocabulary


def checkpoint_bytes(config: RunConfig, size: PolicySize) -> float:
    """Two moments and float32 weights; and bfloat16 ones, which ZeRO 3 leaves out."""
    as_trained = 2 if number_bytes(config.learner.dtype) == 2 and config.learner.zero_stage < 3 else 0
    return (12 + as_trained) * trained(config, size)


def gpu_problems(config: RunConfig, parts: list[Part], node: Hardware) -> list[str]:
    """GPUs whose processes take more than there is. An engine that sleeps takes nothing while the learner works."""
    found, on = [], defaultdict(list)
    for part in parts:
        if part.gpu is not None:
            on[part.node, part.gpu].append(part)
    for (where, gpu), here in sorted(on.items()):
        of = lambda role: sum(p.total + CUDA_CONTEXT_GIB * GIB for p in here if p.role == role)
        peak = max(of("engine"), of("learner")) + of("segmenter") if config.rollout.sleep else of("engine") + of("learner") + of("segmenter")
        if peak > node.cuda_memory_gib * GIB:
            largest = max(((p.name, name, size) for p in here for name, size in p.memory.items()), key=lambda x: x[2])
            remedy = "" if config.rollout.sleep or not (of("engine") and of("learner")) else "; rollout.sleep=true lets engine and learner take turns"
            found.append(f"node {where}, GPU {gpu}: {', '.join(p.name for p in here)} take {gib(peak)}, it has {node.cuda_memory_gib:g} GiB; the largest part is {largest[0]}'s {largest[1]}, {gib(largest[2])}{remedy}")
    return found[:3] + ([f"and {len(found) - 3} more GPUs in the same way"] if len(found) > 3 else [])


def kv_notes(config: RunConfig, size: PolicySize, node: Hardware) -> list[str]:
    rollout = config.rollout
    room = engine_memory(config, size, node)["KV cache"]
    tokens = room / (number_bytes(config.policy.dtype) * size.layers * size.kv_width / rollout.tensor_parallel)
    longest = tokens / rollout.max_model_len
    return [f"an engine's KV cache holds {tokens:,.0f} tokens: {longest:.1f} sequences of rollout.max_model_len={rollout.max_model_len}"] + (
        ["that is less than one: lower rollout.max_model_len, or raise rollout.gpu_memory_utilization or rollout.tensor_parallel"] if longest < 1 else []
    )
