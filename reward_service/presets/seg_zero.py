"""Seg-Zero: one object with a box and two points, five 0/1 terms (Seg-Zero 77f9ea5, reward_score/seg_restrict.py and seg.py).

Kept as published: the first braces of the whole text are the answer, any exception makes a term 0, coordinates may be
booleans, points are cut to integers and may be digit strings, boxes that share a single row or column do not overlap.
"""

from __future__ import annotations

import json
import math

from reward_service.space import factors, scaled
from reward_service.tags import first_braces, has_think_format
from reward_service.target import MissingInput, Target

CONFIG = {
    "weights": {"think_format": 1.0, "segmentation_format": 1.0, "iou": 1.0, "box_l1": 1.0, "point": 1.0},
    "length": {"penalty": False},
    "iou_threshold": 0.5,
    "box_l1_threshold": 10.0,
    "point_threshold": 100.0,  # mean of the two distances, Euclidean in the code (the papers call it L1)
    "space_size": 840,
}
SETTINGS = ("iou_threshold", "box_l1_threshold", "point_threshold", "space", "space_size", "strict_keys")
MAXIMA = {"think_format": 1.0, "segmentation_format": 1.0, "iou": 1.0, "box_l1": 1.0, "point": 1.0}


def group_terms(answers, target: Target, config, predicted_masks):
    """Terms of each answer. MissingInput when the target has several objects, or not two points, with that term on."""
    to_answer, to_target = factors(answers, target, config)
    box, points = _truth(target, config, to_target)
    return [(_terms(answer.text, box, points, config, to_answer), {}) for answer in answers]


def _truth(target: Target, config, factor):
    if not len(target):
        return None, None  # the published pattern finds no box in such a truth: the three accuracy terms are 0
    if len(target) > 1:
        raise MissingInput(f"formula {config.formula!r} scores one object, the target has {len(target)}; use another preset")
    points = list(target.points[0]) if target.points is not None else []
    if config.weights.point and len(points) < 2:
        raise MissingInput(f"formula {config.formula!r} needs two points of the object in target.points[0], got {len(points)}")
    return scaled(list(target.boxes[0]), factor), [scaled(list(p), factor) for p in points[:2]]


def _terms(text, true_box, true_points, config, factor) -> dict[str, float]:
    braces = first_braces(text)
    try:
        data = None if braces is None else json.loads(braces)
    except Exception:  # published: any exception makes the term 0
        data = None
    published = {
        "think_format": lambda: has_think_format(text),
        "segmentation_format": lambda: _well_formed(data, config.strict_keys),
        "iou": lambda: _iou(scaled(_box(data, config), factor), true_box) > config.iou_threshold,
        "box_l1": lambda: sum(abs(p - t) for p, t in _box_pairs(data, true_box, config, factor)) / 4 < config.box_l1_threshold,
        "point": lambda: _points_near(data, true_points, config, factor),
    }
    return {name: _or_zero(term) for name, term in published.items() if getattr(config.weights, name)}


def _or_zero(term) -> float:
    try:
        return float(bool(term()))
    except Exception:  # published: any exception makes the term 0
        return 0.0


def _well_formed(data, strict_keys: bool) -> bool:
    if strict_keys:
        sizes = {"bbox": 4, "points_1": 2, "points_2": 2}
        return all(isinstance(data[key], list) and len(data[key]) == size for key, size in sizes.items())
    box_key, point_keys = None, []
    for key in data:  # a second key with "bbox" in it may still count as a point
        if "bbox" in key.lower() and box_key is None:
            box_key = key
        elif "point" in key.lower():
            point_keys.append(key)
    return bool(box_key) and len(point_keys) >= 2 and len(data[box_key]) == 4 and all(len(data[k]) == 2 for k in point_keys[:2])


def _box(data, config):
    """The answered box; raises when it is missing or has not four entries."""
    box = data["bbox" if config.strict_keys else next(key for key in data if "bbox" in key.lower())]
    if len(box) != 4:
        raise ValueError("not a box")
    return box


def _box_pairs(data, true_box, config, factor):
    box = scaled(_box(data, config), factor)
    return [(box[i], true_box[i]) for i in range(4)]


def _iou(a, b) -> float:
    left, top, right, bottom = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    shared = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    area = lambda box: (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
    return float(shared) / (area(a) + area(b) - shared)


def _points_near(data, true_points, config, factor) -> bool:
    """Both points in the answered box (edges included), and the better pairing's mean distance below the threshold."""
    keys = ("points_1", "points_2") if config.strict_keys else [key for key in data if "points" in key.lower()][:2]
    first, second = ([int(data[key][0]), int(data[key][1])] for key in keys)
    box = _box(data, config)
    if not all(box[0] <= p[0] <= box[2] and box[1] <= p[1] <= box[3] for p in (first, second)):
        return False
    first, second, (t1, t2) = scaled(first, factor), scaled(second, factor), true_points
    apart = lambda p, q: math.sqrt((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2)
    best = min(apart(first, t1) + apart(second, t2), apart(first, t2) + apart(second, t1))
    return best / 2 < config.point_threshold
