"""Which process sits where: one placement group that holds the rollout engines, the segmenters and the learner's ranks.

The sizes come from the configuration, so a laptop and a node of GPUs differ in numbers only. Where weights go from learner to engine within a GPU
(`ipc`), the n-th engine and the n-th rank must share one: they sit in a bundle of a whole GPU, segmenters beside them (colocated). Else every part
has a bundle of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from learner.actor import LearnerActor
from rollout.actor import RolloutEngineActor
from segmentation_service.actor import SegmenterActor

from cluster.config import RunConfig
from cluster.errors import RunFailed
from cluster.timeline import Timeline


# The parts take turns on a CPU. Threads that spin while they wait for each other, as OpenMP's do by default, take it from the part at
# work; threads that sleep at once lose as much time by waking up. A short spin does neither: docs/grpo.md, "Shared prompts".
ENVIRONMENT = {"GOMP_SPINCOUNT": "2000"}


@dataclass(frozen=True)
class Actors:
    """Handles of all parts of a run. `new(role, number)` starts an actor in the place of one that is gone."""

    group: PlacementGroup
    new: Callable[[str, int], Any]
    engines: list[Any]
    segmenters: list[Any]
    learners: list[Any]
    processes: dict[Any, tuple[str, int]] = field(default_factory=dict)  # of an actor, by its id: node and process id

    async def find_processes(self, actors: Sequence[Any]) -> None:
        """Notes where actors run, for `kill`."""
        where = lambda actor: (ray.get_runtime_context().get_node_id(), os.getpid())
        for actor, process in zip(actors, await gather([actor.__ray_call__.remote(where) for actor in actors])):
            self.processes[actor._ray_actor_id] = process

    def kill(self, actor: Any) -> None:
        """Ends an actor at once, also one whose process is stopped or stuck, which ray.kill only asks to end itself."""
        ray.kill(actor)
        if process := self.processes.get(actor._ray_actor_id):
            node, pid = process
            _end_process.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(pid)


@ray.remote(num_cpus=0, max_retries=0)
def _end_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


ROLES = ("engine", "segmenter", "learner")


@dataclass(frozen=True)
class Seat:
    """What an actor reserves, and the bundle that it does so in."""

    role: str
    number: int
    bundle: int
    cpus: float
    gpus: float


def seats(config: RunConfig, roles: Collection[str] = ROLES) -> list[Seat]:
    """Of all actors: engines first, then segmenters, then learner ranks."""
    c, cuda = config.cluster, config.cluster.device == "cuda"
    parts = {
        "engine": (config.rollout.engines, c.cpus_per_engine, max(c.gpus_per_engine, config.rollout.tensor_parallel if config.rollout.tensor_parallel > 1 else 0)),
        "segmenter": (config.segmentation.replicas, c.cpus_per_segmenter, c.gpus_per_segmenter),
        "learner": (config.learner.ranks, c.cpus_per_learner, c.gpus_per_learner),
    }
    shared = max(config.rollout.engines, config.learner.ranks) if cuda and config.rollout.weight_sync == "ipc" else None
    found: list[Seat] = []
    for role, (count, cpus, gpus) in parts.items():
        if role in roles:
            found += [Seat(role, n, n % shared if shared else len(found) + n, cpus, gpus if cuda else 0.0) for n in range(count)]
    return found


def bundles(config: RunConfig, roles: Collection[str] = ROLES) -> list[dict[str, float]]:
    """Resources of every bundle of the placement group."""
    found: dict[int, dict[str, float]] = {}
    for seat in seats(config, roles):
        bundle = found.setdefault(seat.bundle, {"CPU": 0.0})
        bundle["CPU"] += seat.cpus
        if seat.gpus:
            bundle["GPU"] = 1.0 if config.rollout.weight_sync == "ipc" else seat.gpus
    return [found[n] for n in sorted(found)]


async def start_actors(config: RunConfig, banned_token_ids: Sequence[int], roles: Collection[str] = ROLES, timeline: Timeline | None = None) -> Actors:
    """The actors of these roles, loaded and ready; `config` is resolved and its paths can be loaded. Each one's start goes to the timeline.

    Raises `RunFailed` where the cluster has too little room or a part does not start in time.
    """
    places, wanted = {(seat.role, seat.number): seat for seat in seats(config, roles)}, bundles(config, roles)
    group = placement_group(wanted, strategy="PACK")
    limit = config.cluster.start_seconds
    try:
        await asyncio.wait_for(_result(group.ready()), limit)
    except asyncio.TimeoutError as error:
        remove_placement_group(group)
        raise RunFailed(
            f"the cluster has {ray.cluster_resources()} and cannot reserve {wanted} within {limit:.0f} s",
            "free it, or ask for fewer engines, segmenters and ranks",
        ) from error

    def options(role: str, number: int) -> dict[str, Any]:
        seat = places[role, number]
        return dict(
            num_cpus=seat.cpus,
            num_gpus=seat.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=seat.bundle),
            runtime_env={"env_vars": ENVIRONMENT},
        )

    learner_arguments = dict(
        config=config.learner,
        policy_path=config.policy.path,
        seed=config.run.seed,
        total_steps=config.loop.steps,
        temperature=config.rollout.temperature,
        banned_token_ids=banned_token_ids,
    )
    engine_options = dict(
        dtype=config.policy.dtype,
        device=config.cluster.device,
        seed=config.run.seed,
        shares_gpu_with_learner=config.rollout.weight_sync == "ipc",
    )

    def new(role: str, number: int) -> Any:
        placed = options(role, number)
        if role == "engine":
            return RolloutEngineActor.options(**placed).remote(config.policy.path, config.rollout, **engine_options)
        return SegmenterActor.options(**placed).remote(config.segmentation) if role == "segmenter" else ray.remote(LearnerActor).options(**placed).remote()

    count = Counter(role for role, _ in places)
    actors = Actors(group, new, *([new(role, number) for number in range(count[role])] for role in ROLES))
    try:
        return await asyncio.wait_for(_ready(actors, learner_arguments, timeline or Timeline(os.devnull)), limit)
    except BaseException as error:
        stop_actors(actors)
        if isinstance(error, asyncio.TimeoutError):
            raise RunFailed(f"the parts were not ready within {limit:.0f} s", "raise cluster.start_seconds, or look into Ray's logs") from error
        raise


async def _ready(actors: Actors, learner_arguments: dict[str, Any], timeline: Timeline) -> Actors:
    async def started(part: str, call: Any) -> None:
        with timeline.span(part, "start"):
            await call

    async def start_learners() -> None:
        host, port = await actors.learners[0].address.remote(learner_arguments["config"].port)
        group = dict(world_size=len(actors.learners), master_addr=host, master_port=port)
        await asyncio.gather(*(started(f"learner {n}", learner.start.remote(rank=n, **group, **learner_arguments)) for n, learner in enumerate(actors.learners)))

    # Engines are asked first, for they are ready last: the learners' address waits for a process that has imported torch.
    services = [(f"{role} {n}", actor) for role, of_role in (("engine", actors.engines), ("segmenter", actors.segmenters)) for n, actor in enumerate(of_role)]
    await asyncio.gather(*(started(part, actor.ready.remote()) for part, actor in services), start_learners())
    await actors.find_processes([*actors.engines, *actors.segmenters, *actors.learners])
    return actors


async def gather(calls: Sequence[Any]) -> list[Any]:
    """Results of remote calls, in order; the first failure is raised at once."""
    return await asyncio.gather(*(_result(call) for call in calls))


async def _result(call: Any) -> Any:
    return await call


def stop_actors(actors: Actors, engine_seconds: float = 3.0) -> None:
    """Ends every process: engines are asked first, for they have children of their own."""
    asked = [engine.shutdown.remote() for engine in actors.engines]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=engine_seconds)
    for actor in (*actors.engines, *actors.segmenters, *actors.learners):
        ray.kill(actor)
    remove_placement_group(actors.group)
