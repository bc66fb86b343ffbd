"""Masks drawn over their frame, each in a colour of its own, for people to look at."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .masks import decode_rle

FILL = 0.45
"""How much of a mask's inside is its colour; the rest is the frame."""


def draw_overlay(frame_HW3: np.ndarray, masks: Sequence, boxes: Sequence[Sequence[float] | None] | None = None) -> np.ndarray:
    """A copy of the frame with the masks filled and outlined, and the boxes they were asked for; RGB uint8 (H, W, 3).

    frame_HW3: RGB uint8. masks: bool (H, W) each, or COCO RLE, as a dictionary or `service_request.Rle`; later ones lie on top.
    boxes: for each mask x1, y1, x2, y2 in pixels, corners inclusive, or None. Raises ValueError where sizes or numbers do not match.
    """
    frame_HW3 = np.asarray(frame_HW3)
    if frame_HW3.dtype != np.uint8 or frame_HW3.ndim != 3 or frame_HW3.shape[2] != 3:
        raise ValueError(f"a frame is an RGB uint8 array (H, W, 3); got {frame_HW3.dtype} {frame_HW3.shape}")
    if boxes is not None and len(boxes) != len(masks):
        raise ValueError(f"each mask needs a box or None; got {len(masks)} masks and {len(boxes)} boxes")
    drawn_HW3 = frame_HW3.copy()
    width = max(1, round(min(frame_HW3.shape[:2]) / 240))
    for i, mask in enumerate(masks):
        mask_HW = _as_mask(mask)
        if mask_HW.shape != frame_HW3.shape[:2]:
            raise ValueError(f"mask {i} is {mask_HW.shape}, the frame {frame_HW3.shape[:2]} (height, width)")
        colour = np.array(_colour(i))
        drawn_HW3[mask_HW] = np.rint((1 - FILL) * drawn_HW3[mask_HW] + FILL * colour).astype(np.uint8)
        outside = _grown(mask_HW, width)
        _line(drawn_HW3, outside & ~mask_HW, _grown(outside, width) & ~outside, colour)
        if boxes is not None and boxes[i] is not None:
            frame_of_box = _box_outline(boxes[i], mask_HW.shape, width)
            _line(drawn_HW3, frame_of_box, _grown(frame_of_box, width) & ~frame_of_box, colour)
    return drawn_HW3


def draw_points(frame_HW3: np.ndarray, points: Sequence[Sequence[float]], fill: str = "white", edge: str = "black") -> np.ndarray:
    """A copy of the frame with a disc at each (x, y) in it, pixels; points outside are left out. RGB uint8 (H, W, 3)."""
    from PIL import Image, ImageDraw

    height, width = frame_HW3.shape[:2]
    drawn, radius = Image.fromarray(frame_HW3), max(2, min(height, width) // 80)
    for x, y in points:
        if 0 <= x < width and 0 <= y < height:
            ImageDraw.Draw(drawn).circle((x, y), radius, fill, edge)
    return np.array(drawn)


def save_overlay(path: str | Path, frame_HW3: np.ndarray, masks: Sequence, boxes: Sequence[Sequence[float] | None] | None = None) -> Path:
    """`draw_overlay` as a PNG file, written under a temporary name and then renamed."""
    from PIL import Image

    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        Image.fromarray(draw_overlay(frame_HW3, masks, boxes)).save(part, format="PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _as_mask(mask) -> np.ndarray:
    return decode_rle(mask) if isinstance(mask, dict) or hasattr(mask, "counts") else np.asarray(mask).astype(bool)


def _colour(i: int) -> tuple[int, int, int]:
    """Bright colours; hues a golden section apart, so that neighbours in number differ most however many there are."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb((0.97 + i * 0.618034) % 1.0, 0.85, 1.0))


def _line(drawn_HW3: np.ndarray, line_HW: np.ndarray, edge_HW: np.ndarray, colour: np.ndarray) -> None:
    """The colour beside black: one of the two stands out on any background."""
    drawn_HW3[edge_HW] = 0
    drawn_HW3[line_HW] = colour


def _grown(mask_HW: np.ndarray, by: int) -> np.ndarray:
    """The mask and all within `by` pixels of it, in steps to the four sides."""
    for _ in range(by):
        grown_HW = mask_HW.copy()
        grown_HW[1:] |= mask_HW[:-1]
        grown_HW[:-1] |= mask_HW[1:]
        grown_HW[:, 1:] |= mask_HW[:, :-1]
        grown_HW[:, :-1] |= mask_HW[:, 1:]
        mask_HW = grown_HW
    return mask_HW


def _box_outline(box: Sequence[float], hw: tuple[int, int], width: int) -> np.ndarray:
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    outline_HW = np.zeros(hw, dtype=bool)
    outline_HW[max(0, y1) : max(0, y2 + 1), max(0, x1) : max(0, x2 + 1)] = True
    outline_HW[max(0, y1 + width) : max(0, y2 + 1 - width), max(0, x1 + width) : max(0, x2 + 1 - width)] = False
    return outline_HW
