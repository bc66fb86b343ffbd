"""The completions of one prompt, and what several terms share: each part is computed for the whole group, once, and only if asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Optional

import numpy as np

from reward_service import accuracy, terms
from reward_service.answer import Answer
from reward_service.config import RewardConfig
from reward_service.space import factors
from reward_service.target import MissingInput, Target, mask_stack, without
from reward_service.video import VideoOverlap


class Group:
    """answers: G. objects: of each those that earn accuracy. given: of each what was passed as predicted_masks, or None.

    to_answer, to_target: factors (x, y) into the space of comparison, see `space.factors`.
    """

    def __init__(self, answers: Sequence[Answer], target: Target, config: RewardConfig, predicted_masks: Optional[Sequence]) -> None:
        self.answers, self.target, self.config = answers, target, config
        self.given = [None] * len(answers) if predicted_masks is None else predicted_masks
        # Only a strict answer earns accuracy: a salvaged one has objects for the segmenter and the log.
        self.objects = [a.answered[: config.max_objects] if a.strict else () for a in answers]
        self.to_answer, self.to_target = factors(answers, target, config)

    @cached_property
    def says_nothing(self) -> list[float]:
        """What accuracy is where there is nothing to find: the empty list is exactly right, anything else exactly wrong."""
        return [float(a.strict and a.n_items == 0) for a in self.answers]

    @cached_property
    def accuracy(self) -> dict[str, list[float]]:
        """The active ones of iou, box_l1 and point, which one matching joins."""
        return self._accuracy_and_box_iou[0]

    @cached_property
    def box_iou(self) -> list[float]:
        """Mean IoU of boxes matched by IoU, over the larger number of objects."""
        return self._accuracy_and_box_iou[1]

    @cached_property
    def _accuracy_and_box_iou(self):
        return accuracy.accuracy(self)

    @cached_property
    def masks(self) -> list[Optional[np.ndarray]]:
        """Of each answer bool (len(answer.objects), H, W) on the target frame, None where none were passed."""
        needed = self.config.mask_terms if len(self.target) else ()
        if needed and self.target.frame is None and any(isinstance(given, Mapping) for given in self.given):
            raise MissingInput(f"an active term ({', '.join(needed)}) needs the target frame's masks out of {{frame id: masks}}: set target.frame to its id")
        return [self._on_target_frame(*one, bool(needed)) for one in zip(self.answers, self.objects, self.given)]

    def _on_target_frame(self, answer: Answer, mine, given, needed: bool) -> Optional[np.ndarray]:
        what = "predicted_masks"
        if isinstance(given, Mapping):
            given, what = given.get(self.target.frame), f"predicted_masks[{self.target.frame!r}]"
        if given is None and needed:
            if mine:
                raise ValueError(f"{what} is None for an answer with objects; pass one mask for each of answer.objects on the target frame")
            return np.zeros((0, *self.target.image_size), bool)
        if given is None:
            return None
        if len(given) != len(answer.objects):
            raise ValueError(f"{what} has {len(given)} masks for an answer of {len(answer.objects)} objects")
        return mask_stack(given, self.target.image_size, what)

    def counted(self, masks: np.ndarray) -> np.ndarray:
        """Masks (..., H, W) on the target frame without the pixels that it ignores."""
        return without(masks, self._ignored_HW)

    @cached_property
    def _ignored_HW(self) -> Optional[np.ndarray]:
        return self.target.ignored_HW()

    @cached_property
    def mask_iou(self) -> list[Optional[float]]:
        """IoU of the unions on the target frame, None where no masks were passed."""
        if not len(self.target):
            return self.says_nothing
        truth = self.counted(self.target.union_HW("mask_iou"))
        return [None if m is None else terms.union_iou(self.counted(m[: len(mine)].any(axis=0)), truth) for m, mine in zip(self.masks, self.objects)]

    @cached_property
    def video(self) -> VideoOverlap:
        """The propagated masks against the truth."""
        return VideoOverlap.of(self)
