"""ReVSeg: two turns in one model, r = r_f + r_t + r_s (arXiv 2512.02835; there is no code, so the corners are ours).

Turn 1 names a frame, `[{"frame_idx": int, ...}]`, turn 2 gives a box on it. A completion holds both turns one after the
other; the second `<think>` starts turn 2.
r_f: degree of format compliance. Ours: the mean over both turns of (think format + answer parsed) / 2.
r_t, if turn 1 parsed: min-max normalised area of the true box at the named frame; 0 where the target is absent. Ours:
the box round all objects; 1 where every frame has the same area.
r_s, if both parsed: 1 if the box IoU is above 0.5. Ours: inclusive +1, as in the relatives; the first box of turn 2.
"""

from __future__ import annotations

import numpy as np

from reward_service import matching
from reward_service.presets.vision_reasoner import decoded
from reward_service.parsing import _loose_objects
from reward_service.space import factors
from reward_service.tags import THINK, first_answer, has_think_format
from reward_service.target import MissingInput, Target

CONFIG = {
    "weights": {"segmentation_format": 1.0, "keyframe": 1.0, "iou": 1.0},
    "length": {"penalty": False},
    "iou_threshold": 0.5,
    "space_size": 840,
}
SETTINGS = ("iou_threshold", "space", "space_size")
MAXIMA = {"segmentation_format": 1.0, "keyframe": 1.0, "iou": 1.0}


def group_terms(answers, target: Target, config, predicted_masks):
    """Terms of each answer. Needs target.frames with boxes: every frame that turn 1 may choose from."""
    chosen = config.weights.keyframe or config.weights.iou
    if chosen and not target.frames:
        raise MissingInput("formula 'revseg' needs target.frames: {frame id: FrameTarget(boxes)} of the frames to choose from")
    to_answer, to_target = factors(answers, target, config)
    true = {frame: _round_all(target.frame_boxes(frame), to_target) for frame in target.frames} if chosen else {}
    areas = {frame: 0.0 if box is None else float(np.prod(box[2:] - box[:2] + 1)) for frame, box in true.items()}
    out, chosen_boxes = [], {frame: [] for frame in true}
    for answer in answers:
        first, second = _turns(answer.text)
        _, frame = _loose_objects(decoded(first_answer(first)))
        objects, _ = _loose_objects(decoded(first_answer(second)))
        box = next((one.box for one in objects if one.box), None)
        parsed = (frame is not None, box is not None)
        good = sum(has_think_format(turn) + ok for turn, ok in zip((first, second), parsed))
        out.append({"segmentation_format": good / 4, "keyframe": _area_share(frame, areas), "iou": 0.0})
        if all(parsed) and true.get(frame) is not None:
            chosen_boxes[frame].append((out[-1], box))
    for frame, rows in chosen_boxes.items():
        if rows:
            predicted = np.array([box for _, box in rows], dtype=np.float64) * (to_answer * 2)
            for (row, _), overlap in zip(rows, matching.box_iou_matrix(predicted, true[frame][None])[:, 0]):
                row["iou"] = float(overlap > config.iou_threshold)
    return [({name: value for name, value in row.items() if getattr(config.weights, name)}, {}) for row in out]


def _turns(text: str) -> tuple[str, str]:
    start = text.find(THINK)
    second = text.find(THINK, start + len(THINK)) if start >= 0 else -1
    return (text.strip(), "") if second < 0 else (text[:second].strip(), text[second:].strip())


def _round_all(boxes, to_target):
    """float64 (4,): the box round all objects of a frame in the space of comparison, or None where there is none."""
    present = np.array([box for box in boxes if box is not None], dtype=np.float64).reshape(-1, 4)
    if not len(present):
        return None
    return np.concatenate([present[:, :2].min(axis=0), present[:, 2:].max(axis=0)]) * (to_target * 2)


def _area_share(frame, areas: dict) -> float:
    area = areas.get(frame, 0.0)
    if not area:
        return 0.0
    smallest, largest = min(areas.values()), max(areas.values())
    return (area - smallest) / (largest - smallest) if largest > smallest else 1.0
