"""Actors of one kind that can do each other's work; one that died or hangs is killed and started again.

A call goes to the replica of its number, or, while that one is down, to another. What a lost replica was at work on is asked of another one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError

from rollout.engine import EngineBroken

from cluster.errors import PartLost, RunFailed
from cluster.timeline import Timeline

T = TypeVar("T")
LOST = (RayActorError, EngineBroken, asyncio.TimeoutError)
WAITS = 20  # of equal length, until a replica that stays silent counts as hung


class Replicas:
    """`actors` are ready; the list is kept up to date. `kill` ends one that is lost, `start(number)` gives another, ready, in its place, `join` gets it before its
    first call. A replica of which nothing is heard for `seconds`, though calls wait for it, is taken for hung. After `restarts` losses the next one ends the run; whoever
    sees it make progress sets `losses` back to 0."""

    def __init__(
        self,
        what: str,
        actors: list[Any],
        kill: Callable[[Any], None],
        start: Callable[[int], Awaitable[Any]],
        join: Callable[[Any], Awaitable[None]] | None,
        seconds: float,
        restarts: int,
        note: Callable[[str], None],
        timeline: Timeline,
    ) -> None:
        self.what, self.actors, self.kill, self.start, self.join = what, actors, kill, start, join
        self.seconds, self.restarts, self.note, self.losses = seconds, restarts, note, 0
        self.timeline = timeline
        self.down: dict[int, asyncio.Task[Any]] = {}
        self._answers: Counter[Any] = Counter()  # by actor

    @property
    def up(self) -> list[Any]:
        return [actor for number, actor in enumerate(self.actors) if number not in self.down]

    async def call(self, number: int, method: str, *arguments: Any, only: bool = False, tries: int = 3) -> Any:
        """What a replica's method returns. `only`: of this replica, whose restart is waited for. Raises PartLost where the call lost so many replicas as it has tries."""
        for attempt in range(tries):
            place = await self._serving(number % len(self.actors), only)
            actor = self.actors[place]
            try:
                with self.timeline.span(f"{self.what} {place}", method, number=number):
                    return await self._answer(actor, getattr(actor, method).remote(*arguments))
            except LOST as error:
                self._lose(place, actor, error)
                last = error
        raise PartLost(f"{method} lost {tries} {self.what}s one after another, last: {described(last, self.seconds)}") from last

    async def renew(self, error: BaseException, join: Callable[[list[Any]], Awaitable[T]]) -> T:
        """Kills those that are up and starts others, which serve no call before `join`, in place of the usual one, is done with all of them. Where
        one is lost in it, once more. Returns what `join` returns."""
        places = [number for number in range(len(self.actors)) if number not in self.down]
        renewal = asyncio.ensure_future(self._renewed(places, error, join))
        self.down |= dict.fromkeys(places, renewal)  # so that a call which meets a killed one does not start another in its place
        return await renewal

    async def _renewed(self, places: list[int], error: BaseException, join: Callable[[list[Any]], Awaitable[T]]) -> T:
        while True:
            for place in places:
                self._count(place, self.actors[place], error)
            for place, actor in zip(places, await asyncio.gather(*(self.start(place) for place in places))):
                self.actors[place] = actor
            try:
                result = await join([self.actors[place] for place in places])
            except LOST as again:
                error = again
                continue
            for place in places:
                del self.down[place]
            return result

    def close(self) -> None:
        for task in self.down.values():
            task.cancel()

    async def _answer(self, actor: Any, call: Any) -> Any:
        waiting, quiet, answers = asyncio.ensure_future(_result(call)), 0, self._answers[actor]
        try:
            # Silence is counted in waits, not by the clock: a machine that was suspended, or a controller that got no processor, has heard nobody.
            while not (await asyncio.wait({waiting}, timeout=self.seconds / WAITS))[0]:
                quiet = quiet + 1 if self._answers[actor] == answers else 0
                answers = self._answers[actor]
                if quiet >= WAITS:
                    raise asyncio.TimeoutError
            self._answers[actor] += 1
            return waiting.result()
        except asyncio.CancelledError:  # nobody wants it any more: an engine can drop its requests
            ray.cancel(call)
            raise
        finally:
            waiting.cancel()

    async def _serving(self, number: int, only: bool) -> int:
        order = [(number + i) % len(self.actors) for i in range(1 if only else len(self.actors))]
        while True:
            for place in order:
                if place not in self.down:
                    return place
            starting = [task for place in order if not (task := self.down[place]).done()]
            if not starting:
                self.down[order[0]].result()  # raises why it could not be started again
            await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)

    def _lose(self, place: int, actor: Any, error: BaseException) -> None:
        if self.actors[place] is actor and place not in self.down:  # else another call has noticed before
            self._count(place, actor, error)
            self.down[place] = asyncio.ensure_future(self._start_again(place))

    def _count(self, place: int, actor: Any, error: BaseException) -> None:
        self.losses += 1
        why = described(error, self.seconds)
        if self.losses > self.restarts:
            raise RunFailed(f"{self.what} {place} is lost, after {self.restarts} others since the last checkpoint: {why}", "look into its log, or raise loop.max_restarts and resume") from error
        self.note(f"warning: {self.what} {place} is lost and starts again: {why}")
        self.kill(actor)

    async def _start_again(self, place: int) -> None:
        actor = self.actors[place] = await self.start(place)
        if self.join:
            await self.join(actor)
        del self.down[place]


async def _result(call: Any) -> Any:
    return await call


def described(error: BaseException, seconds: float) -> str:
    """One line."""
    if isinstance(error, asyncio.TimeoutError) and not str(error):
        return f"no answer within {seconds:g} s"
    cause = getattr(error, "cause", None) or error  # Ray's wrapper of a remote failure begins with where it was
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
