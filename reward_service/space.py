"""The space in which thresholds are compared, and the factors that lead into it from answer and target."""

from __future__ import annotations

from typing import Sequence

from reward_service.answer import Answer
from reward_service.target import Target


def factors(answers: Sequence[Answer], target: Target, config) -> tuple[tuple[float, float], tuple[float, float]]:
    """((x, y) for answered coordinates, (x, y) for target coordinates): multiply to get into the space of comparison.

    Answers are scaled from the numbers they wrote, in one multiplication: on an 840x840 policy image with space_size 840
    both steps are exact and the result equals the published code's.
    The answers of a group must come from one prompt, and be converted to this target's frame or not at all.
    """
    first = answers[0]
    for answer in answers:
        if (answer.units_hw, answer.policy_hw, answer.frame_hw) != (first.units_hw, first.policy_hw, first.frame_hw):
            raise ValueError("the answers of one group must share their units and image sizes; score other prompts apart")
    if first.frame_hw is not None and first.frame_hw != target.image_size:
        raise ValueError(f"answers were converted to a frame of {first.frame_hw}, the target is {target.image_size} (H, W)")
    units_h, units_w = first.units_hw or target.image_size
    if config.space == "normalised":
        space_h = space_w = config.space_size
    else:
        space_h, space_w = first.policy_hw or target.image_size
    height, width = target.image_size
    return (space_w / units_w, space_h / units_h), (space_w / width, space_h / height)


def scaled(values: Sequence, factor_xy: tuple[float, float]) -> Sequence:
    """x, y, x, y, ... times the factor; the values untouched (integers, whatever a policy wrote) when it is 1."""
    return values if factor_xy == (1.0, 1.0) else [v * factor_xy[i % 2] for i, v in enumerate(values)]
