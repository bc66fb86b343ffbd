"""Pairs of predicted and true objects: M x N matrices of overlap and distance, and one-to-one assignment.

Boxes are [x1, y1, x2, y2] with inclusive corners, points [x, y]; both sides in the same space. A row of NaN stands for
a missing box or point: it overlaps nothing (0) and is infinitely far.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from reward_service import bitmaps


def rows_of(tuples: Sequence[tuple], width: int) -> np.ndarray:
    """float64 (len(tuples), width); much faster than np.array of short tuples."""
    return np.fromiter(chain.from_iterable(tuples), np.float64, width * len(tuples)).reshape(-1, width)


def box_iou_matrix(predicted_M4: np.ndarray, true_N4: np.ndarray) -> np.ndarray:
    """(M, N) IoU with the inclusive +1 on widths, heights and intersections (VisionReasoner); 0 where it is undefined."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = predicted_M4.T[:, :, None], true_N4.T[:, None, :]
    with np.errstate(all="ignore"):
        width, height = np.minimum(x2, u2) - np.maximum(x1, u1) + 1, np.minimum(y2, v2) - np.maximum(y1, v1) + 1
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        union = (x2 - x1 + 1) * (y2 - y1 + 1) + (u2 - u1 + 1) * (v2 - v1 + 1) - shared
        return np.where(union > 0, shared / union, 0.0)  # NaN (a missing box) is not > 0


def box_l1_matrix(predicted_M4: np.ndarray, true_N4: np.ndarray) -> np.ndarray:
    """(M, N) mean absolute difference of the four coordinates; inf for a missing box."""
    return _infinite(cdist(predicted_M4, true_N4, "cityblock") / 4)


def point_distance_matrix(predicted_M2: np.ndarray, true_N2: np.ndarray) -> np.ndarray:
    """(M, N) Euclidean distance; inf for a missing point."""
    return _infinite(cdist(predicted_M2, true_N2))


def point_in_own_box(points_M2: np.ndarray, boxes_M4: np.ndarray) -> np.ndarray:
    """(M,) bool: the point lies in the box of the same object, edges included; False when either is missing."""
    (x, y), (x1, y1, x2, y2) = points_M2.T, boxes_M4.T
    return (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)


def mask_iou_matrix(predicted_MHW: np.ndarray, true_NHW: np.ndarray, both_empty: float = 0.0) -> np.ndarray:
    """(M, N) IoU of masks; `both_empty` where both are (0: nothing found is no overlap between two objects)."""
    p, t = bitmaps.pack(predicted_MHW), bitmaps.pack(true_NHW)
    out = np.zeros((len(p), len(t)))
    for m in range(len(p)):  # one row at a time: M * N full masks at once would not fit for 120 objects
        shared, either = bitmaps.count(p[m] & t), bitmaps.count(p[m] | t)
        out[m] = np.where(either > 0, shared / np.maximum(either, 1), both_empty)
    return out


def assign(gain_MN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the one-to-one assignment with the greatest total gain (Hungarian; min(M, N) pairs)."""
    m, n = gain_MN.shape
    if m == 0 or n == 0:
        return np.zeros(0, int), np.zeros(0, int)
    if m == 1:  # the common cases, without the solver's overhead
        return np.zeros(1, int), gain_MN.argmax(axis=1)
    if n == 1:
        return gain_MN.argmax(axis=0), np.zeros(1, int)
    return linear_sum_assignment(gain_MN, maximize=True)


def assign_each(gain_PN: np.ndarray, block_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`assign` of each block of rows, faster: rows of the whole and their columns, in order within a block.

    block_P: number of the block of each row, in ascending order. Where each row of a block is largest in one column, and no two of them in
    the same, that is the only best assignment. The solver does the rest.
    """
    rows_P, column_P = np.arange(len(gain_PN)), gain_PN.argmax(axis=1)
    place_P = block_P * gain_PN.shape[1] + column_P
    alone_P = np.bincount(place_P, minlength=1)[place_P] == 1
    clear_P = alone_P & (np.count_nonzero(gain_PN == gain_PN[rows_P, column_P, None], axis=1) == 1)
    if clear_P.all():
        return rows_P, column_P
    unclear_B = np.zeros(block_P[-1] + 1, bool)
    unclear_B[block_P[~clear_P]] = True
    done_P = ~unclear_B[block_P]
    rows, found = [rows_P[done_P]], [column_P[done_P]]
    for block in np.flatnonzero(unclear_B):
        start, end = np.searchsorted(block_P, (block, block + 1))
        mine, theirs = assign(gain_PN[start:end])
        rows.append(start + mine)
        found.append(theirs)
    return np.concatenate(rows), np.concatenate(found)


def _infinite(distances: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(distances), np.inf, distances)
