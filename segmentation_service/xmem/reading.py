"""The arithmetic of reading memory: similarity of keys, softmax over the best, and soft aggregation of masks. Pure functions."""

from __future__ import annotations

import math

import torch

BLOCK = 32
"""Length of the runs whose maxima `top_k` looks at first: near the square root of columns / k for a full memory."""


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision widened, for what autocast must not coarsen; float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def memory_rows(key_NC: torch.Tensor, shrinkage_N1: torch.Tensor) -> torch.Tensor:
    """Memory elements as rows (N, 2C + 1), computed when they are written.

    The similarity -(s / sqrt(C)) sum_c e_c (k_c - q_c)^2 of element and query is a sum of products: the dot product of
    [-s k^2, 2 s k, -s] / sqrt(C) here with [e, e q, sum e q^2] of `query_rows`.
    """
    scaled = shrinkage_N1 / math.sqrt(key_NC.shape[1])
    return torch.cat([-scaled * key_NC.square(), 2 * scaled * key_NC, -scaled], 1)


def query_rows(key_QC: torch.Tensor, selection_QC: torch.Tensor) -> torch.Tensor:
    """Queries as rows (Q, 2C + 1); see `memory_rows`."""
    selected = selection_QC * key_QC
    return torch.cat([selection_QC, selected, (selected * key_QC).sum(1, keepdim=True)], 1)


def top_k(scores_QN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and their places (Q, k), in no order, as `torch.topk` finds them but faster on long rows.

    A number among the k largest lies in one of the k blocks with the largest maxima, so that only those are searched.
    """
    rows, columns = scores_QN.shape
    blocks = columns // BLOCK
    if blocks < 4 * k:
        return scores_QN.topk(k, dim=1, sorted=False)
    # Block b holds columns b, b + blocks, ...: its maximum runs over slices that are contiguous in memory.
    maxima_QB = scores_QN[:, : blocks * BLOCK].unflatten(1, (BLOCK, blocks)).amax(1)
    best_Qk = maxima_QB.topk(k, dim=1, sorted=False).indices
    places = (best_Qk[:, :, None] + torch.arange(BLOCK, device=scores_QN.device) * blocks).flatten(1)
    rest = torch.arange(blocks * BLOCK, columns, device=scores_QN.device).expand(rows, -1)
    places = torch.cat([places, rest], 1)
    values, chosen = scores_QN.gather(1, places).topk(k, dim=1, sorted=False)
    return values, places.gather(1, chosen)


def soft_aggregate(probs_NHW: torch.Tensor) -> torch.Tensor:
    """Probabilities (1 + N, H, W) that sum to 1, background first, from each object's own probability.

    The background's is the product of the objects' complements; all are made to compete by their odds.
    """
    probs_NHW = at_least_float32(probs_NHW)
    probs = torch.cat([(1 - probs_NHW).prod(0, keepdim=True), probs_NHW]).clamp_(1e-7, 1 - 1e-7)
    odds = probs / (1 - probs)
    return odds / odds.sum(0, keepdim=True)
