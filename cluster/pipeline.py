"""Groups on their way: begun ahead of the updates that train on them, within a bound on staleness, and handed out a step's worth at a time.

With `loop.max_staleness` = S, up to S + 1 steps' groups are unfinished at a time, those that an update trains on among them. Groups are trained in the
order in which they were begun, and one that was begun under version w of the weights by the update that makes version w + S + 1 at the latest: its
oldest weights are at most S updates behind. Where late groups went before it, that update trains on a few more than its share. S = 0 is synchronous
(nothing is generated while the learner works), S = 1 one step off. Engines take new weights in the middle of generation, so the tokens of one completion
may be of several versions; each carries its own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from cluster.draws import Draw, Draws
from cluster.ledger import Final, Ledger
from cluster.scoring import ScoredGroup
from cluster.sections import LoopConfig

Begin = Callable[[list[Draw]], list[asyncio.Task]]
Arrived = Callable[[ScoredGroup], None]


class DrawsAhead:
    """Draws at positions; those that will be asked for next are decoded in the background."""

    def __init__(self, draws: Draws) -> None:
        self._draws, self._ready = draws, {}
        self._coming: asyncio.Task[list[Draw]] | None = None

    async def take(self, positions: Sequence[int], then: Sequence[int]) -> list[Draw]:
        """The draws at `positions`; `then` says which positions are likely to come after them."""
        if self._coming:
            self._ready |= {draw.position: draw for draw in await self._coming}
            self._coming = None
        missing = [p for p in positions if p not in self._ready]
        if missing:
            self._ready |= {draw.position: draw for draw in await asyncio.to_thread(self._draws.batch, missing)}
        taken = [self._ready.pop(p) for p in positions]
        if ahead := [p for p in then if p not in self._ready]:
            self._coming = asyncio.create_task(asyncio.to_thread(self._draws.batch, ahead))
        return taken

    def close(self) -> None:
        if self._coming:
            self._coming.cancel()


@dataclass(frozen=True, eq=False)
class Flying:
    """A group begun under `version` of the weights; `task` ends with its scores. One is equal to itself alone."""

    draw: Draw
    version: int
    task: asyncio.Task[ScoredGroup]

    def dropped(self, reason: str) -> Final:
        self.task.cancel()
        return Final(self.draw.position, self.draw.episode.episode_id, reason)


@dataclass
class Taken:
    """What an update gets: its groups in the order of their positions, those that could not be scored among them; and those dropped on the way."""

    groups: list[ScoredGroup] = field(default_factory=list)
    dropped: list[Final] = field(default_factory=list)


class Pipeline:
    """`begin` starts to answer and score draws: one task each, which ends with a ScoredGroup. `steps` is the number of updates of the whole run."""

    def __init__(self, loop: LoopConfig, per_step: int, ledger: Ledger, draws: DrawsAhead, begin: Begin) -> None:
        self.loop, self.per_step, self.ledger, self.draws, self.begin = loop, per_step, ledger, draws, begin
        self.flying: list[Flying] = []  # oldest first

    async def take(self, version: int, arrived: Arrived | None = None) -> Taken:
        """The groups of the update that makes `version` + 1, as soon as so many as `loop.wait_for` says are scored. May be abandoned at any time.

        Groups whose rewards are all equal are replaced, up to `loop.max_refills` of them. `arrived` is called while others are waited for, with groups that
        will certainly be among those taken.
        """
        taken, refills = Taken(), 0
        while (missing := self.per_step - len(taken.groups)) > 0:
            await self._fill(version, min(self.loop.max_staleness + 1, self.loop.steps - version), len(taken.groups))
            mine = self.flying[: max(missing, sum(version - f.version >= self.loop.max_staleness for f in self.flying))]
            async for group in _enough(mine, math.ceil(self.loop.wait_for * len(mine))):
                if arrived and not (self.loop.max_refills and says_nothing(group)):
                    arrived(group)
            on_time, late = [f for f in mine if f.task.done()], [f for f in mine if not f.task.done()]
            replaced = [f for f in on_time if says_nothing(f.task.result())][: self.loop.max_refills - refills]
            gone = [f for f in late if not self._may_wait(f, version)]
            used, finished = set(on_time) - set(replaced), {*on_time, *gone}
            taken.groups += [f.task.result() for f in on_time if f in used]
            taken.dropped += [f.dropped("zero variance") for f in replaced] + [f.dropped("late") for f in gone]
            self.flying = [f for f in self.flying if f not in finished]
            refills += len(replaced)
            if not replaced:
                break
        await self._fill(version, min(self.loop.max_staleness, self.loop.steps - version - 1))
        taken.groups.sort(key=lambda group: group.draw.position)
        return taken

    async def _fill(self, version: int, updates: int, taken: int = 0) -> None:
        """Begins groups until there are enough on their way for so many updates, of which so many groups are there."""
        if (missing := updates * self.per_step - taken - len(self.flying)) > 0:
            positions = self.ledger.begin(missing)
            draws = await self.draws.take(positions, self.ledger.upcoming(self.per_step))
            self.flying += [Flying(draw, version, task) for draw, task in zip(draws, self.begin(draws), strict=True)]

    def _may_wait(self, late: Flying, version: int) -> bool:
        """Whether a late group may be of the next update."""
        return self.loop.late_groups == "next_step" and version + 1 - late.version <= self.loop.max_staleness

    def close(self) -> None:
        """Ends the groups on their way. They stay unfinished in the ledger."""
        for f in self.flying:
            f.task.cancel()
        self.draws.close()


def says_nothing(group: ScoredGroup) -> bool:
    """All completions earned exactly the same."""
    return group.failure is None and min(group.rewards) == max(group.rewards)


async def _enough(flying: Iterable[Flying], count: int) -> AsyncIterator[ScoredGroup]:
    """The first `count` that are done, as they come; raises what the first of them that failed raised."""
    for done in islice(asyncio.as_completed([f.task for f in flying]), count):
        yield await done
