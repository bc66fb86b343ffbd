"""The simulator: cases that can be worked out by hand, modes, bounds, and what the clock does."""

import asyncio
import time

import pytest

from cluster.sections import LoopConfig
from cluster.simulate import Costs, Sizes, run_on_a_jumping_clock, simulate


def loop(**settings):
    return LoopConfig(**{"steps": 20} | settings)


def test_the_clock_jumps():
    async def a_day():
        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(asyncio.sleep(3600 * n) for n in range(25)))
        return asyncio.get_running_loop().time() - start

    before = time.monotonic()
    assert run_on_a_jumping_clock(a_day()) == pytest.approx(86400) and time.monotonic() - before < 60


def test_a_synchronous_step_is_the_sum_of_its_stages():
    costs = Costs(lengths=[100], step_seconds=0.01, sequence_seconds=0.0001, prompt_seconds=0.05, score_seconds=0.1, learn_seconds=1.0, token_seconds=1e-3, sync_seconds=0.5)
    sizes = Sizes(groups=4, completions=8, sequences=64)
    generation = 4 * 0.05 + 100 * (0.01 + 32 * 0.0001)
    assert simulate(costs, sizes, loop()).step_seconds == pytest.approx(generation + 4 * 0.1 + 1.0 + 3200 * 1e-3 + 0.5, rel=0.02)
    half = simulate(costs, Sizes(groups=4, completions=8, sequences=64, ranks=2), loop())
    assert half.step_seconds == pytest.approx(generation + 4 * 0.1 + 1.0 + 1600 * 1e-3 + 0.5, rel=0.02)
    assert half.mean_staleness == 0 and half.dropped == 0


def test_more_sequences_than_fit_wait_for_room():
    costs = Costs(lengths=[100], step_seconds=0.01)
    for at_a_time, waves in ((32, 1), (16, 2), (8, 4)):
        assert simulate(costs, Sizes(groups=4, completions=8, sequences=at_a_time), loop()).step_seconds == pytest.approx(waves * 1.0, rel=0.02)


def test_one_step_off_takes_the_slower_stage():
    costs = Costs(lengths=[100], step_seconds=0.01, learn_seconds=0.6)
    full = Sizes(sequences=128)  # of one step, so that the next one's wait for room
    ahead = simulate(costs, full, loop(max_staleness=1))
    assert ahead.step_seconds == pytest.approx(1.0, rel=0.05) and ahead.engines_busy > 0.95 and ahead.learner_busy == pytest.approx(0.6, abs=0.05)
    assert simulate(costs, full, loop()).step_seconds == pytest.approx(1.6, rel=0.02)
    roomy = simulate(costs, Sizes(sequences=256), loop(max_staleness=1))  # two steps' sequences side by side, at no cost
    assert 0.6 <= roomy.step_seconds < 0.9
    slow = simulate(Costs(lengths=[100], step_seconds=0.01, learn_seconds=3.0), Sizes(), loop(max_staleness=1))
    assert slow.step_seconds == pytest.approx(3.0, rel=0.02) and slow.learner_busy > 0.98 and 0.9 < slow.mean_staleness <= 1


def test_late_groups_and_spread_lengths():
    costs = Costs(lengths=[50] * 15 + [400], step_seconds=0.01, learn_seconds=0.5)
    waits, drops = (simulate(costs, Sizes(), loop(wait_for=share)) for share in (1.0, 0.5))
    assert drops.step_seconds < 0.75 * waits.step_seconds and drops.dropped > 0.2 > waits.dropped == 0


@pytest.mark.parametrize("engines", [1, 10, 200])
def test_engines_scale_until_another_stage_is_full(engines):
    costs = Costs(lengths=[100], step_seconds=0.01, sequence_seconds=0.001, score_seconds=0.001, learn_seconds=0.2)
    share = 200 * 8 // engines  # sequences of a step on an engine
    batch = min(64, share)
    found = simulate(costs, Sizes(engines=engines, segmenters=engines, groups=200, sequences=batch), loop(steps=8, max_staleness=1))
    assert found.step_seconds == pytest.approx(max(0.2, share / batch * 100 * (0.01 + batch * 0.001)), rel=0.1)
