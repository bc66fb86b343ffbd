"""GRPO formulas against an independent float64 reference, written loop by loop from the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.grpo import constant_groups, group_advantages, kl_to_reference, multiplicative_error, policy_loss, rollout_mismatch, sequence_weights, token_sums

METHODS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline")


def reference_advantages(rewards, groups, method, eps=1e-6):
    """The same by plain Python: lists and sums."""

    def mean(values):
        return math.fsum(values) / len(values)

    def std(values):
        return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    of = {g: [r for r, k in zip(rewards, groups) if k == g] for g in set(groups)}
    out = []
    for r, g in zip(rewards, groups):
        members = of[g]
        if max(members) == min(members) and method != "reinforce++":
            out.append(0.0)
        elif method == "grpo":
            out.append((r - mean(members)) / (std(members) + eps))
        elif method in ("dr_grpo", "reinforce++_baseline"):
            out.append(r - mean(members))
        elif method == "rloo":
            others = list(members)
            others.remove(r)
            out.append(r - mean(others))
        else:
            out.append(r)
    if method.startswith("reinforce"):
        out = [0.0] * len(out) if max(out) == min(out) else [(a - mean(out)) / (std(out) + eps) for a in out]
    return out


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_advantages_equal_the_reference(method, data):
    n = data.draw(st.integers(1, 24))
    rewards = data.draw(st.lists(st.one_of(st.sampled_from([0.0, 1.0, 3.25]), st.floats(-5, 15).map(lambda v: round(v, 3))), min_size=n, max_size=n))
    groups = data.draw(st.lists(st.integers(-2, 5), min_size=n, max_size=n))
    found = group_advantages(rewards, groups, method)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), reference_advantages(rewards, groups, method), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7 + 0.1, 1e8 + 0.3])
def test_constant_groups_are_exactly_zero(value):
    # The mean of eight times 0.1 differs from 0.1 in the last bit; divided by a tiny std that would be an advantage.
    for method in METHODS:
        advantages = group_advantages([[value] * 7, [0.0] * 3 + [0.0] * 4], method=method)
        if method != "reinforce++":
            assert (advantages == 0.0).all()
    assert constant_groups([value] * 3 + [0.0, 1.0], [4, 4, 4, 2, 2]).tolist() == [False, True]
    nearly = group_advantages([[0.5, 0.5, 0.5 + 1e-9]])
    assert torch.isfinite(nearly).all() and nearly.abs().max() < 1.0


def test_rows_are_groups_and_bad_input_is_refused():
    rewards = np.arange(12.0).reshape(3, 4)
    flat = group_advantages(rewards.reshape(-1), np.repeat([7, 3, 9], 4))
    assert torch.equal(group_advantages(torch.tensor(rewards)).reshape(-1), flat)
    assert group_advantages([], []).shape == (0,)
    with pytest.raises(ValueError, match="NaN"):
        group_advantages([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="groups"):
        group_advantages([1.0, 2.0])
    with pytest.raises(ValueError, match="choose one of"):
        group_advantages([[1.0, 2.0]], method="ppo")


def reference_loss(logp, old, advantage, weight, rollout, ref, clip_low, clip_high, dual_clip, tis_cap, kl_coef, estimator):
    total = 0.0
    for lp, o, a, w, b, r in zip(logp, old, advantage, weight, rollout, ref):
        ratio = math.exp(lp - o)
        loss = max(-a * ratio, -a * min(max(ratio, 1 - clip_low), 1 + clip_high))
        if dual_clip is not None and a < 0:
            loss = min(loss, -a * dual_clip)
        if tis_cap is not None:
            loss *= min(math.exp(o - b), tis_cap)
        d = r - lp
        loss += kl_coef * {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[estimator]
        total += w * loss
    return total


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), dual=st.sampled_from([None, 1.5, 3.0]), cap=st.sampled_from([None, 1.2, 2.0]),
    estimator=st.sampled_from(["k1", "k2", "k3"]), clips=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.4)]),
)
def test_loss_equals_the_reference(seed, dual, cap, estimator, clips):
    rng = np.random.default_rng(seed)
    logp, old, rollout, ref = (-np.abs(rng.normal(2, 1, 40)) + rng.normal(0, 0.5, 40) for _ in range(4))
    advantage, weight = rng.normal(0, 1, 40), rng.random(40)
    loss, terms = policy_loss(
        *(torch.from_numpy(x) for x in (logp, old, advantage, weight)), clip_low=clips[0], clip_high=clips[1], dual_clip=dual,
        rollout_logprobs=torch.from_numpy(rollout), tis_cap=cap, ref_logprobs=torch.from_numpy(ref), kl_coef=0.3, kl_estimator=estimator,
    )
    expected = reference_loss(logp, old, advantage, weight, rollout, ref, *clips, dual, cap, 0.3, estimator)
    assert abs(float(loss) - expected) < 1e-9 * max(1.0, abs(expected))
    assert torch.isclose((torch.from_numpy(weight) * (terms["policy_loss"] + 0.3 * terms["kl"])).sum(), loss.double(), rtol=1e-12)


def test_loss_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(12, generator=generator, dtype=torch.float64) * 0.4 - 1.0
    logp, old, rollout, ref = draw().requires_grad_(), draw(), draw(), draw()
    loss = lambda x: policy_loss(
        x, old, draw_advantages, torch.full_like(old, 1 / 12), rollout_logprobs=rollout, ref_logprobs=ref, kl_coef=0.1, dual_clip=3.0, kl_clamp=10.0
    )[0]
    draw_advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (logp,), eps=1e-7, atol=1e-6)


def test_on_policy_first_step_is_the_policy_gradient():
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    advantage, weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    loss, terms = policy_loss(logp, logp.detach(), advantage, weight)
    loss.backward()
    torch.testing.assert_close(logp.grad, -weight * advantage)
    assert (terms["ratio"] == 1).all() and not (terms["clip_low"] | terms["clip_high"]).any()


def test_clip_fractions_count_what_they_name():
    old, up, down = torch.zeros(4), math.log(1.5), math.log(0.5)
    _, terms = policy_loss(torch.tensor([up, up, down, down]), old, torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4))
    assert terms["clip_high"].tolist() == [True, False, False, False] and terms["clip_low"].tolist() == [False, False, False, True]
    _, terms = policy_loss(torch.tensor([math.log(4.0)]), torch.zeros(1), torch.tensor([-1.0]), torch.ones(1), dual_clip=3.0)
    assert terms["dual_clip"].tolist() == [True] and float(terms["policy_loss"]) == pytest.approx(3.0)


def test_kl_clamp_and_extremes_have_finite_gradients():
    logp = torch.tensor([-200.0, -1.0, -0.1], requires_grad=True)
    kl = kl_to_reference(logp, torch.tensor([-0.1, -1.0, -200.0]), "k3", 10.0)
    kl.sum().backward()
    assert kl.tolist() == [10.0, 0.0, 10.0] and logp.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_aggregation(aggregation):
    lengths = torch.tensor([3, 1, 6])
    per_token = [torch.arange(n, dtype=torch.float64) + n for n in (3, 1, 6)]
    expected = {
        "token": torch.cat(per_token).mean(),
        "sequence": torch.stack([x.mean() for x in per_token]).mean(),
        "constant": torch.stack([x.sum() / 20 for x in per_token]).mean(),
    }[aggregation]
    weights = sequence_weights(lengths, aggregation, 10, 3, 20)
    found = (weights[torch.repeat_interleave(torch.arange(3), lengths)] * torch.cat(per_token)).sum()
    torch.testing.assert_close(found, expected)


def test_mismatch():
    d = np.array([0.1, -0.2, 0.0])
    terms = rollout_mismatch(torch.tensor(d - 1.0), torch.full((3,), -1.0, dtype=torch.float64))
    sums = token_sums(terms)
    assert float(sums["mismatch_kl"]) == pytest.approx(sum(math.exp(x) - x - 1 for x in d), abs=1e-12)
    assert multiplicative_error(sums["mismatch_abs"] / 3) == pytest.approx(math.exp(0.1))
