"""Exact taxicab (L1) distance of points to a mask, with its own pixel pitch on each axis."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from reward_service.matching import rows_of
from segmentation_service import geometry


class MaskDistance:
    """Asks a k-d tree of the mask's edge for the nearest pixel: less work than a distance transform of the frame, as points are few.

    mask_HW: bool. pitch_yx: length of a step to the next row and to the next column.
    """

    def __init__(self, mask_HW: np.ndarray, pitch_yx: tuple[float, float] = (1.0, 1.0)) -> None:
        self.mask_HW, self.pitch_yx = mask_HW, pitch_yx
        self.tree = cKDTree(edge_pixels(mask_HW) * pitch_yx)

    def at(self, points_xy) -> np.ndarray:
        """float64 (K,): the smallest pitch_y*|dy| + pitch_x*|dx| from the pixel of each point to a pixel of the mask; 0 in the mask,
        inf outside the image and where the mask is empty.

        points_xy: (K, 2) in pixels of the mask; `geometry` says which pixel that is, and what lies in the image. Distances
        are rounded to 1e-9, so that a comparison with a threshold does not hang on the order of a sum.
        """
        points = rows_of(points_xy, 2)
        inside = geometry.points_in_frame(points, self.mask_HW.shape)
        pixels_yx = geometry.round_points(points[inside], self.mask_HW.shape)[:, ::-1]
        nearest, _ = self.tree.query(pixels_yx * self.pitch_yx, p=1)
        distances = np.full(len(points), np.inf)
        distances[inside] = np.where(self.mask_HW[tuple(pixels_yx.T)], 0.0, np.round(nearest, 9))
        return distances


def edge_pixels(mask_HW: np.ndarray) -> np.ndarray:
    """int64 (K, 2), row and column: the pixels of the mask with a neighbour that is not in it. One of them is nearest to any point outside."""
    inner_HW = mask_HW.copy()
    inner_HW[1:] &= mask_HW[:-1]
    inner_HW[:-1] &= mask_HW[1:]
    inner_HW[:, 1:] &= mask_HW[:, :-1]
    inner_HW[:, :-1] &= mask_HW[:, 1:]
    return np.stack(np.divmod(np.flatnonzero(mask_HW != inner_HW), mask_HW.shape[1]), axis=1)  # faster than argwhere
