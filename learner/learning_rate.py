"""The learning rate of a step: linear warm-up, then constant, linear or cosine. A pure function, so there is no state to save."""

from __future__ import annotations

import math


def learning_rate(
    step: int, total_steps: int, peak: float, warmup_steps: int = 0, schedule: str = "constant", min_ratio: float = 0.0
) -> float:
    """Learning rate of optimiser step `step` (from 0) out of `total_steps`.

    The warm-up rises from peak / warmup_steps to peak; linear and cosine then fall to min_ratio * peak at the last step.
    Steps past the end keep the last value. Raises ValueError for an unknown schedule.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if schedule == "constant":
        factor = 1.0
    elif schedule == "linear":
        factor = 1.0 - progress
    elif schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"learner.lr_schedule = {schedule!r}; choose one of constant, linear, cosine")
    return peak * (min_ratio + (1.0 - min_ratio) * factor) if schedule != "constant" else peak
