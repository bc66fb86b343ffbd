"""Propagated masks of a group against the truth: every annotated frame is gone through once, and no mask is decoded twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reward_service import matching, measures
from reward_service.target import MissingInput, mask_stack, without

if TYPE_CHECKING:
    from reward_service.group import Group


@dataclass(frozen=True)
class VideoOverlap:
    """G answers over T annotated frames in rising order; P objects of all answers, N true ones. What no active term needs is left out.
    Pixels that a frame ignores are in no mask.

    pairs_PN: mean over the frames of J of each pair. j_G, f_G: mean J and mean F of the unions of objects. An object, or an answer,
    without a mask on any of the frames has 0 in all of them: else it would earn the frames on which the target is out of view.
    changes_TG, true_changes_T: IoU of the union on each frame and the next, (T - 1, G) and (T - 1,). Two empty masks have J = F = IoU = 1.
    """

    pairs_PN: np.ndarray
    j_G: np.ndarray
    f_G: np.ndarray
    changes_TG: np.ndarray
    true_changes_T: np.ndarray

    @classmethod
    def of(cls, group: Group) -> VideoOverlap:
        """Raises MissingInput where the target lacks frames or their masks, ValueError where predicted masks do not fit."""
        target, config = group.target, group.config
        if not target.frames:
            active = ", ".join(config.video_terms)
            raise MissingInput(f"an active term ({active}) needs target.frames: {{frame id: FrameTarget(masks)}} of the annotated frames")
        by_object = "accuracy_iou=video" in config.video_terms
        by_boundary = config.weights.video_quality > 0 and config.video_measure != "j"
        count = len(group.answers)
        owner_P = np.repeat(np.arange(count), [len(mine) for mine in group.objects])
        pairs_PN, found_P = np.zeros((len(owner_P), len(target))), np.zeros(len(owner_P), bool)
        j_TG, f_TG, changes_TG, true_changes_T = [], [], [], []
        before = None
        for frame in sorted(target.frames):  # one at a time: the masks of a group on a whole video would not fit
            ignored_HW = target.ignored_HW(frame)
            true_NHW = without(target.frame_masks_NHW(frame) if by_object else target.video_union_HW(frame)[None], ignored_HW)
            true_HW = true_NHW.any(axis=0)
            unions_GHW = np.zeros((count, *target.image_size), bool)
            for g in range(count):
                masks_MHW, rows = without(_tracked(group, g, frame), ignored_HW), owner_P == g
                unions_GHW[g] = masks_MHW.any(axis=0)
                found_P[rows] |= masks_MHW.any(axis=(1, 2))
                if by_object:
                    pairs_PN[rows] += matching.mask_iou_matrix(masks_MHW, true_NHW, both_empty=1.0)
            true_GHW = np.broadcast_to(true_HW, unions_GHW.shape)
            j_TG.append(measures.jaccard(unions_GHW, true_GHW))
            if by_boundary:
                f_TG.append(measures.boundary_f(unions_GHW, true_GHW))
            if before is not None and config.weights.temporal_consistency:
                changes_TG.append(measures.jaccard(before[0], unions_GHW))
                true_changes_T.append(measures.jaccard(before[1], true_HW))
            before = unions_GHW, true_HW
        found_G = np.bincount(owner_P, found_P, count) > 0
        # Summed frame by frame, so that an answer's last bit does not depend on its group.
        mean = lambda values_TG: np.where(found_G, sum(values_TG) / len(target.frames), 0.0)
        return cls(
            np.where(found_P[:, None], pairs_PN / len(target.frames), 0.0),
            mean(j_TG),
            mean(f_TG),
            np.array(changes_TG),
            np.array(true_changes_T),
        )

    def measure(self, name: str) -> np.ndarray:
        """(G,) mean J, mean F or the mean of both, as `video_measure` has it."""
        return {"j": self.j_G, "f": self.f_G, "jf": (self.j_G + self.f_G) / 2}[name]


def _tracked(group: Group, g: int, frame: int) -> np.ndarray:
    """bool (M, H, W): the masks on a frame of the objects that count."""
    answer, mine, track, size = group.answers[g], group.objects[g], group.given[g], group.target.image_size
    if not mine:
        return np.zeros((0, *size), bool)
    if not isinstance(track, Mapping) or track.get(frame) is None:
        raise ValueError(f"predicted_masks lacks frame {frame!r} of target.frames for an answer with objects; pass {{frame id: masks}} with every one")
    if frame == group.target.frame:
        return group.masks[g][: len(mine)]
    if len(track[frame]) != len(answer.objects):
        raise ValueError(f"predicted_masks[{frame!r}] has {len(track[frame])} masks for an answer of {len(answer.objects)} objects")
    return mask_stack(track[frame][: len(mine)], size, f"predicted_masks[{frame!r}]")
