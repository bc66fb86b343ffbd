"""The loss of one micro-batch as the configuration says, normalised by the whole optimiser step's totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import MicroBatch, Sample
from .config import LearnerConfig
from .grpo import policy_loss, sequence_weights


@dataclass(frozen=True)
class Totals:
    """What an optimiser step trains on, over all its micro-batches and all ranks: the denominators of its loss."""

    tokens: int
    sequences: int


def step_totals(config: LearnerConfig, samples: Sequence[Sample]) -> Totals:
    """Totals of the samples of one optimiser step, known before its first backward pass; masked completions do not count."""
    counted = [s for s in samples if not (config.mask_overlong and s.truncated)]
    return Totals(sum(len(s.response_ids) for s in counted), len(counted))


def rescale(config: LearnerConfig, used: Totals, true: Totals) -> float:
    """What a loss with the denominators `used` is to be multiplied by to have those of `true`."""
    by_token = config.loss_aggregation == "token"
    return max(1, used.tokens) / max(1, true.tokens) if by_token else max(1, used.sequences) / max(1, true.sequences)


def counted_sequences(config: LearnerConfig, batch: MicroBatch, active: bool = True) -> Tensor:
    """bool (N,): which completions take part in the loss. None does in a micro-batch that only keeps ranks in step."""
    return (~batch.truncated if config.mask_overlong else torch.ones_like(batch.truncated)) & active


def micro_batch_loss(
    config: LearnerConfig, batch: MicroBatch, totals: Totals, logprobs: Tensor, old: Tensor,
    reference: Tensor | None = None, entropy: Tensor | None = None, active: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss, and the per-token terms of `policy_loss`. All per-token tensors are (M,).

    The sum over micro-batches and ranks is the step's loss, however they are cut.
    """
    weights = sequence_weights(
        batch.lengths, config.loss_aggregation, max(1, totals.tokens), max(1, totals.sequences), config.constant_length,
        counted_sequences(config, batch, active),
    )
    return policy_loss(
        logprobs, old, batch.advantages, weights.to(logprobs.dtype)[batch.sequence], sequence=batch.sequence,
        surrogate=config.surrogate, ratio_level=config.ratio_level,
        clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
        rollout_logprobs=batch.rollout_logprobs, tis_cap=config.tis_cap, tis_level=config.tis_level,
        ref_logprobs=reference, kl_coef=config.kl_coef, kl_estimator=config.kl_estimator, kl_clamp=config.kl_clamp,
        entropy=entropy, entropy_coef=config.entropy_coef,
    )
