"""Difficulty of a sample, 1 (easy) to 10 (hard): rated before training, estimated from the policy's own success, or both blended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

SOURCES = ("offline", "offline_then_online", "online", "blend")
EASIEST, HARDEST = 1.0, 10.0


@dataclass
class DifficultyConfig:
    """Where the difficulty that sets the length budget comes from. The online estimate is ours: the paper rates offline."""

    source: str = field(
        default="offline",
        metadata={
            "help": "offline: the sample's rating; offline_then_online: that, or the estimate where it has none; online: the estimate; blend: both",
            "choices": SOURCES,
        },
    )
    success: str = field(
        default="box_iou",
        metadata={"help": "What tells whether a completion succeeded: IoU of its boxes, or of its mask on the target frame.", "choices": ("box_iou", "mask_iou")},
    )
    success_above: float = field(default=0.5, metadata={"help": "A completion succeeded if its IoU is above this.", "min": 0.0, "max": 1.0})
    newest_weight: float = field(
        default=0.5, metadata={"help": "Weight of the newest group in the exponential average of a sample's success rate.", "above": 0.0, "max": 1.0}
    )
    online_weight: float = field(default=0.5, metadata={"help": "Share of the online estimate in a blend.", "min": 0.0, "max": 1.0})

    @property
    def is_online(self) -> bool:
        return self.source != "offline"


class OnlineDifficulty:
    """Success rates of samples as the policy improves, and the difficulties that follow.

    A sample's rate is the exponential average of its groups' shares of completions that succeeded; the first group's share
    starts it. Its difficulty is 10 - 9 x rate: 1 where everything succeeds, 10 where nothing does.

    Reading never changes anything, so that all groups of a step are scored with the rates at its beginning and their own
    success, in whatever order they finish; `update` is called once the step was learned.
    """

    def __init__(self, config: Optional[DifficultyConfig] = None):
        self.config = config or DifficultyConfig(source="online")
        self.rates: dict[str, float] = {}

    def rate(self, sample: str, success: float) -> float:
        """The sample's average with the success of the group at hand (0..1) in it."""
        if not 0 <= success <= 1:
            raise ValueError(f"success={success!r}: give the share of a group's completions that succeeded, 0..1")
        before = self.rates.get(sample, success)
        return before + self.config.newest_weight * (success - before)

    def difficulty(self, sample: str, rated: Optional[float], success: float) -> Optional[float]:
        """1..10 for the group at hand, by `config.source`. rated: the offline rating, or None. A blend without one is the estimate."""
        source, weight = self.config.source, self.config.online_weight
        if source == "offline" or (source == "offline_then_online" and rated is not None):
            return rated
        estimate = HARDEST - (HARDEST - EASIEST) * self.rate(sample, success)
        return weight * estimate + (1 - weight) * rated if source == "blend" and rated is not None else estimate

    def update(self, sample: str, success: float) -> None:
        """Takes the group's success into the sample's average."""
        self.rates[sample] = self.rate(sample, success)

    def state_dict(self) -> dict:
        """JSON values: {"rates": {sample: rate}}."""
        return {"rates": dict(self.rates)}

    def load_state_dict(self, state: Mapping) -> None:
        """Raises ValueError if it is not what `state_dict` returned."""
        rates = state.get("rates")
        if not isinstance(rates, Mapping) or not all(isinstance(r, (int, float)) and 0 <= r <= 1 for r in rates.values()):
            raise ValueError("not a state of OnlineDifficulty: `rates` must map samples to success rates in 0..1")
        self.rates = {str(sample): float(rate) for sample, rate in rates.items()}


def success_rate(ious: Sequence[float], above: float) -> float:
    """Share of a group's completions whose IoU is above the threshold, strictly."""
    if not len(ious):
        raise ValueError("a group without completions has no success rate")
    return sum(iou > above for iou in ious) / len(ious)


def uncertainty(top_two_logprobs: Sequence[Sequence[float]]) -> float:
    """PixelThink's uncertainty of a completion: the mean over its tokens of 1 - (p1 - p2), each in 0..1.

    top_two_logprobs: (T, 2), per generated token the natural log-probabilities of the most likely token and the one after it (-inf:
    there is none). A completion without tokens has uncertainty 0 (ours).
    """
    gaps = [abs(math.exp(first) - math.exp(second)) for first, second in top_two_logprobs]
    return sum(min(1.0, max(0.0, 1.0 - gap)) for gap in gaps) / len(gaps) if gaps else 0.0
