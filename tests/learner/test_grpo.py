"""GRPO formulas against an independent float64 reference, written loop by loop from the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import step_advantages
from learner.config import LearnerConfig
from learner.grpo import (
    constant_groups,
    group_advantages,
    kl_to_reference,
    multiplicative_error,
    penalised_returns,
    penalised_rewards,
    policy_loss,
    rollout_mismatch,
    sequence_weights,
    token_sums,
)
from learner.logprobs import chunked_logprobs

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


@settings(max_examples=60, deadline=None)
@given(rewards=st.lists(st.lists(st.integers(-20, 20).map(lambda v: v / 4), min_size=4, max_size=4), min_size=1, max_size=5))
def test_what_advantages_keep(rewards):
    """Sums of 0, indifference to a shift, scale, and exactly 0 for (only) the groups that `constant_groups` counts."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    constant = constant_groups(rewards)
    assert constant.tolist() == [len(set(row)) == 1 for row in rewards.tolist()]
    for method in METHODS:
        found = group_advantages(rewards, method=method, eps=0.0)
        total = found.sum() if method == "reinforce++" else found.sum(1)
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-9)
        torch.testing.assert_close(group_advantages(rewards + 3.0, method=method, eps=0.0), found, rtol=1e-9, atol=1e-9)
        scale = 5.0 if method in ("dr_grpo", "rloo") else 1.0
        torch.testing.assert_close(group_advantages(5.0 * rewards, method=method, eps=0.0), scale * found, rtol=1e-9, atol=1e-9)
        if method != "reinforce++":
            assert (found[constant] == 0.0).all() and (found[~constant] != 0.0).any(1).all()
    torch.testing.assert_close(group_advantages(rewards, method="rloo"), group_advantages(rewards, method="dr_grpo") * 4 / 3)


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


def reference_loss(
    sequences, aggregation, constant_length, surrogate, ratio_level, clip_low, clip_high, dual_clip, tis_cap, tis_level, kl_coef, kl_estimator, kl_clamp,
    entropy_coef,
):
    """A step's loss by plain Python, sequence by sequence, token by token. Masked sequences are skipped as if they did not exist."""
    kept = [s for s in sequences if not s["masked"]]
    total = 0.0
    for s in kept:
        n, a = len(s["logp"]), s["advantage"]
        mean_ratio = math.exp(math.fsum(lp - o for lp, o in zip(s["logp"], s["old"])) / n)
        product = math.exp(math.fsum(o - b for o, b in zip(s["old"], s["rollout"])))
        losses = []
        for lp, o, b, r, h in zip(s["logp"], s["old"], s["rollout"], s["ref"], s["entropy"]):
            ratio = math.exp(lp - o) if ratio_level == "token" else mean_ratio
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
            if surrogate == "cispo":
                loss = -clipped * a * lp
            else:
                loss = -min(ratio * a, clipped * a)
                if dual_clip is not None and a < 0:
                    loss = -max(min(ratio * a, clipped * a), dual_clip * a)
            if tis_cap is not None:
                loss *= min(math.exp(o - b) if tis_level == "token" else product, tis_cap)
            d = r - lp
            kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl_estimator]
            kl = kl if kl_clamp is None else min(max(kl, -kl_clamp), kl_clamp)
            losses.append(loss + kl_coef * kl - entropy_coef * h)
        total += {"token": 1, "sequence": 1 / n, "constant": 1 / constant_length}[aggregation] * math.fsum(losses)
    if not kept:
        return 0.0
    return total / (sum(len(s["logp"]) for s in kept) if aggregation == "token" else len(kept))


def random_sequences(seed, count=5, spread=0.5):
    rng, sequences = np.random.default_rng(seed), []
    for _ in range(count):
        start = -np.abs(rng.normal(2, 1, rng.integers(1, 9)))
        noisy = {name: start + rng.normal(0, spread, len(start)) for name in ("logp", "old", "rollout", "ref")}
        sequences.append(noisy | {"entropy": rng.random(len(start)), "advantage": rng.normal(), "masked": bool(rng.random() < 0.2)})
    return sequences


def flat(sequences, name):
    return torch.from_numpy(np.concatenate([s[name] for s in sequences]))


def padded(sequences, name):
    """(B, T) with NaN in the padding, which must not matter."""
    rows = [torch.from_numpy(s[name]) for s in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)


def pick(*values):
    return st.sampled_from(values)


SETTINGS = st.fixed_dictionaries(
    {
        "ratio_level": pick("token", "sequence"), "tis_level": pick("token", "sequence"), "tis_cap": pick(None, 1.2, 2.0), "kl_coef": pick(0.0, 0.3),
        "kl_estimator": pick("k1", "k2", "k3"), "kl_clamp": pick(None, 0.1), "entropy_coef": pick(0.0, 0.2),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6), chosen=SETTINGS, clips=pick((0.2, 0.2), (0.2, 0.28), (1.0, 0.4), (3e-4, 4e-4)),
    surrogate=pick(("ppo", None), ("ppo", 1.5), ("cispo", None)), aggregation=pick("token", "sequence", "constant"),
)
def test_loss_equals_the_reference(seed, chosen, clips, surrogate, aggregation):
    sequences = random_sequences(seed)
    options = chosen | {"surrogate": surrogate[0], "dual_clip": surrogate[1], "clip_low": clips[0], "clip_high": clips[1]}
    expected = reference_loss(sequences, aggregation, 7, **options)
    lengths, counted = torch.tensor([len(s["logp"]) for s in sequences]), torch.tensor([not s["masked"] for s in sequences])
    weights = sequence_weights(lengths, aggregation, constant_length=7, counted=counted)
    advantages = torch.tensor([s["advantage"] for s in sequences], dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    for form, advantage, weight, extra in (
        (flat, advantages[sequence], weights[sequence], {"sequence": sequence}),
        (padded, advantages, weights[:, None] * mask, {}),
    ):
        tensors = [form(sequences, name) for name in ("logp", "old")]
        more = {name: form(sequences, key) for name, key in (("rollout_logprobs", "rollout"), ("ref_logprobs", "ref"), ("entropy", "entropy"))}
        loss, terms = policy_loss(*tensors, advantage, weight, **more, **extra, **options)
        assert abs(float(loss) - expected) < 1e-9 * max(1.0, abs(expected))
        again = (weight * (terms["policy_loss"] + options["kl_coef"] * terms["kl"])).sum()
        if not options["entropy_coef"]:
            torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)


GRADIENTS = {
    "ppo": dict(dual_clip=3.0, kl_clamp=10.0, kl_coef=0.1),
    "gspo": dict(ratio_level="sequence", clip_low=0.05, clip_high=0.06, tis_level="sequence"),
    "k1": dict(kl_coef=0.2, kl_estimator="k1", entropy_coef=0.1),
    "k2": dict(kl_coef=0.2, kl_estimator="k2", clip_high=0.28, entropy_coef=0.1),
    "cispo": dict(surrogate="cispo", clip_low=0.0, clip_high=0.0, entropy_coef=0.1),  # its weight, held fixed by definition, is 1 here
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_loss_of_a_tiny_model_by_finite_differences(name):
    """A causal model of 75 parameters in float64, our log-probs and entropies of it, and the loss: every parameter by differences."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 6])
    sequence, ids = torch.repeat_interleave(torch.arange(3), lengths), torch.randint(0, 6, (11,), generator=generator)
    advantages, old, rollout, ref = draw(3)[sequence], draw(11) * 0.3 - 2.0, draw(11) * 0.3 - 2.0, draw(11) * 0.3 - 2.0
    weights = sequence_weights(lengths, "sequence")[sequence]

    def loss(embedding, layer, head):
        seen = torch.cat([embedding[part].cumsum(0) for part in ids.split(lengths.tolist())])
        logprobs, entropy = chunked_logprobs(torch.tanh(seen @ layer), head, ids, temperature=0.8, banned=torch.tensor([6]), chunk=4, train_entropy=True)
        more = dict(rollout_logprobs=rollout, ref_logprobs=ref, entropy=entropy, sequence=sequence)
        return policy_loss(logprobs, old, advantages, weights, **more, **GRADIENTS[name])[0]

    parameters = tuple(p.requires_grad_() for p in (draw(7, 4), draw(4, 3) * 0.5, draw(7, 3)))
    assert torch.autograd.gradcheck(loss, parameters, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"ratio_level": "sequence"}, {"surrogate": "cispo"}])
def test_on_policy_first_step_is_the_policy_gradient(options):
    logp = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, -0.1, -3.0]], dtype=torch.float64, requires_grad=True)
    advantages, weights = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([[0.2, 0.2, 0.0], [0.3, 0.3, 0.3]], dtype=torch.float64)
    loss, terms = policy_loss(logp, logp.detach(), advantages, weights, **options)
    loss.backward()
    torch.testing.assert_close(logp.grad, -weights * advantages[:, None])
    assert (terms["ratio"] == 1).all() and not (terms["clip_low"] | terms["clip_high"]).any()


def test_cispo_keeps_the_gradient_that_clipping_drops():
    gradients = {}
    for surrogate in ("ppo", "cispo"):
        logp = torch.tensor([-0.5, -1.0], requires_grad=True)
        policy_loss(logp, torch.tensor([-1.5, -1.0]), torch.tensor([1.0, 1.0]), torch.ones(2), surrogate=surrogate)[0].backward()
        gradients[surrogate] = logp.grad.tolist()
    assert gradients == {"ppo": [0.0, -1.0], "cispo": [pytest.approx(-1.2), -1.0]}


def test_sequence_ratios_share_one_clip():
    # Ratios 4 and 1/4: each token alone is clipped, their geometric mean is 1.
    logp, old = torch.tensor([math.log(4.0), -math.log(4.0), 0.7]), torch.zeros(3)
    options = dict(sequence=torch.tensor([0, 0, 1]), ratio_level="sequence")
    _, terms = policy_loss(logp, old, torch.ones(3), torch.ones(3), **options)
    torch.testing.assert_close(terms["ratio"], torch.tensor([1.0, 1.0, math.exp(0.7)]))
    assert terms["clip_high"].tolist() == [False, False, True]
    # A token of weight 0 is not of its sequence.
    _, terms = policy_loss(logp, old, torch.ones(3), torch.tensor([1.0, 0.0, 1.0]), **options)
    assert float(terms["ratio"][0]) == pytest.approx(4.0)


def test_a_settings_mistake_is_told():
    one = torch.zeros(1)
    for message, options in {
        "choose one of ppo, cispo": {"surrogate": "gspo"}, "ratio_level = 'group'": {"ratio_level": "group"}, "tis_level": {"tis_level": "all"},
        "dual_clip = 3": {"surrogate": "cispo", "dual_clip": 3.0}, "need `sequence`": {"ratio_level": "sequence"}, "needs `entropy`": {"entropy_coef": 0.1},
    }.items():
        with pytest.raises(ValueError, match=message):
            policy_loss(one, one, one, one, **options)


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


@pytest.mark.parametrize("advantage", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("options", [{"dual_clip": 3.0}, {"surrogate": "cispo"}, {"dual_clip": 3.0, "ratio_level": "sequence"}])
def test_an_enormous_ratio_leaves_no_nan(advantage, options):
    logp = torch.tensor([[-0.1, -0.2]], requires_grad=True)
    old = rollout = torch.tensor([[-300.0, -0.2]])
    loss, _ = policy_loss(logp, old, torch.tensor([advantage]), torch.ones(1, 2), rollout_logprobs=rollout, **options)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()


def test_masked_sequences_count_nowhere():
    lengths, counted = torch.tensor([3, 5, 2]), torch.tensor([True, False, True])
    for aggregation in ("token", "sequence", "constant"):
        alone = sequence_weights(lengths[counted], aggregation, constant_length=9)
        torch.testing.assert_close(sequence_weights(lengths, aggregation, constant_length=9, counted=counted), torch.stack([alone[0], alone[0] * 0, alone[1]]))
        assert (sequence_weights(lengths, aggregation, counted=torch.zeros(3, dtype=torch.bool)) == 0).all()
    with pytest.raises(ValueError, match="choose one of"):
        sequence_weights(lengths, "mean")


def test_kl_in_the_reward():
    rewards, kls = np.array([[1.0, 0.5], [0.0, 2.0]]), [np.array(x) for x in ([0.1, 0.2], [0.4], [0.0, -0.3, 0.5], [1.0])]
    torch.testing.assert_close(penalised_rewards(rewards, kls, 0.5), torch.tensor([[0.85, 0.3], [-0.1, 1.5]], dtype=torch.float64))
    returns = penalised_returns(rewards, kls, 0.5)
    assert [r.tolist() for r in returns] == [pytest.approx(x) for x in ([0.85, 0.9], [0.3], [-0.1, -0.1, -0.25], [1.5])]

    config = LearnerConfig(advantage="rloo", kl_in="reward", kl_coef=0.5)
    np.testing.assert_allclose(step_advantages(config, rewards, kls), [[0.55, -0.55], [-1.6, 1.6]])
    tokens = step_advantages(replace(config, advantage="reinforce++"), rewards, kls)
    expected = np.array([0.85, 0.9, 0.3, -0.1, -0.1, -0.25, 1.5])
    expected = (expected - expected.mean()) / (expected.std(ddof=1) + 1e-6)
    assert [len(x) for group in tokens for x in group] == [2, 1, 3, 1]
    np.testing.assert_allclose(np.concatenate([x for group in tokens for x in group]), expected, rtol=1e-9)
    assert step_advantages(replace(config, kl_in="loss"), rewards) == [[0.5, -0.5], [-2.0, 2.0]]


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
