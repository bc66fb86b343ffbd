"""Veason-R1: format, choice of key frame, box IoU there, mask IoU through the video (video_match_keyframe_sam_sft_mod.py).

Kept as published: `keyframe_timestamp` may be true or (outside the format) "3" or 3.7; absent objects are truths with the
box [0, 0, 0, 0]; boxes left over after matching are not propagated, so they cost nothing in video_iou.
Ours: the matched IoU is kept within 0..1, which integer overflow in the published arithmetic can leave; video_iou is 0 where
a matched box is not among `answer.objects`, because it is no box (eight numbers, true) or the text has another answer as well.
The published code works on 560x560 images and masks: give the target that size to get its values.
"""

from __future__ import annotations

import json

import numpy as np

from reward_service import terms
from reward_service.presets.vision_reasoner import decoded, iou_matrix, numbers, scaled_array
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
    out = []
    for i, answer in enumerate(answers):
        data = decoded(first_answer(answer.text))
        frame = _frame(data, frames)
        overlap, matched = _matched(data, boxes.get(frame), config, to_answer, to_target)
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
    right = [isinstance(b, list) and len(b) == 4 and all(isinstance(v, (int, float)) for v in b) for b in boxes]
    return sum(right) / len(right) if right else 0.0


def _frame(data, frames):
    """The shown frame that the answer names, or None."""
    try:
        frame = int(data.get("keyframe_timestamp", -1))
    except Exception:  # published: any exception makes the terms 0
        return None
    return frame if frame in frames else None


def _matched(data, given, config, to_answer, to_target) -> tuple[float, dict]:
    """(sum of matched IoU over max(M, N), the boxes of the answer that were matched, by their place in it). given: boxes of the frame."""
    from scipy.optimize import linear_sum_assignment

    if given is None:
        return 0.0, {}
    # Published: an absent object is the box of zeros, and a frame without any object has a single one.
    true = [[0, 0, 0, 0] if box is None else list(box) for box in given] if any(b is not None for b in given) else [[0, 0, 0, 0]]
    true = scaled_array(true[: config.max_objects], to_target)
    try:
        with np.errstate(all="ignore"):
            answered = list(data["bbox_2d_list"])[: config.max_objects]
            boxes = scaled_array(numbers(answered), to_answer)
            overlap = iou_matrix(boxes, true).astype(float)
            rows, columns = linear_sum_assignment(1.0 - overlap)  # raises on NaN and infinities
            value = float(overlap[rows, columns].sum()) / max(len(boxes), len(true))
    except Exception:  # published: any exception makes both accuracies 0
        return 0.0, {}
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
