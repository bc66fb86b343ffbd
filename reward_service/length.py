"""Soft length penalty: how long a completion may reason, by difficulty, and what going over costs."""

from __future__ import annotations

from typing import Optional

from reward_service.config import LengthConfig
from reward_service.tags import think_text
from reward_service.target import MissingInput


def difficulty_class(difficulty: float, config: LengthConfig) -> str:
    """easy: D < easy_below; medium: easy_below <= D < hard_from; hard: D >= hard_from. NaN is an error."""
    if difficulty != difficulty:
        raise ValueError("difficulty is NaN; pass None where it is unknown")
    if difficulty >= config.hard_from:
        return "hard"
    return "medium" if difficulty >= config.easy_below else "easy"


def budget(difficulty: Optional[float], uncertainty: Optional[float], config: LengthConfig) -> Optional[float]:
    """Units of length that are free, or None for no limit. Uncertainty widens the hard budget only (PixelThink)."""
    name = difficulty_class(config.default_difficulty if difficulty is None else difficulty, config)
    base = {"easy": config.easy_budget, "medium": config.medium_budget, "hard": config.hard_budget}[name]
    if base is None:
        return None
    if name == "hard":
        base += config.uncertainty_scale * (uncertainty or 0.0)
    return config.budget_scale * base


def penalty(used: float, allowed: Optional[float], config: LengthConfig) -> float:
    """s = 1 - beta * max(0, used - allowed), kept at or above the floor when clamped; 1 where there is no limit."""
    if allowed is None:
        return 1.0
    s = 1.0 - config.beta * max(0.0, used - allowed)
    return max(config.floor, s) if config.clamp else s


def used_length(text: str, length: Optional[float], config: LengthConfig) -> float:
    """`length` if it is given; else words, counted by white space; MissingInput when tokens are asked for."""
    if length is not None:
        if not length >= 0:
            raise ValueError(f"length={length!r} must be a count >= 0")
        return float(length)
    if config.unit == "words":
        return float(len(text.split()))
    if config.unit == "think_words":
        return float(len(think_text(text).split()))
    raise MissingInput(f"the length penalty counts {config.unit}: pass length=..., or set length.unit to a unit of words")
