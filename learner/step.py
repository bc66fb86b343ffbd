"""A learner's step in the making: what it trains on, the sums of its terms, and where its time goes."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import Tensor

from .batch import Sample
from .loss import Totals

Plan = list[list[list[int]]]
"""plan[rank][micro-batch] = indices into a step's samples."""


class Step:
    """samples and plans: all so far. sums: of this rank, float64. totals: the denominators of the gradients accumulated so far."""

    def __init__(self, device: torch.device) -> None:
        self.samples: list[Sample] = []
        self.plans: list[Plan] = []
        self.totals: Totals | None = None
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
        self.clock = Clock(device)


class Clock:
    """Seconds by kind of work. On a GPU a lap waits for the device, so that work is booked where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, defaultdict(float)
        self.resume()

    def resume(self) -> None:
        """The time since the last lap does not count."""
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name] += now - self.last
        self.last = now

    def total(self) -> float:
        return sum(self.laps.values())
