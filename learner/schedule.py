"""Which rank trains on which samples in which micro-batch: a pure function of lengths, the same on every rank.

Completions of a group stay together while the budget allows, so that their prompt (and its frames) is computed once. All
ranks get the same number of micro-batches, since under ZeRO every forward pass is a collective; a rank that has too little
gets empty ones, which the worker fills with a pass of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ScheduleError(ValueError):
    """Lengths that fit no schedule; the message names the sample, its length and the setting."""


@dataclass(frozen=True)
class SampleSize:
    """What a sample costs: tokens of its prompt and response, vision patches of its prompt, and the group it belongs to."""

    group: int
    prompt_tokens: int
    response_tokens: int
    patches: int = 0


@dataclass(frozen=True)
class _Unit:
    """Some completions of one group: what is computed together."""

    samples: tuple[int, ...]
    tokens: int
    cost: float


def unit_tokens(sizes: Sequence[SampleSize]) -> int:
    """Tokens of completions of one group computed together: the prompt once."""
    return sizes[0].prompt_tokens + sum(s.response_tokens for s in sizes)


def unit_cost(sizes: Sequence[SampleSize], hidden_size: int = 1024) -> float:
    """Work of completions of one group computed together, in tokens of a linear layer.

    A token's linear layers cost about 12 D^2 multiplications a layer and its attention 2 D times what it looks at: a pair of
    tokens counts 1 / (6 D). A vision patch counts 1/4 (towers are smaller than the policy, but do not shrink to a merged token).
    """
    p, responses = sizes[0].prompt_tokens, [s.response_tokens for s in sizes]
    pairs = p * p / 2 + sum(r * (p + r / 2) for r in responses)
    return p + sum(responses) + pairs / (6 * hidden_size) + sizes[0].patches / 4


def schedule(sizes: Sequence[SampleSize], ranks: int, token_budget: int, hidden_size: int = 1024) -> list[list[list[int]]]:
    """plan[rank][micro-batch] = indices into `sizes`.

    Every sample appears once; no micro-batch holds more than `token_budget` tokens (a prompt counts once for its completions
    in the micro-batch); all ranks have equally many micro-batches, at least one; ranks are balanced by `unit_cost`, the
    longest units first. Raises ScheduleError if a sample alone exceeds the budget. Deterministic.
    """
    for i, size in enumerate(sizes):
        if size.prompt_tokens + size.response_tokens > token_budget:
            raise ScheduleError(
                f"sample {i} has {size.prompt_tokens} prompt and {size.response_tokens} response tokens, more than "
                f"learner.tokens_per_microbatch = {token_budget}; raise it, or shorten prompts or responses"
            )
    make = lambda members: _Unit(tuple(members), unit_tokens([sizes[i] for i in members]), unit_cost([sizes[i] for i in members], hidden_size))
    units = [make(part) for members in _groups(sizes) for part in _fitting(members, sizes, token_budget)]
    while len(units) < ranks and any(len(u.samples) > 1 for u in units):
        units = _split_one(units, make)

    loads, shares = [0.0] * ranks, [[] for _ in range(ranks)]
    for unit in sorted(units, key=lambda u: (-u.cost, u.samples)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += unit.cost
        shares[rank].append(unit)

    bins = [_first_fit(share, token_budget) for share in shares]
    count = max(1, max(len(b) for b in bins))
    return [[sorted(i for u in units for i in u.samples) for units in _spread(b, count, make)] for b in bins]


def _groups(sizes: Sequence[SampleSize]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        members.setdefault(size.group, []).append(i)
    return list(members.values())


def _fitting(members: list[int], sizes: Sequence[SampleSize], token_budget: int) -> list[list[int]]:
    """The group, or its parts if it exceeds the budget: as few and as even as first-fit finds, longest completions first."""
    prompt = sizes[members[0]].prompt_tokens
    parts: list[list[int]] = []
    room: list[int] = []
    for i in sorted(members, key=lambda i: (-sizes[i].response_tokens, i)):
        need = sizes[i].response_tokens
        fit = [k for k in range(len(parts)) if room[k] >= need]
        if fit:
            k = max(fit, key=lambda k: (room[k], -k))
        else:
            k = len(parts)
            parts.append([])
            room.append(token_budget - prompt)
        parts[k].append(i)
        room[k] -= need
    return [sorted(part) for part in parts]


def _split_one(units: list[_Unit], make) -> list[_Unit]:
    """Cut the costliest unit that has several completions in two."""
    k = max((k for k, u in enumerate(units) if len(u.samples) > 1), key=lambda k: (units[k].cost, -k))
    samples = units[k].samples
    return units[:k] + [make(samples[::2]), make(samples[1::2])] + units[k + 1 :]


def _first_fit(units: list[_Unit], token_budget: int) -> list[list[_Unit]]:
    bins: list[list[_Unit]] = []
    room: list[int] = []
    for unit in sorted(units, key=lambda u: (-u.tokens, u.samples)):
        k = next((k for k in range(len(bins)) if room[k] >= unit.tokens), len(bins))
        if k == len(bins):
            bins.append([])
            room.append(token_budget)
        bins[k].append(unit)
        room[k] -= unit.tokens
    return bins


def _spread(bins: list[list[_Unit]], count: int, make) -> list[list[_Unit]]:
    """`count` micro-batches from fewer: the ones with most units are halved (free), then stay empty (the caller fills them).

    A unit is never cut here: its prompt would be computed again for nothing.
    """
    bins = [list(b) for b in bins]
    while len(bins) < count:
        k = max(range(len(bins)), key=lambda k: (len(bins[k]), -k), default=None)
        if k is None or len(bins[k]) < 2:
            bins.append([])
            continue
        bins.append(bins[k][1::2])
        bins[k] = bins[k][::2]
    return bins
