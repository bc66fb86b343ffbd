"""Exact taxicab (L1) distance to a mask, with its own pixel pitch on each axis."""

import math
from typing import NamedTuple

import numpy as np

from segmentation_service import geometry


def taxicab_distance(mask_HW: np.ndarray, pitch_yx: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """float64 (H, W): the smallest pitch_y*|dy| + pitch_x*|dx| to a pixel of the mask; 0 inside, inf for an empty mask.

    The L1 norm is a sum over the axes, so one sweep forward and back along each axis is exact.
    """
    distance = np.where(mask_HW, 0.0, np.inf)
    for axis, pitch in ((1, pitch_yx[1]), (0, pitch_yx[0])):
        ramp = np.arange(distance.shape[axis]) * float(pitch)
        ramp = ramp[None, :] if axis == 1 else ramp[:, None]
        ahead = np.minimum.accumulate(distance - ramp, axis=axis) + ramp
        back = np.flip(np.minimum.accumulate(np.flip(distance + ramp, axis), axis=axis), axis) - ramp
        distance = np.minimum(ahead, back)
    distance[mask_HW] = 0.0
    return distance


class NearField(NamedTuple):
    """Taxicab distances in the part of the image where they can be within reach; (top, left) is its first pixel."""

    distance: np.ndarray
    top: int
    left: int
    image_hw: tuple[int, int]


def near_field(mask_HW: np.ndarray, pitch_yx: tuple[float, float], reach: float) -> NearField:
    """Distances up to `reach`: beyond the mask's bounding box widened by it everything is farther, so no work is done there."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return NearField(np.zeros((0, 0)), 0, 0, mask_HW.shape)
    top, bottom = _widened(rows, reach / pitch_yx[0], mask_HW.shape[0])
    left, right = _widened(columns, reach / pitch_yx[1], mask_HW.shape[1])
    return NearField(taxicab_distance(mask_HW[top:bottom, left:right], pitch_yx), top, left, mask_HW.shape)


def distance_at(points_xy, field: NearField) -> np.ndarray:
    """float64 (K,): distance of each point's pixel to the mask; inf outside the field and outside the image.

    points_xy: (K, 2) in pixels of the mask; `geometry` says which pixel that is, and what lies in the image. Distances
    are rounded to 1e-9, so that a comparison with a threshold does not hang on the order of the sweeps.
    """
    points = np.asarray(points_xy, dtype=np.float64).reshape(-1, 2)
    out = np.full(len(points), np.inf)
    x, y = geometry.round_points(points, field.image_hw).T - [[field.left], [field.top]]
    known = geometry.points_in_frame(points, field.image_hw) & (x >= 0) & (y >= 0)
    known &= (y < field.distance.shape[0]) & (x < field.distance.shape[1])
    out[known] = np.round(field.distance[y[known], x[known]], 9)
    return out


def _widened(used: np.ndarray, by: float, size: int) -> tuple[int, int]:
    margin = math.ceil(min(by, size)) + 1
    return max(0, int(used[0]) - margin), min(size, int(used[-1]) + margin + 1)
