"""Measures of masks: J (region) and F (boundary), as the DAVIS 2017 evaluator defines them (spec: domain.md 6.1).

Masks are arrays (..., H, W), cast to bool; leading axes (frames, objects) are kept: a pair of (H, W) masks gives a
float, (T, N, H, W) gives a float64 array (T, N). `void` marks pixels that are left out of both masks.
"""

from __future__ import annotations

import math

import numpy as np

from reward_service import bitmaps


def jaccard(predicted, annotated, void=None):
    """J = |P and G| / |P or G|; 1 where both are empty.

    Raises ValueError when the shapes differ or have fewer than two axes.
    """
    pair, shape, _ = _packed_pair(predicted, annotated, void)
    both, either = bitmaps.count(pair[0] & pair[1]), bitmaps.count(pair[0] | pair[1])
    j = np.where(either == 0, 1.0, both / np.maximum(either, 1))
    return _shaped(j, shape)


def boundary_f(predicted, annotated, void=None, tolerance: float = 0.008):
    """F = 2PR / (P + R) of the boundary pixels, each matched within a disk.

    A pixel is boundary when it differs from its east, south or south-east neighbour (the image edge repeats its last
    pixels). The disk's radius is ceil(tolerance * sqrt(H^2 + W^2)), or `tolerance` itself, in whole pixels, from 1 on.
    Neither mask has a boundary (both empty, or full): 1. Only one has: 0. P + R = 0: 0.
    Raises ValueError as `jaccard` does, and on a negative tolerance or a broken number of pixels.
    """
    pair, shape, (height, width) = _packed_pair(predicted, annotated, void)
    radius = _radius(tolerance, height, width)
    pairs = pair.reshape(2, -1, *pair.shape[-2:])
    # One frame at a time stays in the processor's cache, and far from the boundaries there is nothing to match.
    f = [_f_of_edges(bitmaps.cropped(bitmaps.boundary(pairs[:, i], width)), radius) for i in range(pairs.shape[1])]
    return _shaped(np.array(f, dtype=np.float64).reshape(shape), shape)


def _f_of_edges(edges, radius: int) -> float:
    n_predicted, n_annotated = bitmaps.count(edges).tolist()
    if n_predicted == 0 or n_annotated == 0:
        return float(n_predicted == n_annotated)
    near = bitmaps.dilated(edges, radius)
    matched_predicted, matched_annotated = bitmaps.count(edges & near[::-1]).tolist()
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
    pair = np.stack([predicted, annotated]).astype(bool, copy=False)
    if void is not None:
        void = np.asarray(void).astype(bool, copy=False)
        if void.shape != annotated.shape:
            raise ValueError(f"void {void.shape} must have the shape of the masks, {annotated.shape}")
        pair = pair & ~void
    return bitmaps.pack(pair), predicted.shape[:-2], predicted.shape[-2:]


def _shaped(values, shape):
    return values if shape else float(values)
