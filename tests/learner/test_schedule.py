"""The schedule's promises: each sample once, the budget kept, equal counts, balance, groups together, no dependence on chance."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.learning_rate import learning_rate
from learner.schedule import SampleSize, ScheduleError, schedule, unit_cost, unit_tokens

GROUP = st.tuples(st.integers(1, 60), st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(0, 50))


def sizes_of(groups):
    return [SampleSize(g, prompt, response, patches) for g, (prompt, responses, patches) in enumerate(groups) for response in responses]


@settings(max_examples=200, deadline=None)
@given(groups=st.lists(GROUP, min_size=1, max_size=12), ranks=st.integers(1, 5), budget=st.integers(100, 400))
def test_invariants(groups, ranks, budget):
    sizes = sizes_of(groups)
    plan = schedule(sizes, ranks, budget)
    assert plan == schedule(sizes, ranks, budget)
    assert len(plan) == ranks
    assert sorted(i for share in plan for batch in share for i in batch) == list(range(len(sizes)))
    assert len({len(share) for share in plan}) == 1 and len(plan[0]) >= 1
    for share in plan:
        for batch in share:
            by_group = {}
            for i in batch:
                by_group.setdefault(sizes[i].group, []).append(sizes[i])
            assert sum(unit_tokens(members) for members in by_group.values()) <= budget
    if len(sizes) >= ranks:
        assert all(any(share) for share in plan), "a rank has nothing to do"


@settings(max_examples=50, deadline=None)
@given(groups=st.lists(GROUP, min_size=4, max_size=12))
def test_groups_stay_together_when_they_fit(groups):
    sizes = sizes_of(groups)
    batches = [batch for share in schedule(sizes, 2, 1000) for batch in share]
    for group in range(len(groups)):
        assert sum(any(sizes[i].group == group for i in batch) for batch in batches) == 1


def test_balance():
    sizes = [SampleSize(g, 100, 20 + (g * 7 + k * 13) % 60, 160) for g in range(16) for k in range(8)]
    plan = schedule(sizes, 4, 4000)
    loads = [sum(unit_cost([sizes[i] for i in batch if sizes[i].group == g]) for batch in share for g in {sizes[i].group for i in batch}) for share in plan]
    assert max(loads) < 1.1 * sum(loads) / 4


def test_a_sample_beyond_the_budget_is_named():
    with pytest.raises(ScheduleError, match=r"sample 1 has 50 prompt and 60 response tokens.*tokens_per_microbatch = 100"):
        schedule([SampleSize(0, 50, 20), SampleSize(0, 50, 60)], 1, 100)


def test_learning_rate():
    rates = [learning_rate(s, 10, 1.0, 4, "linear", 0.1) for s in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[9] == pytest.approx(0.1) and rates[11] == rates[9]
    assert learning_rate(7, 10, 2.0) == 2.0
    assert learning_rate(4, 9, 1.0, 0, "cosine") == pytest.approx(0.5)
    assert learning_rate(0, 1, 1.0, 0, "cosine") == 1.0
    with pytest.raises(ValueError, match="lr_schedule"):
        learning_rate(5, 10, 1.0, 0, "step")
