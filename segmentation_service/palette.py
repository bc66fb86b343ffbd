"""Masks of several objects as one palette PNG, as DAVIS and YouTube-VOS have them: 0 is background, k the k-th object."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

MAX_OBJECTS = 254
"""255 is void in those data sets."""


@cache
def davis_palette() -> bytes:
    """256 x RGB. The bits of a number, in threes from the lowest, are the highest bits of red, green and blue (the colours of PASCAL VOC)."""
    colours = np.zeros((256, 3), np.uint8)
    for number in range(256):
        for place in range(8):
            for channel in range(3):
                colours[number, channel] |= (number >> (3 * place + channel) & 1) << (7 - place)
    return colours.tobytes()


def save_palette(file: str | Path, masks: Sequence[np.ndarray], hw: tuple[int, int]) -> None:
    """masks: bool (H, W) of objects 1, 2, ...; where they overlap the later one is on top. Raises ValueError for more than a palette can number."""
    from PIL import Image

    if len(masks) > MAX_OBJECTS:
        raise ValueError(f"{len(masks)} objects in one palette image; it can number {MAX_OBJECTS}")
    numbers_HW = np.zeros(hw, np.uint8)
    for k, mask_HW in enumerate(masks, 1):
        numbers_HW[mask_HW] = k
    image = Image.fromarray(numbers_HW)  # grey; with a palette it becomes one of mode P
    image.putpalette(davis_palette())
    image.save(file, format="PNG")
