"""VisionReasoner: several objects, Hungarian matching, total 7 (Seg-Zero repository, reward_score/vision_reasoner.py).

Kept as published: the format counts lists of the right length whatever is in them; one bad item costs the accuracy of
all; whatever numpy makes of the numbers counts (booleans beside integers, integer overflow); an empty list earns no
format and no accuracy, so nothing can be right where there is nothing to find; both sides are cut at 120 objects.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from itertools import accumulate, chain

import numpy as np
from scipy.optimize import linear_sum_assignment

from reward_service import terms
from reward_service.space import factors
from reward_service.tags import first_answer, has_think_format
from reward_service.target import Target

CONFIG = {
    "weights": {"think_format": 1.0, "segmentation_format": 1.0, "iou": 1.0, "box_l1": 1.0, "point": 1.0, "no_repeat": 1.0},
    "length": {"penalty": False},
    "iou_threshold": 0.5,
    "box_l1_threshold": 10.0,
    "point_threshold": 30.0,
    "space_size": 840,
    "max_objects": 120,
    "max_repeats": 2,
}
SETTINGS = ("iou_threshold", "box_l1_threshold", "point_threshold", "space", "space_size", "max_objects", "max_repeats")
NUMERIC = frozenset((int, float))  # not bool
LIMIT = 1 << 24  # areas of such boxes are exact in float64
MAXIMA = {"think_format": 1.0, "segmentation_format": 2.0, "iou": 1.0, "box_l1": 1.0, "point": 1.0, "no_repeat": 1.0}


def group_terms(answers, target: Target, config, predicted_masks):
    """Terms of each answer; iou, box_l1 and point are matched together, weighted or not, as published."""
    to_answer, to_target = factors(answers, target, config)
    accurate = config.weights.iou or config.weights.box_l1 or config.weights.point
    truth = _truth(target, to_target) if accurate else None
    decoded_answers = [decoded(first_answer(answer.text)) for answer in answers]
    accuracies = _accuracies(decoded_answers, *truth, config, to_answer) if accurate else [()] * len(answers)
    out = []
    for answer, data, accuracy in zip(answers, decoded_answers, accuracies):
        row = dict(zip(("iou", "box_l1", "point"), accuracy))
        row["think_format"] = float(has_think_format(answer.text))
        row["segmentation_format"] = _format(data)
        row["no_repeat"] = terms.no_repeat(answer.text, config.max_repeats)
        out.append(({name: value for name, value in row.items() if getattr(config.weights, name)}, {}))
    return out


def _truth(target: Target, factor):
    """Boxes (N, 4) and points (N, 2). MissingInput for an object without a point."""
    target.points_N2()
    points = [p[0] for p in target.points or ()]
    return [scaled_array(v, factor) for v in (_array(target.boxes, 4), _array(points, 2))]


def _array(values, columns) -> np.ndarray:
    return np.array([list(v) for v in values]) if len(values) else np.zeros((0, columns))


def decoded(text):
    """The JSON value, or None for no text, no JSON, or `null` (all of them earn nothing in the published code)."""
    try:
        return None if text is None else json.loads(text)
    except Exception:  # published: any exception ends the term
        return None


def numbers(rows) -> np.ndarray:
    """Lists of numbers as an array. Raises on anything else, as the arithmetic would once an array of it was made: text makes
    every entry as wide as the longest one, so that a text of megabytes would make gigabytes."""
    if not all(isinstance(row, list) and all(isinstance(v, (int, float)) for v in row) for row in rows):
        raise TypeError("not lists of numbers")
    return np.asarray(rows)


def all_plain(rows, columns: int) -> bool:
    """Whether these are lists of so many integers and floats below LIMIT: float64 gives the published values of them, whatever dtype
    numpy would have chosen, so that the answers of a group can share one array."""
    if not rows or not all(type(row) is list and len(row) == columns for row in rows):
        return False
    flat = list(chain.from_iterable(rows))
    return NUMERIC.issuperset(map(type, flat)) and -LIMIT < min(flat) and max(flat) < LIMIT and not math.isnan(sum(flat))


def slices(lengths) -> list[slice]:
    """Where each of the lists that one array joins lies in it."""
    ends = list(accumulate(lengths))
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def scaled_array(values, factor_xy):
    """Columns x, y, x, y, ... times the factor; untouched, dtype included, when it is 1."""
    values = np.asarray(values)
    return values if factor_xy == (1.0, 1.0) else values * np.array((factor_xy * 4)[: values.shape[-1]])


def iou_matrix(boxes_M4, true_N4):
    """IoU with the inclusive +1, on whatever numpy made of the answer; raises as the published expression would."""
    x1, y1, x2, y2 = np.split(boxes_M4, 4, axis=1)
    u1, v1, u2, v2 = (column.T for column in np.split(true_N4, 4, axis=1))
    width, height = np.minimum(x2, u2) - np.maximum(x1, u1) + 1, np.minimum(y2, v2) - np.maximum(y1, v1) + 1
    shared = np.maximum(0, width) * np.maximum(0, height)
    return shared / ((x2 - x1 + 1) * (y2 - y1 + 1) + (u2 - u1 + 1) * (v2 - v1 + 1) - shared)


def _format(data) -> float:
    """Over the items: 1 for a `bbox_2d` list of four, 1 for a `point_2d` list of two. What breaks keeps the sum so far."""
    total = 0.0
    try:
        for item in data:
            right = 0.0
            for key, size in (("bbox_2d", 4), ("point_2d", 2)):
                if key in item and isinstance(item[key], list) and len(item[key]) == size:
                    right += 1.0
            total += right / len(data)
    except Exception:  # published: the partial sum survives
        pass
    return min(total, 2.0)  # sums of 2 / n can end just above it


def _accuracies(group, true_boxes, true_points, config, factor) -> list[list[float]]:
    """Of each answer [iou, box_l1, point]: means of the matched pairs over max(M, N); zeros when anything in it breaks the arithmetic."""
    truth = true_boxes[: config.max_objects], true_points[: config.max_objects]
    said = [_boxes_and_points(data, config.max_objects) for data in group]
    plain = [n for n, (boxes, points) in enumerate(said) if all_plain(boxes, 4) and all_plain(points, 2)]
    out = [[0.0, 0.0, 0.0]] * len(group)
    for n in set(range(len(group))) - set(plain):
        with suppress(Exception):  # published: any exception makes the accuracy 0
            boxes, points = map(numbers, said[n])
            out[n] = _matched(_values(boxes, points, *truth, config, factor), len(boxes))
    if plain:
        together = (np.array([row for n in plain for row in said[n][k]], dtype=np.float64) for k in (0, 1))
        values_KPN = _values(*together, *truth, config, factor)
        for n, own in zip(plain, slices([len(said[n][0]) for n in plain])):
            out[n] = _matched(values_KPN[:, own], len(said[n][0]))
    return out


def _boxes_and_points(data, most: int) -> tuple[list, list]:
    try:
        boxes, points = ([item[key] for item in data][:most] for key in ("bbox_2d", "point_2d"))
        return boxes, points
    except Exception:  # published: any exception makes the accuracy 0
        return [], []


def _values(boxes, points, true_boxes, true_points, config, factor) -> np.ndarray:
    """(3, P, N) whether iou, box_l1 and point of each pair count."""
    with np.errstate(all="ignore"):
        boxes, points = scaled_array(boxes, factor), scaled_array(points, factor)
        overlap = iou_matrix(boxes, true_boxes)
        corners = np.mean(np.abs(boxes[:, None, :] - true_boxes[None, :, :]), axis=2)
        apart = np.sqrt(np.sum((points[:, None, :] - true_points[None, :, :]) ** 2, axis=2))
        x, y = points[:, 0], points[:, 1]
        inside = (x >= boxes[:, 0]) & (x <= boxes[:, 2]) & (y >= boxes[:, 1]) & (y <= boxes[:, 3])
        near = (apart < config.point_threshold) & inside[:, None]
        return np.stack([overlap > config.iou_threshold, corners < config.box_l1_threshold, near]).astype(float)


def _matched(values_KMN, answered: int) -> list[float]:
    rows, columns = linear_sum_assignment(3.0 - values_KMN.sum(0))
    return (values_KMN[:, rows, columns].sum(1) / max(answered, values_KMN.shape[2])).tolist()
