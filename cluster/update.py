"""One update of the policy: advantages from rewards, and the learner's step on the samples that have them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import ray

from learner.advantages import step_advantages
from learner.batch import Sample
from learner.config import LearnerConfig
from learner.schedule import unit_tokens

from cluster.placement import gather
from cluster.timeline import Timeline

T = TypeVar("T")


class Arrivals:
    """Groups whose gradients the learners begin with while others are still on their way, a micro-batch for every rank at a time.

    `begun`: their numbers. Needs advantages that follow from a group alone, and one update a step. `learning` waits for what learners were asked, and raises
    where one is lost.
    """

    def __init__(self, learners: Sequence[Any], config: LearnerConfig, timeline: Timeline, learning: Callable[[Awaitable], Awaitable]) -> None:
        self.begun: set[int] = set()
        self._learners, self._config, self._timeline, self._learning = learners, config, timeline, learning
        self._failed = asyncio.Event()
        self._waiting: list[list[Sample]] = []
        self._calls: list[asyncio.Task] = []

    def add(self, group: Sequence[Sample], rewards: Sequence[float]) -> None:
        self._waiting.append(with_advantages([group], step_advantages(self._config, np.array([rewards]))))
        if sum(unit_tokens([s.size for s in samples]) for samples in self._waiting) >= self._config.tokens_per_microbatch * self._config.ranks:
            self.begun |= {samples[0].group for samples in self._waiting}
            samples = ray.put([s for samples in self._waiting for s in samples])
            self._calls.append(asyncio.ensure_future(self._finished([learner.accumulate.remote(samples) for learner in self._learners], len(self._waiting))))
            self._waiting = []

    async def done(self) -> None:
        """Raises what a learner raised."""
        await asyncio.gather(*self._calls)

    async def unless_lost(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is abandoned as soon as a learner fails: then raises what that raised."""
        working, failed = asyncio.ensure_future(work), asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait({working, failed}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                await self.done()
            return await working
        finally:
            working.cancel()
            failed.cancel()

    def close(self) -> None:
        for call in self._calls:
            call.cancel()

    async def _finished(self, calls: list, groups: int) -> None:
        try:
            with self._timeline.span("learner", "accumulate", groups=groups):
                await self._learning(gather(calls))
        except Exception:
            self._failed.set()
            raise


async def update(
    learners: Sequence[Any], config: LearnerConfig, rewards_BG: np.ndarray, groups: Sequence[Sequence[Sample]], arrivals: Arrivals | None = None
) -> tuple[list[list], dict[str, float]]:
    """(advantages of each group's samples, the learner's metrics). Whatever advantages the samples have are replaced. The learners have begun with `arrivals`."""
    kls = await _reference_kls(learners, groups) if config.kl_in_reward else None
    advantages = step_advantages(config, rewards_BG, kls)
    begun = arrivals.begun if arrivals else ()
    samples = ray.put([s for s in with_advantages(groups, advantages) if s.group not in begun])
    if arrivals:
        await arrivals.done()
    learned = (await gather([learner.train_step.remote(samples) for learner in learners]))[0]
    return advantages, learned | ({"kl": float(np.concatenate(kls).mean())} if kls else {})


def with_advantages(groups: Sequence[Sequence[Sample]], advantages: Sequence[Sequence]) -> list[Sample]:
    return [replace(s, advantage=a) for group, own in zip(groups, advantages, strict=True) for s, a in zip(group, own, strict=True)]


async def _reference_kls(learners: Sequence[Any], groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
    """Per-token KL to the reference of every completion, for the reward."""
    samples = ray.put([s for group in groups for s in group])
    found = (await gather([learner.reference_kl.remote(samples) for learner in learners]))[0]
    return [kl.copy() for kl in found]  # what comes out of Ray's object store cannot be written to, of which torch warns
