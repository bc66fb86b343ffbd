"""VideoSeg-R1: VisionReasoner's terms, a negative-point term, one-to-one matching (domain.md 1.3, and our choices in 1.8)."""

from __future__ import annotations

from typing import Optional, Sequence

import numpy as np

from reward_service import matching, terms
from reward_service.answer import Answer, AnswerObject
from reward_service.distance import distance_at, near_field
from reward_service.space import factors
from reward_service.tags import think_text
from reward_service.target import MissingInput, Target, mask_stack

CONFIG: dict = {}  # the defaults of RewardConfig
SETTINGS = None
MAXIMA = {
    "think_format": 1.0,
    "segmentation_format": 2.0,
    "iou": 1.0,
    "box_l1": 1.0,
    "point": 1.0,
    "negative_point": 1.0,
    "no_repeat": 1.0,
    "mask_iou": 1.0,
}
_NO_BOX, _NO_POINT = (np.nan,) * 4, (np.nan,) * 2


def group_terms(answers: Sequence[Answer], target: Target, config, predicted_masks):
    """Terms and diagnostics of the completions of one prompt; pairwise work is done for the whole group at once.

    predicted_masks: None, or per answer the masks of `answer.objects` on the target frame (see `_masks_of`); if
    accuracy_iou=video, {frame id: such masks} with every frame of `target.frames`.
    Diagnostics: n_predicted, n_true, box_iou (mean IoU of the boxes matched by IoU, over max(M, N)) and, where masks
    were passed and the target has some, mask_iou (of the unions).
    """
    to_answer, to_target = factors(answers, target, config)
    # Only a strict answer earns accuracy: a salvaged one has objects for the segmenter and the log.
    objects = [a.answered[: config.max_objects] if a.strict else () for a in answers]
    given = [None] * len(answers) if predicted_masks is None else predicted_masks
    if config.weights.mask_iou:
        target.masks_NHW("mask_iou")
        given = [[] if one is None else one for one in given]  # None is for an answer without objects
    if config.needs_video_masks:
        masks, overlaps = [None] * len(answers), lambda: _video_pairs(answers, objects, given, target)
    else:
        masks = [_masks_of(answer, one, target) for answer, one in zip(answers, given)]
        overlaps = (lambda: _mask_pairs(objects, masks, target)) if config.accuracy_iou == "mask" else None
    accuracy, box_iou = _accuracy(answers, objects, overlaps, target, config, to_answer, to_target)
    negative = _negative_points(answers, objects, target, config, to_target) if config.weights.negative_point else None
    out = []
    for i, answer in enumerate(answers):
        weights, row = config.weights, dict(accuracy[i])
        if weights.think_format:
            row["think_format"] = float(answer.think_format)
        if weights.segmentation_format:
            row["segmentation_format"] = _segmentation_format(answer, len(target))
        if weights.negative_point:
            row["negative_point"] = negative[i]
        if weights.no_repeat:
            text = think_text(answer.text) if config.no_repeat_scope == "think" else answer.text
            row["no_repeat"] = terms.no_repeat(text, config.max_repeats)
        seen = {"n_predicted": answer.n_items if answer.strict else 0, "n_true": len(target), "box_iou": box_iou[i]}
        if masks[i] is not None and (target.masks is not None or not len(target)):
            seen["mask_iou"] = _mask_iou(answer, masks[i][: len(objects[i])], target)
        if weights.mask_iou:
            row["mask_iou"] = float(terms.above(seen["mask_iou"], config.mask_iou_threshold, config.mask_iou_grading))
        out.append((row, seen))
    return out


def _segmentation_format(answer: Answer, n_true: int) -> float:
    # An empty list has no items to average. Ours: it is perfect where it is right, else it would cost to be right.
    if answer.strict and answer.n_items == 0 and n_true == 0:
        return 2.0
    return answer.segmentation_format


def _negative_points(answers: Sequence[Answer], objects, target: Target, config, to_target) -> list[float]:
    union = target.union_HW("negative_point")  # asked for even without points: a missing input must not hide
    graded = config.negative_grading == "graded"
    reach, pitch_yx = config.negative_reach * (config.graded_reach if graded else 1.0), (to_target[1], to_target[0])
    field = target.cached(("taxicab", pitch_yx, reach), lambda: near_field(union, pitch_yx, reach))
    points = [[p for one in a.objects[: len(mine)] for p in one.negative_points] for a, mine in zip(answers, objects)]
    distances = iter(distance_at([p for mine in points for p in mine], field).tolist())
    each = ([next(distances) for _ in mine] for mine in points)
    return [terms.negative_points(d, config.negative_reach, config.negative_grading, config.graded_reach) for d in each]


def _mask_iou(answer: Answer, masks: np.ndarray, target: Target) -> float:
    if not len(target):
        return float(answer.strict and answer.n_items == 0)
    return terms.union_iou(masks.any(axis=0), target.union_HW("mask_iou"))


def _masks_of(answer: Answer, given, target: Target) -> Optional[np.ndarray]:
    """bool (len(answer.objects), H, W), or None when no masks were passed for this answer."""
    if given is None:
        return None
    if len(given) != len(answer.objects):
        raise ValueError(f"predicted_masks has {len(given)} masks for an answer of {len(answer.objects)} objects")
    return mask_stack(given, target.image_size, "predicted_masks")


def _accuracy(answers, objects, overlaps, target, config, to_answer, to_target):
    """Per answer the active ones of iou, box_l1 and point, and its box_iou. overlaps: the pairs' overlap; None: of their boxes."""
    active = [name for name in ("iou", "box_l1", "point") if getattr(config.weights, name)]
    if not len(target):  # nothing to find: the empty list is exactly right, anything else exactly wrong
        right = [float(a.strict and a.n_items == 0) for a in answers]
        return [dict.fromkeys(active, value) for value in right], right
    pairs, overlap_PN = _pairs(objects, overlaps, target, config, to_answer, to_target, active)
    gain_PN = sum((getattr(config.weights, name) * pairs[k] for k, name in enumerate(active)), np.zeros_like(overlap_PN))
    largest = np.array([max(a.n_items if a.strict else 0, len(target)) for a in answers])
    values = [matched / largest for matched in _matched_sums(gain_PN, pairs, objects)] if active else []
    accuracy = [dict(zip(active, row)) for row in zip(*(v.tolist() for v in values))] or [{} for _ in answers]
    return accuracy, (_matched_sums(overlap_PN, overlap_PN[None], objects)[0] / largest).tolist()


def _matched_sums(gain_PN, values_KPN, objects) -> list[np.ndarray]:
    """For each of the K values its sum (G,) over the pairs that `gain` assigns, answer by answer."""
    ends = np.cumsum([len(mine) for mine in objects])
    starts = ends - [len(mine) for mine in objects]
    matched = [matching.assign(gain_PN[start:end]) for start, end in zip(starts.tolist(), ends.tolist())]
    counts = [len(rows) for rows, _ in matched]
    rows = np.concatenate([rows for rows, _ in matched]) + np.repeat(starts, counts)
    picked = values_KPN[:, rows, np.concatenate([columns for _, columns in matched])]
    owner = np.repeat(np.arange(len(objects)), counts)
    return [np.bincount(owner, weights=one, minlength=len(objects)) for one in picked]


def _pairs(objects: list[tuple[AnswerObject, ...]], overlaps, target, config, to_answer, to_target, active):
    """(len(active), P, N) values of every pair, P over all objects of the group, and the (P, N) box IoU."""
    everyone = [one for mine in objects for one in mine]
    boxes = np.array([one.box or _NO_BOX for one in everyone], dtype=np.float64).reshape(-1, 4) * (to_answer * 2)
    true_boxes = target.boxes_N4() * (to_target * 2)
    box_iou = matching.box_iou_matrix(boxes, true_boxes)
    values = np.zeros((len(active), *box_iou.shape))
    for k, name in enumerate(active):
        if name == "iou":
            overlap = box_iou if overlaps is None else overlaps()
            values[k] = terms.above(overlap, config.iou_threshold, config.iou_grading)
        elif name == "box_l1":
            distance = matching.box_l1_matrix(boxes, true_boxes)
            values[k] = terms.below(distance, config.box_l1_threshold, config.box_l1_grading, config.graded_reach)
        else:
            points = np.array([one.point or _NO_POINT for one in everyone], dtype=np.float64).reshape(-1, 2) * to_answer
            distance = matching.point_distance_matrix(points, target.points_N2() * to_target)
            near = terms.below(distance, config.point_threshold, config.point_grading, config.graded_reach)
            values[k] = near * matching.point_in_own_box(points, boxes)[:, None]
    return values, box_iou


def _mask_pairs(objects, masks, target) -> np.ndarray:
    true_masks, rows = target.masks_NHW("iou (accuracy_iou=mask)"), [np.zeros((0, len(target)))]
    for mine, given in zip(objects, masks):
        if mine and given is None:
            raise ValueError("predicted_masks is None for an answer with objects; pass one mask for each of answer.objects")
        if mine:
            rows.append(matching.mask_iou_matrix(given[: len(mine)], true_masks))
    return np.concatenate(rows)


def _video_pairs(answers, objects, tracks, target) -> np.ndarray:
    """(P, N) mean over `target.frames` of J of every pair, 1 where both are out of view.

    An object without a mask on any of these frames overlaps nothing: else it would earn the frames on which the target is away.
    """
    if not target.frames:
        raise MissingInput("the iou term (accuracy_iou=video) needs target.frames: {frame id: FrameTarget(masks)} of the annotated frames")
    count = sum(map(len, objects))
    total_PN, found_P = np.zeros((count, len(target))), np.zeros(count, bool)
    for frame in target.frames:  # one frame of one answer at a time: the masks of a group on a whole video would not fit
        true_masks, start = target.frame_masks_NHW(frame), 0
        for answer, mine, track in zip(answers, objects, tracks):
            if not mine:
                continue
            if track is None or frame not in track:
                raise ValueError(f"predicted_masks lacks frame {frame!r} of target.frames for an answer with objects; pass its masks on every one")
            if len(track[frame]) != len(answer.objects):
                raise ValueError(f"predicted_masks[{frame!r}] has {len(track[frame])} masks for an answer of {len(answer.objects)} objects")
            rows = slice(start, start + len(mine))
            start = rows.stop
            masks = mask_stack(track[frame][: len(mine)], target.image_size, f"predicted_masks[{frame!r}]")
            total_PN[rows] += matching.mask_iou_matrix(masks, true_masks, both_empty=1.0)
            found_P[rows] |= masks.any(axis=(1, 2))
    return np.where(found_P[:, None], total_PN / len(target.frames), 0.0)
