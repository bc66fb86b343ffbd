"""Measures of masks, boxes and points, each equal to the evaluator that its docstring names (tables: docs/rewards.md).

Masks are arrays (..., H, W), cast to bool; leading axes (frames, objects) are kept: a pair of (H, W) masks gives a
float, (T, N, H, W) gives a float64 array (T, N). `void` marks pixels that are left out of both masks.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Sequence

import numpy as np

from reward_service import bitmaps
from segmentation_service import geometry

TOLERANCE = 0.008  # within which boundaries match: of the diagonal


class JAndF(NamedTuple):
    """Means of J and F, and the mean of the two: 0..1."""

    j: float
    f: float
    j_and_f: float


def jaccard(predicted, annotated, void=None):
    """J = |P and G| / |P or G|; 1 where both are empty. Equal to `db_eval_iou` of the DAVIS 2017 evaluator.

    Raises ValueError when the shapes differ or have fewer than two axes.
    """
    pair, shape, _ = _packed_pair(predicted, annotated, void)
    return _shaped(_jaccard(pair), shape)


def boundary_f(predicted, annotated, void=None, tolerance: float = TOLERANCE):
    """F = 2PR / (P + R) of the boundary pixels, each matched within a disk. Equal to `db_eval_boundary` of the DAVIS 2017 evaluator.

    A pixel is boundary when it differs from its east, south or south-east neighbour (the image edge repeats its last
    pixels). The disk's radius is ceil(tolerance * sqrt(H^2 + W^2)), or `tolerance` itself, in whole pixels, from 1 on.
    Neither mask has a boundary (both empty, or full): 1. Only one has: 0. P + R = 0: 0.
    Raises ValueError as `jaccard` does, and on a negative tolerance or a broken number of pixels.
    """
    pair, shape, hw = _packed_pair(predicted, annotated, void)
    return _shaped(_boundary_f(pair, hw, tolerance), shape)


def jaccard_and_f(predicted, annotated, void=None):
    """(`jaccard`, `boundary_f`) of the same masks, faster than one after the other."""
    pair, shape, hw = _packed_pair(predicted, annotated, void)
    return _shaped(_jaccard(pair), shape), _shaped(_boundary_f(pair, hw, TOLERANCE), shape)


def jaccard_and_f_of_pairs(masks: Sequence, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """(`jaccard`, `boundary_f`) of pairs (predicted, annotated) of masks (H, W), each pair being two numbers of `masks`: of several answers about a frame and
    several truths, what is needed of a mask is computed once. Raises ValueError as `jaccard` does."""
    arrays = [np.asarray(mask) for mask in masks]
    if wrong := [a.shape for a in arrays if a.shape != arrays[0].shape or a.ndim != 2 or not a.size]:
        raise ValueError(f"the masks must have equal (H, W) shapes, with pixels; got {arrays[0].shape} and {wrong[0]}")
    if not pairs:
        return []
    words = np.stack([_packed(mask) for mask in arrays])
    where, (predicted, annotated) = bitmaps.occupied(words), np.array(pairs).T
    inside = words[:, *where]
    j = _jaccard((inside[predicted], inside[annotated]))
    f = _f_of_edges(bitmaps.boundary(words, arrays[0].shape[1], where), predicted, annotated, _radius(TOLERANCE, *arrays[0].shape))
    return list(zip(j.tolist(), f))


def j_and_f(predicted, annotated, void=None) -> JAndF:
    """Mean J, mean F and (J + F) / 2 over all masks given, which must be at least one pair.

    For one video of N objects, masks (T, N, H, W), this is what the DAVIS evaluator calls J&F-Mean (it leaves out the first and
    the last frame: so must the caller). For one expression, masks (T, H, W), it is MeViS's and ReVOS's; average over expressions.
    """
    j, f = map(np.asarray, jaccard_and_f(predicted, annotated, void))
    if not j.size:
        raise ValueError("no masks to measure: J&F needs at least one frame and object")
    return JAndF(float(j.mean()), float(f.mean()), float((j.mean() + f.mean()) / 2))


def intersection_and_union(predicted, annotated, ignore=None):
    """Pixels in both masks and in either, leaving out those of `ignore`: two ints for (H, W), else two int64 arrays (...).

    One such pair an image is what `giou` and `ciou` take, so that images of a data set may differ in size.
    Raises ValueError as `jaccard` does.
    """
    pair, shape, _ = _packed_pair(predicted, annotated, ignore)
    counts = _shared_and_either(pair)
    return counts if shape else (int(counts[0]), int(counts[1]))


def giou(intersections, unions, evaluator: str = "lisa") -> float:
    """gIoU of a data set: the mean over its masks of I / U. Computed in float64.

    "lisa" (ReasonSeg, RefCOCO): I / (U + 1e-5), 1 where U = 0, and their sum divided by (masks + 1e-5). The evaluator adds up in
    float32, which alone moves its seventh digit. "seg_zero" (Seg-Zero, VisionReasoner): the plain mean, 0 where U = 0.
    Raises ValueError when the lists differ in length, are empty, or hold an intersection above its union.
    """
    shared, either = _sums(intersections, unions)
    if evaluator == "lisa":
        return float(np.sum(shared / (either + 1e-5) + (either == 0)) / (len(either) + 1e-5))
    if evaluator == "seg_zero":
        return float(np.mean(np.where(either > 0, shared / np.maximum(either, 1), 0.0)))
    raise ValueError(f"evaluator={evaluator!r}: choose 'lisa' or 'seg_zero'")


def ciou(intersections, unions) -> float:
    """cIoU of a data set: sum of I / (sum of U + 1e-10), as LISA's evaluator has it, in float64. Raises as `giou` does."""
    shared, either = _sums(intersections, unions)
    return float(shared.sum() / (either.sum() + 1e-10))


def robustness(predicted, annotated, foreground, prediction_value: int = 255):
    """ReVOS's robustness R of each frame: max(0, 1 - W / (F + 1e-6)), W false pixels and F pixels of `foreground`; R is its mean.

    annotated, foreground: bool, or the number of instances at each pixel: all annotations of the expression, and of the video.
    prediction_value: what a predicted pixel counts. 255 is the published convention (VISA's evaluator reads 0/255 images, so that
    R is close to 0 unless a frame has hardly a false pixel), 1 that of evaluators which read run-length masks (Sa2VA). The
    evaluator's 8-bit arithmetic is kept: a predicted pixel on which n >= 2 instances overlap counts ((1 - n) x value) mod 256.
    Raises ValueError when shapes differ, or on another prediction_value.
    """
    if prediction_value not in (1, 255):
        raise ValueError(f"prediction_value={prediction_value!r}: 255 is the published convention, 1 the other")
    predicted, annotated, foreground = np.asarray(predicted), np.asarray(annotated), np.asarray(foreground)
    if not predicted.shape == annotated.shape == foreground.shape or predicted.ndim < 2:
        raise ValueError(f"predicted {predicted.shape}, annotated {annotated.shape} and foreground {foreground.shape} must be equal (..., H, W) shapes")
    predicted, annotated = predicted.astype(bool, copy=False), annotated.astype(np.uint8, copy=False)
    if annotated.max(initial=0) <= 1:  # then the arithmetic is a count, which is faster
        wrong = prediction_value * _pixels(predicted > annotated.astype(bool))
    else:
        wrong = ((np.uint8(1) - annotated) * (predicted.astype(np.uint8) * np.uint8(prediction_value))).sum(axis=(-2, -1), dtype=np.int64)
    all_pixels = _pixels(foreground) if foreground.dtype == bool else foreground.astype(np.uint8).sum(axis=(-2, -1), dtype=np.int64)
    return _shaped(np.maximum(1 - wrong / (all_pixels + 1e-6), 0.0), predicted.shape[:-2])


def box_accuracy(predicted: Sequence, true: Sequence[Optional[Sequence[float]]], threshold: float = 0.5) -> float:
    """Share of queries whose box was found: VisionReasoner's evaluator; with one box a query the usual Acc@0.5.

    predicted: per query its boxes (M, 4), M may be 0. true: per query the box [x1, y1, x2, y2] round its target, or None where
    there is none. Found: the IoU (no +1 on the sides) of any predicted box, or of the box round all, is above the threshold,
    strictly; where there is no target, no box was predicted. Raises ValueError on no queries or lists of other lengths.
    """
    _check_queries(predicted, true, "boxes")
    return sum(_box_found(np.asarray(p, np.float64).reshape(-1, 4), t, threshold) for p, t in zip(predicted, true)) / len(true)


def point_accuracy(points: Sequence, annotated: Sequence) -> float:
    """Mean over queries of the share of its points that lie on the target's mask (one point: the pointing game, no tolerance).

    points: per query its points (K, 2). annotated: per query a mask (H, W); masks may differ in size. A point stands for its
    pixel (`geometry.round_points`); outside the image it lies on nothing. A query without points scores 0, or 1 where the mask
    is empty; any point on an empty mask scores 0. Raises ValueError on no queries or lists of other lengths.
    """
    _check_queries(points, annotated, "points")
    return sum(_share_on_mask(np.asarray(p, np.float64).reshape(-1, 2), np.asarray(m).astype(bool)) for p, m in zip(points, annotated)) / len(annotated)


def _shared_and_either(pair) -> tuple[np.ndarray, np.ndarray]:
    return bitmaps.count(pair[0] & pair[1]), bitmaps.count(pair[0] | pair[1])


def _jaccard(pair) -> np.ndarray:
    both, either = _shared_and_either(pair)
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def _boundary_f(pair, hw: tuple[int, int], tolerance: float) -> np.ndarray:
    radius, pairs = _radius(tolerance, *hw), pair.reshape(2, -1, *pair.shape[-2:])
    # One frame at a time stays in the processor's cache, and far from the boundaries there is nothing to match.
    f = [_f_of_edges(bitmaps.boundary(both, hw[1], bitmaps.occupied(both)), [0], [1], radius)[0] for both in pairs.swapaxes(0, 1)]
    return np.array(f, dtype=np.float64).reshape(pair.shape[1:-2])


def _f_of_edges(edges: np.ndarray, predicted: Sequence[int], annotated: Sequence[int], radius: int) -> list[float]:
    """F of pairs of these boundaries (N, words, rows)."""
    pixels = bitmaps.count(edges).tolist()
    near = bitmaps.dilated(edges, radius) if any(pixels[p] and pixels[a] for p, a in zip(predicted, annotated)) else edges  # which then match nothing either
    matched = (bitmaps.count(edges[mine] & near[others]).tolist() for mine, others in ((predicted, annotated), (annotated, predicted)))
    return [_f(*both, pixels[p], pixels[a]) for *both, p, a in zip(*matched, predicted, annotated)]


def _f(matched_predicted: int, matched_annotated: int, n_predicted: int, n_annotated: int) -> float:
    if not (n_predicted and n_annotated):
        return float(n_predicted == n_annotated)
    precision, recall = matched_predicted / n_predicted, matched_annotated / n_annotated
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _radius(tolerance: float, height: int, width: int) -> int:
    if tolerance < 0 or (tolerance >= 1 and tolerance != int(tolerance)):
        raise ValueError(f"tolerance={tolerance}: give a share of the diagonal (0..1) or a whole number of pixels")
    return int(tolerance) if tolerance >= 1 else math.ceil(tolerance * math.sqrt(height * height + width * width))


def _packed_pair(predicted, annotated, void):
    """Words (2, ..., H, W/64), leading shape, (H, W)."""
    predicted, annotated = np.asarray(predicted), np.asarray(annotated)
    if predicted.shape != annotated.shape or predicted.ndim < 2 or 0 in predicted.shape[-2:]:
        raise ValueError(f"predicted {predicted.shape} and annotated {annotated.shape} must be equal (..., H, W) shapes")
    pair = np.stack([_packed(predicted), _packed(annotated)])
    if void is not None:
        void = np.asarray(void)
        if void.shape != annotated.shape:
            raise ValueError(f"void {void.shape} must have the shape of the masks, {annotated.shape}")
        pair &= ~bitmaps.pack(void.astype(bool, copy=False))
    return pair, predicted.shape[:-2], predicted.shape[-2:]


def _pixels(masks: np.ndarray):
    return np.count_nonzero(masks, axis=(-2, -1) if masks.ndim > 2 else None)  # NumPy is much faster without an axis


def _packed(mask: np.ndarray) -> np.ndarray:
    return bitmaps.pack(mask if mask.dtype == np.uint8 else mask.astype(bool, copy=False))


def _shaped(values, shape):
    return values if shape else float(values)


def _sums(intersections, unions) -> tuple[np.ndarray, np.ndarray]:
    shared, either = np.asarray(intersections, np.float64), np.asarray(unions, np.float64)
    if shared.shape != either.shape or shared.ndim != 1 or not len(shared):
        raise ValueError(f"intersections {shared.shape} and unions {either.shape} must be equally long lists, one entry a mask, at least one")
    if not ((shared >= 0) & (shared <= either)).all():
        raise ValueError("an intersection is negative or larger than its union; give (intersections, unions), in this order")
    return shared, either


def _check_queries(predicted, true, what: str) -> None:
    if len(predicted) != len(true) or not len(true):
        raise ValueError(f"{what} of {len(predicted)} queries for {len(true)} targets: give one entry a query, at least one")


def _box_found(boxes_M4: np.ndarray, true: Optional[Sequence[float]], threshold: float) -> bool:
    if true is None or not len(boxes_M4):
        return true is None and not len(boxes_M4)
    boxes = np.concatenate([boxes_M4, [[*boxes_M4[:, :2].min(0), *boxes_M4[:, 2:].max(0)]]])
    truth = np.asarray(true, np.float64)
    sides = np.maximum(np.minimum(boxes[:, 2:], truth[2:]) - np.maximum(boxes[:, :2], truth[:2]), 0)
    shared, area, true_area = sides.prod(1), (boxes[:, 2:] - boxes[:, :2]).prod(1), (truth[2:] - truth[:2]).prod()
    union = area + true_area - shared
    return bool((np.divide(shared, union, out=np.zeros_like(union), where=union != 0) > threshold).any())


def _share_on_mask(points_K2: np.ndarray, mask_HW: np.ndarray) -> float:
    if not len(points_K2):
        return float(not mask_HW.any())
    x, y = geometry.round_points(points_K2, mask_HW.shape).T
    return float((mask_HW[y, x] & geometry.points_in_frame(points_K2, mask_HW.shape)).mean())
