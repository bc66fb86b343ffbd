"""GRPO and its relatives as pure functions: group advantages, policy losses, KL estimators, and what is measured of them.

Nothing here knows of models, ranks or micro-batches. A per-token tensor may have any shape: flat (M,) as the learner packs
them, or padded (B, T) with weight 0 on the padding. The loss is a weighted SUM over tokens; `sequence_weights` gives weights
that are normalised over the whole step, so that a split into micro-batches and ranks cannot change the gradient. Padded:

    advantages = group_advantages(rewards_BG, method="grpo").reshape(-1)
    weights = sequence_weights(mask.sum(1), "token")[:, None] * mask
    loss, terms = policy_loss(logprobs, old_logprobs, advantages[:, None], weights, clip_high=0.28)

Papers and config keys: docs/grpo.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def group_advantages(rewards, groups=None, method: str = "grpo", eps: float = 1e-6) -> Tensor:
    """Advantages of completions from the rewards of their groups.

    rewards: (N,) with `groups` (N,), integers that say which group each completion belongs to, or (B, G) with one group a
    row. Lists, arrays or tensors; everything is computed, and returned, in float64, in the shape of `rewards`.

    grpo: (r - mean) / (std + eps) within the group, std unbiased (DeepSeekMath, arXiv:2402.03300, section 4.1.2; the paper
        leaves the kind of std and eps open, the unbiased one and 1e-6 are those of the verl line).
    dr_grpo: r - mean, no division (Dr. GRPO, arXiv:2503.20783, section 3.2).
    rloo: r - mean of the others of the group (RLOO, arXiv:2402.14740, section 3.2) = G / (G - 1) * (r - mean).
    reinforce++: (r - mean) / (std + eps) over ALL completions given (REINFORCE++, arXiv:2501.03262, "global advantage
        normalization"); groups play no part.
    reinforce++_baseline: r - group mean, then standardised over all completions (same paper, "w/ baseline").

    A group whose rewards are all equal (max == min in float64; also a group of one) gets exactly 0: rounding errors of the
    mean, divided by a tiny std, would otherwise become advantages of hundreds. With reinforce++ this holds for the batch.
    Raises ValueError for an unknown method, a wrong shape, or rewards that are not finite.
    """
    rewards, groups = _rewards_and_groups(rewards, groups)
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards hold NaN or infinity; drop completions whose scoring failed before advantages are taken")
    if rewards.numel() == 0:
        return rewards.clone()

    flat, index = rewards.reshape(-1), torch.unique(groups.reshape(-1), return_inverse=True)[1]
    everything = torch.zeros_like(index)
    if method == "grpo":
        advantages = _centred(flat, index) / (_unbiased_std(flat, index) + eps)
    elif method == "dr_grpo":
        advantages = _centred(flat, index)
    elif method == "rloo":
        size = torch.bincount(index)[index].to(torch.float64)
        advantages = _centred(flat, index) * size / (size - 1).clamp(min=1)
    elif method == "reinforce++":
        advantages, index = _centred(flat, everything) / (_unbiased_std(flat, everything) + eps), everything
    elif method == "reinforce++_baseline":
        centred = _centred(flat, index).masked_fill(_constant(flat, index), 0.0)
        advantages = _centred(centred, everything) / (_unbiased_std(centred, everything) + eps)
    else:
        raise ValueError(f"method = {method!r}; choose one of grpo, dr_grpo, rloo, reinforce++, reinforce++_baseline")
    return advantages.masked_fill(_constant(flat, index), 0.0).reshape(rewards.shape)


def constant_groups(rewards, groups=None) -> Tensor:
    """bool (number of groups,), groups in ascending order: True where all rewards of a group are equal in float64.

    rewards and groups as in `group_advantages`; `constant_groups(...).sum()` counts them.
    """
    rewards, groups = _rewards_and_groups(rewards, groups)
    index = torch.unique(groups.reshape(-1), return_inverse=True)[1]
    return _extreme(rewards.reshape(-1), index, "amax") == _extreme(rewards.reshape(-1), index, "amin")


def _rewards_and_groups(rewards, groups) -> tuple[Tensor, Tensor]:
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    if groups is None:
        if rewards.ndim != 2:
            raise ValueError(f"rewards of shape {tuple(rewards.shape)} need `groups`, one integer for each; or give (B, G)")
        groups = torch.arange(rewards.shape[0], device=rewards.device)[:, None].expand_as(rewards)
    groups = torch.as_tensor(groups, device=rewards.device)
    if groups.shape != rewards.shape:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}, groups {tuple(groups.shape)}")
    return rewards, groups


def _mean(values: Tensor, index: Tensor) -> Tensor:
    return values.new_zeros(int(index.max()) + 1).index_add_(0, index, values) / torch.bincount(index)


def _centred(values: Tensor, index: Tensor) -> Tensor:
    return values - _mean(values, index)[index]


def _unbiased_std(values: Tensor, index: Tensor) -> Tensor:
    squares = _mean(_centred(values, index) ** 2, index) * torch.bincount(index)
    return torch.sqrt(squares / (torch.bincount(index) - 1).clamp(min=1))[index]


def _extreme(values: Tensor, index: Tensor, reduce: str) -> Tensor:
    if index.numel() == 0:
        return values
    return values.new_zeros(int(index.max()) + 1).scatter_reduce_(0, index, values, reduce, include_self=False)


def _constant(values: Tensor, index: Tensor) -> Tensor:
    return (_extreme(values, index, "amax") == _extreme(values, index, "amin"))[index]


def penalised_rewards(rewards, kls: Sequence[Tensor], kl_coef: float) -> Tensor:
    """KL as part of the reward: r - kl_coef * (sum over a completion's tokens of their KL), float64, in the shape of `rewards`.

    rewards (N,) or (B, G); kls: for each completion, in row order, `kl_to_reference` of its tokens (R,) under the old policy.
    With k1 the sum is log pi(y|x) / pi_ref(y|x), the KL-shaped reward of RLHF (RLOO, arXiv:2402.14740, section 2).
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    sums = torch.stack([torch.as_tensor(kl, dtype=torch.float64).sum() for kl in kls])
    return rewards - kl_coef * sums.to(rewards.device).reshape(rewards.shape)


def penalised_returns(rewards, kls: Sequence[Tensor], kl_coef: float) -> list[Tensor]:
    """For every token, the reward less the KL from this token on: r - kl_coef * sum_{i >= t} KL_i; float64, one (R,) a completion.

    The token-level return of REINFORCE++ (arXiv:2501.03262, "token-level KL penalty"); its advantages are these, standardised
    over all tokens of the step: `group_advantages(torch.cat(returns)[None], method="reinforce++")`.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64).reshape(-1)
    kls = [torch.as_tensor(kl, dtype=torch.float64) for kl in kls]
    return [reward - kl_coef * kl.flip(0).cumsum(0).flip(0) for reward, kl in zip(rewards, kls, strict=True)]


def sequence_weights(
    lengths: Tensor,
    aggregation: str,
    total_tokens: float | None = None,
    total_sequences: float | None = None,
    constant_length: float = 1.0,
    counted: Tensor | None = None,
) -> Tensor:
    """Weight (N,) float64 of each token of N sequences of `lengths` (N,) response tokens: how the loss is aggregated.

    token: 1 / total_tokens, every token alike (DAPO, arXiv:2503.14476, section 3.3 "token-level policy gradient loss").
    sequence: 1 / (length * total_sequences), every sequence alike (GRPO, arXiv:2402.03300, eq. 3).
    constant: 1 / (constant_length * total_sequences), no length favoured (Dr. GRPO, arXiv:2503.20783).

    The totals count the whole optimiser step: all micro-batches, all ranks; by default these N sequences are the step.
    counted (N,) bool: False leaves a sequence out, as if it had not been sampled: weight 0 (overlong filtering, DAPO, section
    3.4). Totals that are given must then be those of the counted sequences.
    """
    lengths = lengths.to(torch.float64)
    counted = torch.ones_like(lengths, dtype=torch.bool) if counted is None else counted
    total_tokens = (lengths * counted).sum().clamp(min=1) if total_tokens is None else total_tokens
    total_sequences = counted.sum().clamp(min=1) if total_sequences is None else total_sequences
    if aggregation == "token":
        weights = torch.ones_like(lengths) / total_tokens
    elif aggregation == "sequence":
        weights = 1.0 / (lengths.clamp(min=1) * total_sequences)
    elif aggregation == "constant":
        weights = torch.ones_like(lengths) / (constant_length * total_sequences)
    else:
        raise ValueError(f"aggregation = {aggregation!r}; choose one of token, sequence, constant")
    return weights * counted


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3", clamp: float | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference) on tokens that the policy sampled (J. Schulman, "Approximating KL
    divergence", 2020; k3 is eq. 4 of GRPO, arXiv:2402.03300).

    With d = reference - policy: k1 = -d (unbiased; as a loss its expected gradient is zero, so use it in the reward, or for
    watching), k2 = d^2 / 2 (as a loss its expected gradient is that of the KL), k3 = exp(d) - d - 1 (unbiased, never negative).
    `clamp` bounds the value (verl uses 10): a token past it has no gradient.
    """
    d = ref_logprobs - logprobs
    if estimator == "k1":
        kl = -d
    elif estimator == "k2":
        kl = 0.5 * d * d
    elif estimator == "k3":
        # The result is clamped below anyway; without this exp overflows and the gradient is infinity * 0 = NaN, not 0.
        d = d.clamp(max=80.0) if clamp is not None else d
        kl = torch.expm1(d) - d
    else:
        raise ValueError(f"estimator = {estimator!r}; choose one of k1, k2, k3")
    return kl if clamp is None else kl.clamp(-clamp, clamp)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    surrogate: str = "ppo",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    rollout_logprobs: Tensor | None = None,
    tis_cap: float | None = 2.0,
    tis_level: str = "token",
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    sequence: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum over tokens of weights * (tis * surrogate + kl_coef * KL - entropy_coef * entropy): a scalar to be minimised, and
    detached per-token terms.

    logprobs: of the sampled tokens under the weights being trained; only they and `entropy` have a gradient.
    old_logprobs: the same under the weights at the start of the step (`logprobs.detach()` if the step has one update).
    advantages, weights: broadcastable to the shape of logprobs, or one a row. Weight 0 leaves a token out, whatever else it holds.
    sequence: flat tensors only, (M,) int64, which sequence a token is of; padded (B, T) has one sequence a row.

    Ratio r at ratio_level token: exp(logprobs - old_logprobs) of the token; sequence: exp(mean of that difference over the
    sequence's tokens), the same for all of them, with the gradient through the mean (GSPO, arXiv:2507.18071, eq. 7).
    Surrogate, with A the advantage:
    ppo: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (PPO, arXiv:1707.06347, eq. 7; separate bounds: "clip-higher" of
        DAPO, arXiv:2503.14476, eq. 10; with sequence ratios GSPO, eq. 5); where A < 0 it is at most -A * dual_clip
        (dual-clip PPO, arXiv:1912.09729, eq. 5).
    cispo: -A logprobs * clip(r, 1 - clip_low, 1 + clip_high) without gradient through the clipped ratio, so that no token loses
        its gradient (CISPO of MiniMax-M1, arXiv:2506.13585, eq. 4 and 5; there only the upper bound is active: clip_low = 1).
    tis = min(exp(old_logprobs - rollout_logprobs), tis_cap), without gradient: truncated importance sampling for the
    difference between the engine that sampled and the learner (Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"); at tis_level sequence, of the sequence's summed difference (Liu et al. 2025, "When
    speed kills stability"). Off if `rollout_logprobs` or `tis_cap` is None. KL: `kl_to_reference`; off without `ref_logprobs`. entropy: of the distribution each
    token was drawn from, a bonus (PPO, eq. 9).

    The dict has per-token tensors "policy_loss" (tis * surrogate), "kl", "clip_low", "clip_high", "dual_clip", "tis_weight",
    "tis_capped", "ratio". Raises ValueError for an unknown name or a combination without meaning.
    """
    _check_choices(surrogate, ratio_level, tis_level, dual_clip)
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef = {entropy_coef} needs `entropy`")
    weights = _per_token(weights, logprobs)
    counted = weights != 0
    keep = lambda x: torch.where(counted, x, 0.0)
    logprobs, old_logprobs, advantages = keep(logprobs), keep(old_logprobs), keep(_per_token(advantages, logprobs))

    log_ratio = logprobs - old_logprobs
    if ratio_level == "sequence":
        tokens = _sequence_sum(counted.to(log_ratio.dtype), sequence)
        log_ratio = _sequence_sum(log_ratio, sequence) / tokens.clamp(min=1)
    # Past this exp overflows in float32, and a clipped token's gradient is 0 * infinity = NaN, not 0.
    ratio = torch.exp(log_ratio.clamp(max=80.0))
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    negative = advantages < 0
    is_dual_clipped = torch.zeros_like(negative)
    if surrogate == "ppo":
        unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
        is_clipped_low, is_clipped_high = is_clipped & negative, is_clipped & ~negative
        if dual_clip is not None:
            bound = -advantages * dual_clip
            is_dual_clipped = negative & (loss > bound)
            loss = torch.where(negative, torch.minimum(loss, bound), loss)
            is_clipped_low = is_clipped_low & ~is_dual_clipped
    else:
        loss = -advantages * clipped_ratio.detach() * logprobs
        is_clipped_low, is_clipped_high = ratio < 1.0 - clip_low, ratio > 1.0 + clip_high

    tis, is_capped = torch.ones_like(ratio), torch.zeros_like(negative)
    if rollout_logprobs is not None and tis_cap is not None:
        log_importance = (old_logprobs - keep(rollout_logprobs)).detach()
        importance = torch.exp(log_importance if tis_level == "token" else _sequence_sum(log_importance, sequence))
        tis, is_capped = importance.clamp(max=tis_cap), importance > tis_cap
        loss = loss * tis

    per_token, kl = loss, torch.zeros_like(ratio)
    if ref_logprobs is not None:
        kl = kl_to_reference(logprobs, keep(ref_logprobs), kl_estimator, kl_clamp)
        per_token = per_token + kl_coef * kl
    if entropy_coef:
        per_token = per_token - entropy_coef * keep(entropy)
    terms = {
        "policy_loss": loss,
        "kl": kl,
        "clip_low": is_clipped_low,
        "clip_high": is_clipped_high,
        "dual_clip": is_dual_clipped,
        "tis_weight": tis,
        "tis_capped": is_capped,
        "ratio": ratio,
    }
    return (weights * per_token).sum(), {name: term.detach() for name, term in terms.items()}


def _check_choices(surrogate: str, ratio_level: str, tis_level: str, dual_clip: float | None) -> None:
    if surrogate not in ("ppo", "cispo"):
        raise ValueError(f"surrogate = {surrogate!r}; choose one of ppo, cispo")
    for name, level in (("ratio_level", ratio_level), ("tis_level", tis_level)):
        if level not in ("token", "sequence"):
            raise ValueError(f"{name} = {level!r}; choose one of token, sequence")
    if surrogate == "cispo" and dual_clip is not None:
        raise ValueError(f"dual_clip = {dual_clip} bounds the ppo surrogate; cispo has clip_high for that")


def _per_token(values: Tensor, like: Tensor) -> Tensor:
    """`values` in the shape of `like`; one value a row where it has one dimension less."""
    return (values[..., None] if values.ndim == like.ndim - 1 else values).expand_as(like)


def _sequence_sum(values: Tensor, sequence: Tensor | None) -> Tensor:
    """For every token the sum over its sequence: (B, T) by rows, flat (M,) by `sequence`."""
    if sequence is not None:
        return values.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, values)[sequence]
    if values.ndim < 2:
        raise ValueError(f"log-probs of shape {tuple(values.shape)} need `sequence` for ratios of sequences; or give (B, T)")
    return values.sum(-1, keepdim=True).expand_as(values)


def rollout_mismatch(logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, Tensor]:
    """Per-token distance between learner and rollout engine on the sampled tokens, with d = learner - rollout.

    "mismatch_kl": exp(d) - d - 1, the k3 estimate of KL(rollout || learner); "mismatch_abs": |d|. Means of them and
    `multiplicative_error` are what a run is watched by; above 0.01 and 1.05 something is wrong (docs/grpo.md).
    """
    d = (logprobs - rollout_logprobs).detach()
    return {"mismatch_kl": torch.expm1(d) - d, "mismatch_abs": d.abs()}


def multiplicative_error(mean_abs: float | Tensor) -> float:
    """exp(mean |d|): the typical factor between the learner's and the engine's probability of a token; 1 is perfect."""
    return float(torch.exp(torch.as_tensor(mean_abs, dtype=torch.float64)))


def token_sums(terms: Mapping[str, Tensor], counted: Tensor | None = None) -> dict[str, Tensor]:
    """Float64 sums (scalars) of per-token terms over the tokens where `counted` is True (all by default)."""
    keep = lambda term: term if counted is None else torch.where(counted, term, 0)
    return {name: keep(term).sum(dtype=torch.float64) for name, term in terms.items()}
