"""What the policy computes on a packed micro-batch equals the plain computation: one row a sample, full logits, transformers' own forward."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_learner import BANNED, IMAGE, SPECS, VIDEO, image_processor, plain_logprobs, plain_logprobs_and_entropy, random_samples, tiny_model, tiny_qwen3_model

from learner import shared_prompt
from learner.batch import SampleError, check_fingerprints, check_samples, collate, prompt_fingerprint
from learner.config import LearnerConfig
from learner.flops import ModelSize, step_flops
from learner.logprobs import chunked_logprobs
from learner.loss import micro_batch_loss, step_totals
from learner.patchify import image_grid, patchify
from learner.policy import PolicyModel
from learner.schedule import SampleSize, schedule

SPEC = SPECS["qwen2_5_vl"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def policies(family="qwen2_5_vl", checkpointing=False, **options):
    """(packed policy, plain model) with equal weights."""
    shared_prompt.register()
    model = tiny_model(**options) if family == "qwen2_5_vl" else tiny_qwen3_model()
    plain = copy.deepcopy(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.language_model.config._attn_implementation = shared_prompt.ATTENTION
    return PolicyModel(model, BANNED, 0.7, 5), plain


def relative_errors(policy, plain):
    pairs = zip(policy.model.named_parameters(), plain.named_parameters())
    return {name: float((a.grad - b.grad).norm() / b.grad.norm()) for (name, a), (_, b) in pairs if b.grad is not None and b.grad.norm() > 0}


@pytest.mark.parametrize("options", [{}, {"tie": True, "heads": 2, "key_heads": 2}, {"checkpointing": True}, {"family": "qwen3_vl"}, {"family": "qwen3_vl", "checkpointing": True}])
def test_shared_prompts_equal_separate_rows(options):
    policy, plain = policies(**options)
    spec = SPECS[plain.config.model_type]
    samples = random_samples(groups=3, completions=4, patch=spec.patch)
    samples[0] = replace(samples[0], response_ids=samples[0].response_ids[:1], rollout_logprobs=samples[0].rollout_logprobs[:1])
    order = [5, 0, 1, 2, 3, 8, 4, 6, 7, 9, 10, 11]
    batch = collate(samples, order, spec, policy.rope_index)
    assert batch.input_ids.numel() == sum(len(samples[4 * g].prompt_ids) for g in range(3)) + sum(len(s.response_ids) - 1 for s in samples)
    found, _ = policy(batch)
    expected = torch.cat([plain_logprobs(plain, samples[i], 0.7) for i in order])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    coefficients = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
    (found * coefficients).sum().backward()
    (expected * coefficients).sum().backward()
    errors = relative_errors(policy, plain)
    assert len(errors) > 40 and max(errors.values()) < 1e-5, max(errors.items(), key=lambda e: e[1])


VARIANTS = {
    "defaults": {},
    "grpo": {"loss_aggregation": "sequence", "tis_cap": None, "kl_coef": 0.04, "kl_clamp": None},
    "dr_grpo": {"loss_aggregation": "constant", "constant_length": 30, "kl_coef": 0.0},
    "dapo": {"clip_high": 0.28, "kl_coef": 0.0, "mask_overlong": True},
    "gspo": {"ratio_level": "sequence", "loss_aggregation": "sequence", "clip_low": 0.03, "clip_high": 0.04, "tis_level": "sequence", "mask_overlong": True},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.1},
    "cispo of sequences": {"surrogate": "cispo", "ratio_level": "sequence", "clip_low": 0.02, "clip_high": 0.02, "loss_aggregation": "constant"},
    "dual clip, k2": {"dual_clip": 1.05, "kl_estimator": "k2", "kl_coef": 0.3},
    "entropy, k1": {"entropy_coef": 0.05, "kl_estimator": "k1", "kl_coef": 0.3, "loss_aggregation": "sequence"},
}


def plain_loss(config, samples, logprobs, entropies, old, ref):
    """One step's loss on one rank with padded rows (B, T), written down from the papers without our functions."""
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(s.response_ids) for s in samples])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    advantage = torch.tensor([s.advantage for s in samples], dtype=torch.float32)[:, None]
    lp, h, o, r = pad(logprobs), pad(entropies), pad(old), pad(ref)
    rollout = pad(torch.from_numpy(s.rollout_logprobs) for s in samples)
    ratio = torch.exp(lp - o)
    if config.ratio_level == "sequence":
        ratio = torch.exp(((lp - o) * mask).sum(1, keepdim=True) / lengths[:, None]) * torch.ones_like(lp)
    clipped = torch.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    objective = torch.min(ratio * advantage, clipped * advantage)
    if config.dual_clip is not None:
        objective = torch.where(advantage < 0, torch.max(objective, config.dual_clip * advantage), objective)
    if config.surrogate == "cispo":
        objective = clipped.detach() * advantage * lp
    if config.tis_cap is not None:
        difference = (o - rollout) * mask
        difference = difference.sum(1, keepdim=True) if config.tis_level == "sequence" else difference
        objective = objective * difference.exp().clip(max=config.tis_cap)
    d = r - lp
    kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[config.kl_estimator]
    loss = -objective + config.kl_coef * kl - config.entropy_coef * h
    if config.mask_overlong:
        mask = mask * torch.tensor([[not s.truncated] for s in samples])
    if config.loss_aggregation == "token":
        return (loss * mask).sum() / mask.sum()
    sums = (loss * mask).sum(1) / (lengths if config.loss_aggregation == "sequence" else config.constant_length)
    return sums.sum() / (mask.sum(1) > 0).sum()


@pytest.fixture(scope="module")
def plain():
    """(samples, old and reference log-probs, the plain model's log-probs and entropies with their graph, its parameters by name)."""
    torch.manual_seed(2)
    samples = [replace(s, truncated=i % 5 == 0) for i, s in enumerate(random_samples(groups=3, completions=4, seed=5))]
    model = policies()[1]
    both = [plain_logprobs_and_entropy(model, s, 0.7) for s in samples]
    logprobs, entropies = zip(*both)
    noisy = lambda scale: [lp.detach() + scale * torch.randn_like(lp) for lp in logprobs]
    samples = [replace(s, rollout_logprobs=x.numpy()) for s, x in zip(samples, noisy(0.4))]
    return samples, noisy(0.2), noisy(0.5), logprobs, entropies, model


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("budget", [10_000, 60])
def test_loss_and_gradient_do_not_depend_on_the_split(plain, name, budget):
    """Packed micro-batches of two ranks against padded rows on one: loss to 1e-6, gradients to 1e-5 of each parameter's norm."""
    config = LearnerConfig(**VARIANTS[name])
    samples, old, ref, logprobs, entropies, model = plain
    expected = plain_loss(config, samples, logprobs, entropies, old, ref)
    model.zero_grad()
    expected.backward(retain_graph=True)

    policy, _ = policies()
    sizes = [SampleSize(s.group, len(s.prompt_ids), len(s.response_ids)) for s in samples]
    micro_batches = [indices for share in schedule(sizes, 2, budget) for indices in share] + [[]]
    assert len(micro_batches) > (4 if budget < 1000 else 2)
    found, totals = 0.0, step_totals(config, samples)
    for indices in micro_batches:
        batch = collate(samples, indices or [0], SPEC, policy.rope_index)  # an empty one keeps a rank in step and must add nothing
        of = lambda rows: torch.cat([rows[i] for i in batch.indices])
        now, entropy = policy(batch, train_entropy=config.entropy_coef > 0)
        loss, terms = micro_batch_loss(config, batch, totals, now, of(old), of(ref), entropy, active=bool(indices))
        loss.backward()
        found += float(loss.detach())
    assert found == pytest.approx(float(expected.detach()), rel=0, abs=1e-6)
    errors = relative_errors(policy, model)
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda e: e[1])


def test_an_advantage_is_a_number_or_one_a_token():
    samples = random_samples(groups=1, completions=3, response=(2, 5))
    each = [np.linspace(0, 1, len(s.response_ids)) for s in samples]
    batch = collate([replace(s, advantage=a if i else 2.0) for i, (s, a) in enumerate(zip(samples, each))], [2, 0, 1], SPEC, policies()[0].rope_index)
    np.testing.assert_allclose(batch.advantages, np.concatenate([each[2], np.full(len(each[0]), 2.0), each[1]]), rtol=1e-6)


@pytest.mark.parametrize("family", SPECS)
def test_text_only_prompts_keep_the_vision_tower_in_the_graph(family):
    policy, plain = policies(family)
    samples = random_samples(groups=2, completions=2, images=0)
    batch = collate(samples, range(4), SPEC, policy.rope_index)
    found, _ = policy(batch)
    torch.testing.assert_close(found, torch.cat([plain_logprobs(plain, s, 0.7) for s in samples]), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.model.model.visual.parameters())


@pytest.mark.parametrize("pictures", [2, 0])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_frozen_vision_tower_looks_once_at_a_micro_batch(family, pictures):
    """Reference and policy share its features (and, where there are no pictures, its stand-in): the same log-probs and gradients, half the work."""
    policy, reference = policies(family)[0], policies(family)[0]
    policy.freeze(("vision", "projector"))
    reference.requires_grad_(False)
    spec = SPECS[family]
    batch = lambda: collate(random_samples(images=pictures, patch=spec.patch), range(12), spec, policy.rope_index)

    def step(shares):
        policy.shares_vision = reference.shares_vision = shares and not policy.vision_learns
        policy.zero_grad()
        seen, one = [], batch()
        hooks = [model.model.model.visual.register_forward_hook(lambda *_: seen.append(1)) for model in (policy, reference)]
        with torch.no_grad():
            before, _ = reference(one)
        logprobs, _ = policy(one)
        logprobs.sum().backward()
        for hook in hooks:
            hook.remove()
        return len(seen), before, logprobs.detach(), [p.grad for p in policy.parameters() if p.grad is not None]

    apart, together = step(False), step(True)
    assert (apart[0], together[0]) == (2, 1)
    assert torch.equal(apart[1], together[1]) and torch.equal(apart[2], together[2])
    assert len(apart[3]) == len(together[3]) and all(torch.equal(a, b) for a, b in zip(apart[3], together[3]))


@pytest.mark.parametrize("learns", [True, False])
def test_operations_are_those_that_torch_counts(learns):
    """Matrix products of a forward and a backward pass, vision tower trained or not; attention is small here, and torch counts what the mask hides."""
    from torch.utils.flop_counter import FlopCounterMode

    policy, _ = policies(hidden=64, intermediate=512, vision=64)
    if not learns:
        policy.freeze(("vision", "projector"))
    samples = random_samples(groups=2, completions=3, text=60, response=(20, 20), vary=False)
    batch = collate(samples, range(6), SPEC, policy.rope_index)
    with FlopCounterMode(display=False) as counter:
        logprobs, _ = policy(batch)
        logprobs.sum().backward()
    found = sum(n for operation, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation))
    size, sizes = ModelSize.of(policy), [s.size for s in samples]
    head = 2 * size.head * 120  # its logits are computed again in the backward pass, which is not counted as needed
    patches = 2 * 1176 * 64 * 96  # what would go on to the pixels, which is not computed
    assert step_flops(replace(size, attention=0), [sizes], reference=False) - learns * patches == pytest.approx(found - head, rel=0.01)
    assert step_flops(size, [sizes], reference=True) > step_flops(size, [sizes[:3], sizes[3:]], reference=False)
    attention = step_flops(size, [sizes[:1]], False) - step_flops(replace(size, attention=0), [sizes[:1]], False)
    p = len(samples[0].prompt_ids)
    assert attention == 3 * 4 * size.attention * (p * p / 2 + 19 * (p + 9.5))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_logprobs_equal_full_logits(temperature, monkeypatch):
    monkeypatch.setattr("learner.logprobs.WORDS", 16)  # of 40
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(40, 16, generator=generator, dtype=torch.float64).requires_grad_()
    banned, targets = torch.tensor([3, 38, 39]), torch.randint(4, 38, (23,), generator=generator)
    logits = (hidden @ weight.t()) / temperature
    log_p = torch.log_softmax(logits.index_fill(1, banned, float("-inf")), 1)
    expected = log_p.gather(1, targets[:, None])[:, 0]
    g = torch.randn(23, generator=generator, dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * g).sum(), (hidden, weight))
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0.0)).sum(1)
    for chunk in (1, 7, 100):
        found, found_entropy = chunked_logprobs(hidden, weight, targets, temperature=temperature, banned=banned, chunk=chunk, entropy=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_entropy, entropy, rtol=1e-9, atol=1e-9)
        assert not found_entropy.requires_grad
        for a, b in zip(torch.autograd.grad((found * g).sum(), (hidden, weight)), expected_grads):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert chunked_logprobs(hidden, weight, torch.full((23,), 39), banned=banned)[0].isinf().all()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_patchify_equals_the_image_processor(spec):
    rng, step = np.random.default_rng(0), spec.patch * spec.merge
    images = [rng.integers(0, 256, (h * step, w * step, 3), dtype=np.uint8) for h, w in ((2, 3), (4, 1), (2, 3), (1, 1))]
    inputs = image_processor(spec)(images=images, do_resize=False, return_tensors="pt")
    rows, grid = patchify(images, spec)
    assert torch.equal(grid, inputs["image_grid_thw"]) and torch.equal(rows, inputs["pixel_values"])
    assert patchify([], spec)[0].shape == (0, spec.row_width)


def test_images_that_are_not_at_size_are_refused():
    with pytest.raises(ValueError, match=r"\(57, 84, 3\).*multiples of 28"):
        image_grid(np.zeros((57, 84, 3), np.uint8), SPEC)


def test_samples_are_checked():
    samples = random_samples(groups=2, completions=2)
    check = lambda s: check_samples(s, BANNED, (IMAGE, VIDEO), 2)
    check(samples)
    check_fingerprints(samples, range(4))
    first = samples[0]
    for message, change in {
        "finite": dict(advantage=float("nan")),
        "one, or one a token": dict(advantage=np.zeros(len(first.response_ids) + 1)),
        "rollout log-probs": dict(rollout_logprobs=first.rollout_logprobs[:-1]),
        "banned token id 290": dict(response_ids=np.full_like(first.response_ids, IMAGE)),
        "visual tokens": dict(images=first.images[:-1]),
        "must be positive": dict(response_ids=first.response_ids[:0]),
    }.items():
        with pytest.raises(SampleError, match=message):
            check([replace(first, **change)])
    with pytest.raises(SampleError, match="fingerprints differ"):
        check([first, replace(samples[1], fingerprint="0")])
    with pytest.raises(SampleError, match="no samples"):
        check([])
    touched = tuple(image.copy() for image in first.images)
    touched[-1][0, 0, 0] ^= 1
    with pytest.raises(SampleError, match="changed on the way"):
        check_fingerprints([replace(first, images=touched)], [0])
    assert prompt_fingerprint(first.prompt_ids, ()) != prompt_fingerprint(first.prompt_ids, first.images)
