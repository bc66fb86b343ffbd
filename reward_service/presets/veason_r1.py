"""Veason-R1: format, choice of key frame, box IoU there, mask IoU through the video (video_match_keyframe_sam_sft_mod.py).

Kept as published: `keyframe_timestamp` may be true or (outside the format) "3" or 3.7; absent objects are truths with the
box [0, 0, 0, 0]; boxes left over after matching are not propagated, so they cost nothing in video_iou.
Ours: the matched IoU is kept within 0..1, which integer overflow in the published arithmetic can leave; video_iou is 0 where
a matched box is not among `answer.objects`, because it is no box (eight numbers, true) or the text has another answer as well.
The published code works on 560x560 images and masks: give the target that size to get its values.
"""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
from scipy.optimize import linear_sum_assignment

from reward_service import terms
from reward_service.presets.vision_reasoner import all_plain, decoded, iou_matrix, numbers, scaled_array, slices
from reward_service.space import factors
from reward_service.tags import first_answer, first_answer_object, has_think_format
from reward_service.target import MissingInput, Target, union_of

CONFIG = {
    "weights": {"think_format": 1.0, "segmentation_format": 1.0, "keyframe": 1.0, "iou": 1.0, "video_iou": 1.0},
    "length": {"penalty": False},
    "space_size": 560,
    "max_objects": 120,
}
SETTINGS = ("space", "space_size", "max_objects")
MAXIMA = {"think_format": 1.0, "segmentation_format": 1.0, "keyframe": 1.0, "iou": 1.0, "video_iou": 1.0}


def group_terms(answers, target: Target, config, predicted_masks):
    """Terms of each answer. Needs target.frames (boxes, and masks for keyframe and video_iou).

    predicted_masks, for video_iou: per answer a mapping from each frame id of target.frames to the masks of
    `answer.objects` on it, carried from the frame the answer names; None where the answer has no objects.
    """
    weights = config.weights  # what they need is asked for before the answers are looked at: a missing input must not hide
    if not target.frames and (weights.keyframe or weights.iou or weights.video_iou):
        raise MissingInput("formula 'veason_r1' needs target.frames: {frame id: FrameTarget(boxes, masks)} of the shown frames")
    to_answer, to_target = factors(answers, target, config)
    frames = target.frames or {}
    areas = {f: int(target.frame_union(f).sum()) for f in frames} if weights.keyframe or weights.video_iou else {}
    boxes = {f: target.frame_boxes(f) for f in frames} if weights.iou or weights.video_iou else {}
    said = [decoded(first_answer(answer.text)) for answer in answers]
    named = [_frame(data, frames) for data in said]
    truths = {f: _truth(boxes[f], config, to_target) for f in set(named) if f in boxes}
    out = []
    for i, (answer, frame, (overlap, matched)) in enumerate(zip(answers, named, _matches(said, named, truths, config, to_answer))):
        row = {"think_format": float(has_think_format(answer.text)), "segmentation_format": _format(answer.text), "iou": overlap}
        if weights.keyframe:
            row["keyframe"] = areas[frame] / max(areas.values()) if frame is not None and any(areas.values()) else 0.0
        if weights.video_iou:
            row["video_iou"] = _video_iou(answer, matched, predicted_masks[i], target)
        out.append(({name: value for name, value in row.items() if getattr(weights, name)}, {}))
    return out


def _format(text: str) -> float:
    """Share of boxes that are lists of four numbers (booleans and NaN included) beside an integer `keyframe_timestamp`."""
    try:
        data = json.loads(first_answer_object(text))
        boxes = data.get("bbox_2d_list")
        if not isinstance(data.get("keyframe_timestamp"), int) or not isinstance(boxes, list):
            return 0.0
    except Exception:  # published: any exception makes the term 0
        return 0.0
    right = [type(b) is list and len(b) == 4 and set(map(type, b)) <= {int, float, bool} for b in boxes]
    return sum(right) / len(right) if right else 0.0


def _frame(data, frames):
    """The shown frame that the answer names, or None."""
    try:
        frame = int(data.get("keyframe_timestamp", -1))
    except Exception:  # published: any exception makes the terms 0
        return None
    return frame if frame in frames else None


def _truth(given, config, to_target) -> np.ndarray:
    """(N, 4) boxes of a frame. Published: an absent object is the box of zeros, and a frame without any object has a single one."""
    true = [[0, 0, 0, 0] if box is None else list(box) for box in given] if any(b is not None for b in given) else [[0, 0, 0, 0]]
    return scaled_array(true[: config.max_objects], to_target)


def _matches(said, named, truths, config, factor) -> list[tuple[float, dict]]:
    """Of each answer (sum of matched IoU over max(M, N), its matched boxes by their place in it)."""
    answered = [_answered(data, config.max_objects) for data in said]
    out = [(0.0, {})] * len(said)
    for frame, true in truths.items():
        those = [n for n, name in enumerate(named) if name == frame]
        plain = [n for n in those if all_plain(answered[n], 4)]
        for n in set(those) - set(plain):
            with suppress(Exception):  # published: any exception makes both accuracies 0
                out[n] = _matched(_overlap(numbers(answered[n]), true, factor), answered[n], len(true))
        if plain:
            overlap_PN = _overlap(np.array([box for n in plain for box in answered[n]], dtype=np.float64), true, factor)
            for n, own in zip(plain, slices([len(answered[n]) for n in plain])):
                with suppress(ValueError):  # of the assignment, as an area of 0 made a NaN or an infinity
                    out[n] = _matched(overlap_PN[own], answered[n], len(true))
    return out


def _answered(data, most: int) -> list:
    try:
        return list(data["bbox_2d_list"])[:most]
    except Exception:  # published: any exception makes both accuracies 0
        return []


def _overlap(boxes, true, factor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return iou_matrix(scaled_array(boxes, factor), true).astype(float)


def _matched(overlap_MN, answered, objects: int) -> tuple[float, dict]:
    with np.errstate(all="ignore"):
        rows, columns = linear_sum_assignment(1.0 - overlap_MN)
        value = float(overlap_MN[rows, columns].sum()) / max(len(answered), objects)
    return min(1.0, max(0.0, value)), {n: answered[n] for n in rows.tolist()}


def _video_iou(answer, matched, predicted, target: Target) -> float:
    wanted = [n for n, one in enumerate(answer.answered) if one.box and matched.get(one.item) == list(one.box)]
    if not matched or len(wanted) < len(matched):
        return 0.0
    total = 0.0
    for frame in target.frames:
        true = target.frame_union(frame)
        if predicted is None or frame not in predicted:
            raise ValueError(f"predicted_masks lacks frame {frame!r} of target.frames for an answer with matched objects; pass its masks on every one")
        masks = predicted[frame]
        if len(masks) != len(answer.objects):
            raise ValueError(f"predicted_masks[{frame!r}] has {len(masks)} masks for an answer of {len(answer.objects)} objects")
        union = union_of([masks[n] for n in wanted], f"predicted_masks[{frame!r}]", true.shape)
        if union.shape != true.shape:
            raise ValueError(f"predicted_masks[{frame!r}] are {union.shape}, the target's are {true.shape} (height, width)")
        total += terms.union_iou(union, true)
    return total / len(target.frames)
