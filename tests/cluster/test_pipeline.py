"""Groups on their way: how far ahead they are begun, what an update gets, and what becomes of the rest. The groups' answers are timers here."""

import asyncio
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import ledger
from cluster.draws import Draw
from cluster.ledger import Final, Ledger
from cluster.pipeline import DrawsAhead, Pipeline
from cluster.scoring import ScoredGroup
from cluster.sections import LoopConfig
from cluster.timeline import Timeline
from cluster.update import Arrivals
from learner.batch import Sample
from learner.config import LearnerConfig
from reward_service import Score


def the_draw(position):
    return Draw(position, SimpleNamespace(episode_id=f"e{position}"), None, None, None, None)


def the_group(draw, rewards=(0.0, 1.0)):
    scores = tuple(Score(r, {}, None) for r in rewards)
    return ScoredGroup(draw, (), (), (), None, "medium", scores=scores)


class Run:
    """A loop without models: `seconds(position)` says how long a group takes, `rewards(position)` what it earns."""

    def __init__(self, path, seconds=lambda p: 0.0, rewards=lambda p: (0.0, 1.0), per_step=4, **loop):
        self.loop, self.per_step, self.seconds, self.rewards = LoopConfig(**loop), per_step, seconds, rewards
        self.ledger = Ledger(path / "ledger.jsonl")
        self.ledger.path.unlink(missing_ok=True)
        ahead = DrawsAhead(SimpleNamespace(batch=lambda positions: [the_draw(p) for p in positions]))
        self.pipeline = Pipeline(self.loop, per_step, self.ledger, ahead, self.begin)
        self.step, self.begun_with, self.trained, self.most = 0, {}, [], 0

    def begin(self, draws):
        async def answer(draw):
            await asyncio.sleep(self.seconds(draw.position))
            return the_group(draw, self.rewards(draw.position))

        self.begun_with |= {draw.position: self.step for draw in draws}
        self.most = max(self.most, len(self.ledger.unfinished))
        return [asyncio.ensure_future(answer(draw)) for draw in draws]

    async def train(self, update_seconds=0.0):
        while self.step < self.loop.steps:
            taken = await self.pipeline.take(self.step)
            await asyncio.sleep(update_seconds)
            self.step += 1
            positions = [group.draw.position for group in taken.groups]
            self.trained.append(positions)
            self.ledger.close(self.step, [*(Final(p, f"e{p}") for p in positions), *taken.dropped])
        self.pipeline.close()
        return ledger.check(self.ledger.path, self.ledger.next, self.ledger.unfinished)

    def staleness(self):
        return [step - self.begun_with[p] for step, positions in enumerate(self.trained) for p in positions]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_staleness_is_bounded_and_reached(tmp_path, staleness):
    times = random.Random(staleness)
    run = Run(tmp_path, seconds=lambda p: times.choice([0.0, 0.002, 0.01]), steps=12, max_staleness=staleness)
    assert asyncio.run(run.train(0.005)) == {"trained": 48}
    assert max(run.staleness()) == staleness and run.most <= 4 * (staleness + 1)
    assert run.trained == [[4 * step + i for i in range(4)] for step in range(12)]  # in the order in which they were begun
    assert run.ledger.next == 48  # nothing is begun that no update will want


def test_synchronous_steps_leave_nothing_on_its_way(tmp_path):
    run = Run(tmp_path, steps=3)

    async def one_step():
        await run.pipeline.take(0)
        return len(run.pipeline.flying), run.ledger.next

    assert asyncio.run(one_step()) == (0, 4)


def test_one_step_off_generates_while_the_learner_works(tmp_path):
    run = Run(tmp_path, seconds=lambda p: 0.02, steps=3, max_staleness=1)

    async def during_the_first_update():
        await run.pipeline.take(0)
        begun = [f.draw.position for f in run.pipeline.flying]
        await asyncio.sleep(0.2)
        return begun, [f.task.done() for f in run.pipeline.flying]

    assert asyncio.run(during_the_first_update()) == ([4, 5, 6, 7], [True] * 4)


SLOW = {1: 30.0, 6: 30.0}  # seconds; the test would never end if they were waited for


def test_late_groups_are_dropped(tmp_path):
    run = Run(tmp_path, seconds=lambda p: SLOW.get(p, 0.0), steps=3, wait_for=0.75)
    assert asyncio.run(asyncio.wait_for(run.train(), 20)) == {"trained": 10, "late": 2}
    assert run.trained == [[0, 2, 3], [4, 5, 7], [8, 9, 10, 11]]


def test_late_groups_go_to_the_next_step_or_are_too_stale(tmp_path):
    run = Run(tmp_path, seconds=lambda p: {1: 0.3, 6: 30.0}.get(p, 0.0), steps=4, wait_for=0.75, max_staleness=1, late_groups="next_step")
    assert asyncio.run(asyncio.wait_for(run.train(0.5), 20)) == {"trained": 15, "late": 1}
    assert run.trained == [[0, 2, 3], [1, 4, 5, 7], [8, 9, 10, 11], [12, 13, 14, 15]]  # group 7 cannot wait for a third update
    assert max(run.staleness()) == 1


def test_groups_that_say_nothing_are_replaced_up_to_a_limit(tmp_path):
    equal = lambda p: (1.0, 1.0) if p < 7 else (0.0, 1.0)
    for refills, trained, ends in ((0, [0, 1, 2, 3], {"trained": 4}), (2, [2, 3, 4, 5], {"trained": 4, "zero variance": 2}), (64, [7, 8, 9, 10], {"trained": 4, "zero variance": 7})):
        run = Run(tmp_path, rewards=equal, steps=1, max_refills=refills)
        assert asyncio.run(run.train()) == ends and run.trained == [trained]


def test_groups_that_arrive_are_told_once_and_only_those_that_will_be_taken(tmp_path):
    """While a slow one is waited for; those that may be replaced are not told, whether they are or not."""
    times, equal = {3: 0.2, 8: 0.2}, (1, 4, 5)
    run = Run(tmp_path, seconds=lambda p: times.get(p, 0.0), rewards=lambda p: (1.0, 1.0) if p in equal else (0.0, 1.0), steps=2, max_refills=2)
    told = []

    async def two_steps():
        first = await run.pipeline.take(0, lambda group: told.append((group.draw.position, run.pipeline.flying[3].task.done())))
        step = len(told)
        second = await run.pipeline.take(1, lambda group: told.append((group.draw.position, None)))
        return [[g.draw.position for g in taken.groups] for taken in (first, second)], step

    (first, second), step = asyncio.run(two_steps())
    assert first == [0, 2, 3, 5] and {p for p, _ in told[:step]} == {0, 2, 3}  # 1 and 4 were replaced, and 5 not, for two are enough
    assert [slow_one_is_there for p, slow_one_is_there in told[:step] if p < 3] == [False, False]
    assert sorted(p for p, _ in told[step:]) == second == [6, 7, 8, 9]


def test_what_a_group_raises_ends_the_step(tmp_path):
    def seconds(position):
        if position == 2:
            raise RuntimeError("the engine is gone")
        return 60.0

    run = Run(tmp_path, seconds=seconds, steps=1)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        asyncio.run(asyncio.wait_for(run.train(), 20))
    assert run.ledger.unfinished == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.sampled_from([0.3, 0.75, 1.0]), st.sampled_from(["drop", "next_step"]), st.integers(0, 3), st.integers(1, 5), st.integers(0, 2**16)
)
def test_each_group_ends_once_whatever_happens(tmp_path_factory, staleness, wait_for, late, refills, per_step, seed):
    draw = random.Random(seed)
    run = Run(
        tmp_path_factory.mktemp("run"),
        seconds=lambda p: draw.choice([0.0, 0.0, 0.001, 0.004]),
        rewards=lambda p: draw.choice([(1.0, 1.0), (0.0, 1.0)]),
        per_step=per_step,
        steps=6,
        max_staleness=staleness,
        wait_for=wait_for,
        late_groups=late if staleness else "drop",
        max_refills=refills,
    )
    ends = asyncio.run(run.train(0.001))  # checks the ledger
    assert ends["trained"] == sum(map(len, run.trained)) and all(run.trained)
    assert all(len(positions) <= (staleness + 1) * per_step + refills for positions in run.trained) and ends["zero variance"] <= 6 * refills
    assert max(run.staleness()) <= staleness


def test_the_next_draws_are_made_ahead():
    asked = []

    def batch(positions):
        asked.append(list(positions))
        return [the_draw(p) for p in positions]

    async def steps():
        ahead = DrawsAhead(SimpleNamespace(batch=batch))
        first = await ahead.take([0, 1], then=[2, 3])
        await asyncio.sleep(0.05)
        assert asked == [[0, 1], [2, 3]]
        return [d.position for d in first + await ahead.take([2], then=[3, 4]) + await ahead.take([4, 3, 9], then=[])]

    assert asyncio.run(steps()) == [0, 1, 2, 4, 3, 9]
    assert asked == [[0, 1], [2, 3], [4], [9]]


def test_the_controller_does_the_same_for_each_group_however_many_there_are(tmp_path):
    """Counted in calls of Python and C functions, which no machine's speed changes."""

    def calls_a_group(per_step):
        count, run = 0, Run(tmp_path, per_step=per_step, steps=4, max_staleness=1, max_refills=8, rewards=lambda p: (1.0, 1.0) if p % 50 == 0 else (0.0, 1.0))

        def counted(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            asyncio.run(run.train())
        finally:
            sys.setprofile(None)
        return count / (4 * per_step)

    assert calls_a_group(1024) < 1.1 * calls_a_group(64)


def test_a_learner_that_fails_while_groups_are_still_on_their_way_ends_the_wait(monkeypatch):
    """With gradients begun as groups arrive; what the learner raised is raised, and the groups are abandoned."""
    monkeypatch.setattr("cluster.update.ray.put", lambda samples: samples)
    tokens, abandoned = np.zeros(128, np.int32), []
    sample = Sample(tokens, tokens, tokens.astype(np.float32), (), np.zeros((0, 3), np.int64), group=0, fingerprint="")

    async def fails(samples):
        raise RuntimeError("lost")

    async def for_ever():
        try:
            await asyncio.sleep(3600)
        finally:
            abandoned.append(True)

    async def at_once():
        return 7

    async def learning(work):
        return await work

    async def wait():
        learner = SimpleNamespace(accumulate=SimpleNamespace(remote=fails))
        arrivals = Arrivals([learner], LearnerConfig(tokens_per_microbatch=256), Timeline(os.devnull), learning)
        assert await arrivals.unless_lost(at_once()) == 7
        arrivals.add([sample, sample], [0.0, 1.0])
        await arrivals.unless_lost(for_ever())

    with pytest.raises(RuntimeError, match="lost"):
        asyncio.run(asyncio.wait_for(wait(), 60))
    assert abandoned == [True]
