"""GRPO and its relatives as pure functions: group advantages, the clipped policy loss, KL estimators, and what is measured of them.

Nothing here knows of models, ranks or micro-batches. A per-token tensor may have any shape: flat (M,) as the learner packs
them, or padded (B, T) with weight 0 on the padding. The loss is a weighted SUM over tokens; `sequence_weights` gives weights
that are normalised over the whole step, so that a split into micro-batches and ranks cannot change the gradient.
Papers and config keys: docs/grpo.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def group_advantages(rewards, groups=None, method: str = "grpo", eps: float = 1e-6) -> Tensor:
    """Advantages of completions from the rewards of their groups.

    rewards: (N,) with `groups` (N,), integers that say which group each completion belongs to, or (B, G) with one group a
    row. Lists, arrays or tensors; everything is computed, and returned, in float64, in the shape of `rewards`.

    grpo: (r - mean) / (std + eps) within the group, std unbiased (DeepSeekMath, arXiv:2402.03300, section 4.1.2; the
        unbiased std and eps 1e-6 as published in the verl line, see domain.md 2.9).
    dr_grpo: r - mean, no division (Dr. GRPO, arXiv:2503.20783, section 3.2).
    rloo: r - mean of the others of the group (arXiv:2402.14740, section 3.2) = G / (G - 1) * (r - mean).
    reinforce++: (r - mean) / (std + eps) over ALL completions given (arXiv:2501.03262); groups play no part.
    reinforce++_baseline: r - group mean, then standardised over all completions (same paper, "w/ baseline").

    A group whose rewards are all equal (max == min in float64; also a group of one) gets exactly 0: rounding errors of the
    mean, divided by a tiny std, would otherwise become advantages of hundreds. With reinforce++ this holds for the batch.
    Raises ValueError for an unknown method, a wrong shape, or rewards that are not finite.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    if groups is None:
        if rewards.ndim != 2:
            raise ValueError(f"rewards of shape {tuple(rewards.shape)} need `groups`, one integer for each; or give (B, G)")
        groups = torch.arange(rewards.shape[0], device=rewards.device)[:, None].expand_as(rewards)
    groups = torch.as_tensor(groups, device=rewards.device)
    if groups.shape != rewards.shape:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}, groups {tuple(groups.shape)}")
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
        advantages = advantages.masked_fill(_constant(centred, everything), 0.0)
    else:
        raise ValueError(f"method = {method!r}; choose one of grpo, dr_grpo, rloo, reinforce++, reinforce++_baseline")
    if method != "reinforce++_baseline":
        advantages = advantages.masked_fill(_constant(flat, index), 0.0)
    return advantages.reshape(rewards.shape)


def constant_groups(rewards, groups) -> Tensor:
    """bool (number of groups,), groups in ascending order: True where all rewards of a group (N,) are equal in float64."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    index = torch.unique(torch.as_tensor(groups), return_inverse=True)[1]
    return _extreme(rewards, index, "amax") == _extreme(rewards, index, "amin")


def _mean(values: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(int(index.max()) + 1, dtype=values.dtype).index_add_(0, index, values) / torch.bincount(index)


def _centred(values: Tensor, index: Tensor) -> Tensor:
    return values - _mean(values, index)[index]


def _unbiased_std(values: Tensor, index: Tensor) -> Tensor:
    squares = _mean(_centred(values, index) ** 2, index) * torch.bincount(index)
    return torch.sqrt(squares / (torch.bincount(index) - 1).clamp(min=1))[index]


def _extreme(values: Tensor, index: Tensor, reduce: str) -> Tensor:
    start = torch.zeros(int(index.max()) + 1, dtype=values.dtype)
    return start.scatter_reduce_(0, index, values, reduce, include_self=False)


def _constant(values: Tensor, index: Tensor) -> Tensor:
    return (_extreme(values, index, "amax") == _extreme(values, index, "amin"))[index]


def sequence_weights(
    lengths: Tensor, aggregation: str, total_tokens: float, total_sequences: float, constant_length: float = 1.0
) -> Tensor:
    """Weight (N,) of each token of N sequences of `lengths` (N,) response tokens.

    The totals count the whole step: all micro-batches, all ranks.
    token: 1 / total_tokens, every token alike (DAPO, arXiv:2503.14476, "token-level policy gradient loss").
    sequence: 1 / (length * total_sequences), every sequence alike (GRPO, arXiv:2402.03300, eq. 3).
    constant: 1 / (constant_length * total_sequences), no length favoured (Dr. GRPO, arXiv:2503.20783).
    """
    lengths = lengths.to(torch.float64)
    if aggregation == "token":
        return torch.full_like(lengths, 1.0 / total_tokens)
    if aggregation == "sequence":
        return 1.0 / (lengths * total_sequences)
    if aggregation == "constant":
        return torch.full_like(lengths, 1.0 / (constant_length * total_sequences))
    raise ValueError(f"aggregation = {aggregation!r}; choose one of token, sequence, constant")


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3", clamp: float | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference) on tokens that the policy sampled (J. Schulman, "Approximating KL
    divergence", 2020; k3 is eq. 4 of GRPO, arXiv:2402.03300).

    With d = reference - policy: k1 = -d (unbiased; as a loss its expected gradient is zero, so use it for watching), k2 = d^2 / 2,
    k3 = exp(d) - d - 1. `clamp` bounds the value (verl uses 10): a token past it has no gradient.
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
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    rollout_logprobs: Tensor | None = None,
    tis_cap: float | None = 2.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum over tokens of weights * (tis * clipped surrogate + kl_coef * KL): a scalar, and detached per-token terms.

    logprobs: of the sampled tokens under the weights being trained (the only input with a gradient).
    old_logprobs: the same under the weights at the start of the step (`logprobs.detach()` if the step has one update).
    advantages, weights: broadcastable to the shape of logprobs; weight 0 leaves a token out.

    Surrogate, with r = exp(logprobs - old_logprobs) and A the advantage: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    (PPO, arXiv:1707.06347, eq. 7; separate bounds: "clip-higher" of DAPO, arXiv:2503.14476); where A < 0 it is at most
    -A * dual_clip (dual-clip PPO, arXiv:1912.09729, eq. 5).
    tis = min(exp(old_logprobs - rollout_logprobs), tis_cap), without gradient: truncated importance sampling for the
    difference between the engine that sampled and the learner (Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"). Off if `rollout_logprobs` or `tis_cap` is None.

    The dict has per-token tensors "policy_loss", "kl", "clip_low", "clip_high", "dual_clip", "tis_weight", "tis_capped", "ratio".
    """
    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    negative = (advantages < 0).expand_as(ratio)
    is_clipped = clipped > unclipped
    is_dual_clipped = torch.zeros_like(negative)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        is_dual_clipped = negative & (surrogate > bound)
        surrogate = torch.where(negative, torch.minimum(surrogate, bound), surrogate)

    tis, is_capped = torch.ones_like(ratio), torch.zeros_like(negative)
    if rollout_logprobs is not None and tis_cap is not None:
        importance = torch.exp((old_logprobs - rollout_logprobs).detach())
        tis, is_capped = importance.clamp(max=tis_cap), importance > tis_cap
        surrogate = surrogate * tis

    per_token, kl = surrogate, torch.zeros_like(ratio)
    if ref_logprobs is not None:
        kl = kl_to_reference(logprobs, ref_logprobs, kl_estimator, kl_clamp)
        per_token = surrogate + kl_coef * kl
    terms = {
        "policy_loss": surrogate,
        "kl": kl,
        "clip_low": is_clipped & negative & ~is_dual_clipped,
        "clip_high": is_clipped & ~negative,
        "dual_clip": is_dual_clipped,
        "tis_weight": tis,
        "tis_capped": is_capped,
        "ratio": ratio,
    }
    return (weights * per_token).sum(), {name: term.detach() for name, term in terms.items()}


def rollout_mismatch(logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, Tensor]:
    """Per-token distance between learner and rollout engine on the sampled tokens, with d = learner - rollout.

    "mismatch_kl": exp(d) - d - 1, the k3 estimate of KL(rollout || learner); "mismatch_abs": |d|. Means of them and
    `multiplicative_error` are what a run is watched by (lessons.md 5, point 4: warn above 0.01 and 1.05).
    """
    d = (logprobs - rollout_logprobs).detach()
    return {"mismatch_kl": torch.expm1(d) - d, "mismatch_abs": d.abs()}


def multiplicative_error(mean_abs: float | Tensor) -> float:
    """exp(mean |d|): the typical factor between the learner's and the engine's probability of a token; 1 is perfect."""
    return float(torch.exp(torch.as_tensor(mean_abs, dtype=torch.float64)))


def token_sums(terms: Mapping[str, Tensor], counted: Tensor | None = None) -> dict[str, Tensor]:
    """Float64 sums (scalars) of per-token terms over the tokens where `counted` is True (all by default)."""
    keep = slice(None) if counted is None else counted
    return {name: term[keep].sum(dtype=torch.float64) for name, term in terms.items()}
