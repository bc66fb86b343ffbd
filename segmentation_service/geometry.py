"""Boxes and points: scaling between frames, clipping, rounding, and the policy's units. NumPy only.

Conventions, the same at every boundary of the project:

* a box is ``[x1, y1, x2, y2]``, a point is ``[x, y]``, a size is ``(height, width)``;
* integer corners are inclusive: ``[3, 5, 3, 5]`` is one pixel, and the last column of a frame of width W is W - 1;
* a float coordinate is a position on the plane ``[0, W] x [0, H]``, and changing the frame's size multiplies it by
  ``new / old`` on each axis, with no half-pixel shift. This is what the published policies and SAM2's own
  preprocessing do, it is exactly invertible, and a position is inside the frame before scaling if and only if it is
  inside after. Half a pixel at the policy's size can therefore become several at the frame's: that is rounding of the
  policy's answer, not an error of the conversion;
* a float becomes a pixel by ``floor(x + 0.5)``, clipped to ``0 .. W - 1``. (NumPy's and Python's ``round`` go to the
  even neighbour, which would move 0.5 and 1.5 in different directions.)

Every function takes anything NumPy can turn into an array whose last axis is 4 (boxes) or 2 (points), of any leading
shape including none, and returns a new array of that shape.
"""

from __future__ import annotations

import math

import numpy as np

UNITS = ("pixels", "relative_1000")
"""Units of a policy's answer: pixels of its resized image (Qwen2.5-VL), or 0..1000 on each axis (Qwen3-VL)."""

RELATIVE_RANGE = 1000.0


def scale_boxes(boxes, from_hw, to_hw) -> np.ndarray:
    """Scale boxes ``(..., 4)`` from a frame of size ``from_hw`` to one of size ``to_hw``; float64, no clipping.

    Raises ValueError where the last axis is not 4 or a size is not positive.
    """
    return _scale(_as_floats(boxes, 4), from_hw, to_hw)


def scale_points(points, from_hw, to_hw) -> np.ndarray:
    """Scale points ``(..., 2)`` from a frame of size ``from_hw`` to one of size ``to_hw``; float64, no clipping.

    Raises ValueError where the last axis is not 2 or a size is not positive.
    """
    return _scale(_as_floats(points, 2), from_hw, to_hw)


def clip_boxes(boxes, hw) -> np.ndarray:
    """Clip boxes ``(..., 4)`` to the pixels ``0 .. W - 1`` and ``0 .. H - 1`` of a frame; float64, NaN stays NaN.

    A box outside the frame collapses onto its border; ask `boxes_in_frame` first where that matters.
    """
    return _clip(_as_floats(boxes, 4), hw)


def clip_points(points, hw) -> np.ndarray:
    """Clip points ``(..., 2)`` to the pixels of a frame; float64, NaN stays NaN. See `points_in_frame`."""
    return _clip(_as_floats(points, 2), hw)


def round_boxes(boxes, hw) -> np.ndarray:
    """Round boxes ``(..., 4)`` to integer inclusive corners inside a frame; int64. Raises ValueError on NaN or inf."""
    return _round(_as_floats(boxes, 4), hw)


def round_points(points, hw) -> np.ndarray:
    """Round points ``(..., 2)`` to pixels inside a frame; int64. Raises ValueError on NaN or infinity."""
    return _round(_as_floats(points, 2), hw)


def boxes_in_frame(boxes, hw) -> np.ndarray:
    """Which boxes ``(..., 4)`` keep at least one pixel after clipping; bool ``(...)``.

    True where all four numbers are finite, ``x1 <= x2``, ``y1 <= y2`` (corners are inclusive, so equal corners are one
    pixel) and the box meets the frame: ``x1 < W``, ``y1 < H``, ``x2 >= 0``, ``y2 >= 0``.
    """
    boxes = _as_floats(boxes, 4)
    height, width = _size(hw)
    x1, y1, x2, y2 = (boxes[..., k] for k in range(4))
    with np.errstate(invalid="ignore"):
        ordered = (x1 <= x2) & (y1 <= y2)
        meets = (x1 < width) & (y1 < height) & (x2 >= 0) & (y2 >= 0)
    return np.isfinite(boxes).all(axis=-1) & ordered & meets


def points_in_frame(points, hw) -> np.ndarray:
    """Which points ``(..., 2)`` lie in the frame, its right and lower edge included; bool ``(...)``.

    The edge counts because relative units can name it (1000 of 1000); clipping then moves it to the last pixel.
    """
    points = _as_floats(points, 2)
    height, width = _size(hw)
    x, y = points[..., 0], points[..., 1]
    with np.errstate(invalid="ignore"):
        return (x >= 0) & (x <= width) & (y >= 0) & (y <= height)


def from_policy_units(coordinates, units: str, policy_hw, frame_hw) -> np.ndarray:
    """Convert a policy's boxes ``(..., 4)`` or points ``(..., 2)`` to pixels of the original frame; float64.

    units: "pixels" (pixels of the policy's resized image, whose size is ``policy_hw``) or "relative_1000" (0..1000 on
    each axis; ``policy_hw`` does not matter). Not rounded and not clipped. Raises ValueError for other units.
    """
    return _scale(_as_boxes_or_points(coordinates), _units_hw(units, policy_hw), frame_hw)


def to_policy_units(coordinates, units: str, policy_hw, frame_hw) -> np.ndarray:
    """Convert boxes or points in pixels of the original frame to a policy's units; inverse of `from_policy_units`."""
    return _scale(_as_boxes_or_points(coordinates), frame_hw, _units_hw(units, policy_hw))


def _units_hw(units: str, policy_hw) -> tuple[float, float]:
    if units == "pixels":
        return _size(policy_hw)
    if units == "relative_1000":
        return RELATIVE_RANGE, RELATIVE_RANGE
    raise ValueError(f"units must be one of {', '.join(UNITS)}; got {units!r}")


def _size(hw) -> tuple[float, float]:
    height, width = hw
    if not (0 < height < math.inf and 0 < width < math.inf):
        raise ValueError(f"a size is (height, width), both positive; got {tuple(hw)}")
    return float(height), float(width)


def _as_floats(values, last: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 and array.shape[-1:] != (last,):
        # An empty list has no last axis of its own: no boxes are still boxes.
        array = array.reshape(0, last)
    if array.shape[-1:] != (last,):
        kind = "boxes [x1, y1, x2, y2]" if last == 4 else "points [x, y]"
        raise ValueError(f"expected {kind}, so a last axis of {last}; got an array of shape {array.shape}")
    return array


def _as_boxes_or_points(values) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return array if array.shape[-1:] in ((2,), (4,)) else array.reshape(0, 2)
    if array.shape[-1:] not in ((2,), (4,)):
        raise ValueError(f"expected boxes (last axis 4) or points (last axis 2); got an array of shape {array.shape}")
    return array


def _xy(hw, last: int) -> np.ndarray:
    height, width = _size(hw)
    return np.array([width, height] * (last // 2))


def _scale(array: np.ndarray, from_hw, to_hw) -> np.ndarray:
    last = array.shape[-1]
    # Multiply before dividing: integers scaled there and back then come out exactly in far more cases.
    return array * _xy(to_hw, last) / _xy(from_hw, last)


def _clip(array: np.ndarray, hw) -> np.ndarray:
    return np.clip(array, 0.0, np.maximum(_xy(hw, array.shape[-1]) - 1.0, 0.0))


def _round(array: np.ndarray, hw) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ValueError(f"cannot round coordinates that are not finite: {array.tolist()}")
    return _clip(np.floor(array + 0.5), hw).astype(np.int64)
