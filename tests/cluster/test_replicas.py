"""Replicas that are killed, stopped or broken, as real actors."""

import asyncio
import os
import signal
import time

import pytest
import ray

from cluster.errors import PartLost, RunFailed
from cluster.placement import Actors
from cluster.replicas import Replicas
from cluster.timeline import Timeline
from rollout.engine import EngineBroken


@ray.remote(num_cpus=0, max_concurrency=8)
class Worker:
    async def pid(self):
        return os.getpid()

    async def add(self, a, b):
        return a + b

    async def stay(self, seconds):
        await asyncio.sleep(seconds)
        return os.getpid()

    async def until_cancelled(self):
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise

    async def cancelled(self):
        return getattr(self, "was_cancelled", False)

    async def die(self):
        os._exit(1)

    async def broken(self):
        raise EngineBroken("half-loaded")

    async def wrong(self):
        raise ValueError("not its fault")


class Started:
    """Replicas of `count` workers; `notes` is what they said, `joined` whom a restart handed over."""

    def __init__(self, count=1, seconds=30.0, restarts=3):
        self.actors = Actors(None, None, [Worker.remote() for _ in range(count)], [], [])
        self.notes, self.joined, self.timeline = [], [], Timeline(os.devnull)
        self.replicas = Replicas("worker", self.actors.engines, self.actors.kill, self.start, self.join, seconds, restarts, self.notes.append, self.timeline)

    async def start(self, number):
        worker = Worker.remote()
        await worker.pid.remote()
        await self.actors.find_processes([worker])
        return worker

    async def join(self, worker):
        self.joined.append(await worker.pid.remote())

    async def __aenter__(self):
        await self.actors.find_processes(self.actors.engines)
        return self

    async def __aexit__(self, *exc):
        self.replicas.close()
        for worker in self.actors.engines:
            ray.kill(worker)


def test_a_lost_call_is_asked_again_of_the_one_that_follows(ray_session):
    async def scene():
        async with Started() as s:
            first = await s.replicas.call(0, "pid")
            asked = [asyncio.ensure_future(s.replicas.call(0, "stay", 2.0)) for _ in range(3)]
            await asyncio.sleep(0.5)
            os.kill(first, signal.SIGKILL)
            pids = set(await asyncio.gather(*asked))
            assert len(s.notes) == 1 and "worker 0 is lost and starts again: ActorDiedError" in s.notes[0]
            assert pids == {await s.replicas.call(0, "pid")} == set(s.joined) != {first}

    asyncio.run(scene())


def test_another_takes_over_unless_it_must_be_this_one(ray_session):
    async def scene():
        async with Started(count=2) as s:
            both = [await s.replicas.call(n, "pid") for n in (0, 1)]
            os.kill(both[0], signal.SIGKILL)
            assert await s.replicas.call(0, "pid") == both[1]
            assert await s.replicas.call(0, "pid", only=True) == s.joined[0] not in both
            assert await s.replicas.call(2, "pid") == s.joined[0] and len(s.replicas.up) == 2

    asyncio.run(scene())


def test_a_stopped_process_is_killed_and_replaced(ray_session):
    async def scene():
        async with Started(seconds=3.0) as s:
            first = await s.replicas.call(0, "pid")
            os.kill(first, signal.SIGSTOP)
            assert await s.replicas.call(0, "add", 1, 2) == 3
            assert "no answer within 3 s" in s.notes[0]
            until = time.monotonic() + 20
            while os.path.exists(f"/proc/{first}") and time.monotonic() < until:
                await asyncio.sleep(0.2)
            assert not os.path.exists(f"/proc/{first}")

    asyncio.run(scene())


def test_time_in_which_this_process_itself_stands_still_does_not_count(ray_session):
    """A machine that is suspended, a controller that gets no processor."""

    async def scene():
        async with Started(seconds=2.0) as s:
            first = await s.replicas.call(0, "pid")
            call = asyncio.ensure_future(s.replicas.call(0, "stay", 3.5))
            await asyncio.sleep(0.1)
            time.sleep(3.0)
            assert await call == first and not s.notes

    asyncio.run(scene())


def test_one_that_answers_others_is_not_hung(ray_session):
    """Calls that wait behind others for longer than the limit."""

    async def scene():
        async with Started(seconds=2.0) as s:
            await asyncio.gather(s.replicas.call(0, "stay", 3.5), *(s.replicas.call(0, "stay", t) for t in (1.0, 2.0, 3.0)))
            assert not s.notes

    asyncio.run(scene())


def test_a_call_that_nobody_waits_for_is_cancelled(ray_session):
    async def scene():
        async with Started() as s:
            waiting = asyncio.ensure_future(s.replicas.call(0, "until_cancelled"))
            await asyncio.sleep(1.0)
            waiting.cancel()
            until = time.monotonic() + 20
            while not (cancelled := await s.replicas.call(0, "cancelled")) and time.monotonic() < until:
                await asyncio.sleep(0.1)
            assert cancelled and not s.notes

    asyncio.run(scene())


def test_what_is_not_a_loss_is_raised_and_costs_nothing(ray_session):
    async def scene():
        async with Started() as s:
            with pytest.raises(ValueError, match="not its fault"):
                await s.replicas.call(0, "wrong")
            assert not s.notes and await s.replicas.call(0, "add", 1, 1) == 2

    asyncio.run(scene())


def test_a_call_that_kills_whom_it_meets_is_given_up(ray_session):
    async def scene():
        async with Started(restarts=5) as s:
            with pytest.raises(PartLost, match="broken lost 2 workers one after another, last: EngineBroken: half-loaded"):
                await s.replicas.call(0, "broken", tries=2)
            assert await s.replicas.call(0, "add", 1, 1) == 2 and len(s.notes) == 2

    asyncio.run(scene())


def test_restarts_are_bounded(ray_session):
    async def scene():
        async with Started(restarts=1) as s:
            with pytest.raises(RunFailed, match="worker 0 is lost, after 1 others since the last checkpoint: ActorDiedError"):
                await s.replicas.call(0, "die")

    asyncio.run(scene())


def test_one_that_cannot_start_says_why(ray_session):
    async def scene():
        async with Started() as s:

            async def refuse(number):
                raise RunFailed("there is no room", "make some")

            s.replicas.start = refuse
            with pytest.raises(RunFailed, match="there is no room"):
                await s.replicas.call(0, "die")

    asyncio.run(scene())


def test_renewed_ones_are_others(ray_session):
    async def scene():
        async with Started(count=2) as s:
            before = {await s.replicas.call(n, "pid") for n in (0, 1)}
            sent = await s.replicas.renew(EngineBroken("half-loaded"), lambda workers: asyncio.gather(*(w.add.remote(1, 2) for w in workers)))
            assert sent == [3, 3] and not before & {await s.replicas.call(n, "pid") for n in (0, 1)} and not s.joined and len(s.notes) == 2

    asyncio.run(scene())


def test_a_call_meets_renewed_ones_when_they_are_joined_and_starts_none_itself(ray_session):
    """Calls that were under way when all were killed, and one that comes meanwhile. The first join loses one: all are renewed again."""

    async def scene():
        async with Started(count=2, restarts=9) as s:
            started, joins, start = [], [], s.replicas.start

            async def slowly(number):
                started.append(number)
                await asyncio.sleep(1.0)
                return await start(number)

            async def join(workers):
                joins.append({await w.pid.remote() for w in workers})
                await asyncio.sleep(1.0)
                assert not asked[0].done() and not meanwhile.done()
                if len(joins) == 1:
                    raise EngineBroken("half-loaded")
                return "sent"

            s.replicas.start = slowly
            asked = [asyncio.ensure_future(s.replicas.call(n, "stay", 2.0)) for n in (0, 1, 0, 1)]
            await asyncio.sleep(0.5)
            renewing = asyncio.ensure_future(s.replicas.renew(EngineBroken("half-loaded"), join))
            await asyncio.sleep(0.5)
            meanwhile = asyncio.ensure_future(s.replicas.call(0, "pid"))
            assert await renewing == "sent" and started == [0, 1, 0, 1] and len(joins) == 2 and not joins[0] & joins[1]
            assert {await meanwhile, *await asyncio.gather(*asked)} == joins[1] and len(s.notes) == 4 and not s.joined

    asyncio.run(scene())
