"""Masks: COCO run-length encoding, tight box, inner point, and IoU. NumPy and pycocotools (SciPy only for the point)."""

from __future__ import annotations

import numpy as np

_MOST_DIGITS = 7  # of a number in compressed counts: 35 bits, more than any image has pixels, and no sum of them overflows


def encode_rle(mask_HW) -> dict:
    """Encode a mask ``(H, W)`` (bool, or 0 / non-zero) as COCO's compressed RLE: ``{"size": [H, W], "counts": str}``.

    The result is JSON-ready. Raises ValueError where the mask is not two-dimensional or has no pixels.
    """
    from pycocotools import mask as coco

    mask_HW = _as_mask(mask_HW)
    if mask_HW.size == 0:
        raise ValueError(f"a mask needs at least one row and one column; got shape {mask_HW.shape}")
    rle = coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(rle["size"][0]), int(rle["size"][1])], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle, order: str = "C") -> np.ndarray:
    """Decode COCO RLE, compressed (``counts`` str or bytes) or not (list of ints), into a bool mask ``(H, W)``.

    rle: a dictionary, or an object with ``size`` and ``counts`` such as the service's `Rle`. order: of the pixels in memory, rows ("C") or columns ("F")
    one after the other; runs are of columns, so "F" copies nothing. Raises ValueError where it is no RLE, or its runs do not add up to H * W.
    """
    try:
        size, counts = (rle.size, rle.counts) if hasattr(rle, "counts") else (rle["size"], rle["counts"])
        height, width = (int(n) for n in size)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f'a run-length mask is {{"size": [h, w], "counts": ...}}; got {str(rle)[:80]}') from error
    if height <= 0 or width <= 0:
        raise ValueError(f"a run-length mask needs a positive size; got {[height, width]}")
    pixels = height * width
    said = [int(n) for n in counts] if isinstance(counts, (list, tuple)) else _parse_counts(counts)
    runs = np.asarray(said)
    sound = bool(((runs >= 0) & (runs <= pixels)).all())
    if not sound or runs.sum() != pixels:
        raise ValueError(f"the runs of the mask add up to {sum(map(int, said))} pixels, its size {height}x{width} needs {pixels}" + ("" if sound else ", and one is negative or too long"))
    inside = np.arange(len(runs)) % 2 == 1  # runs go down the columns, the first one outside
    return np.asarray(np.repeat(inside, runs).reshape(width, height).T, order=order)


def mask_to_box(mask_HW) -> list[int] | None:
    """The tight box ``[x1, y1, x2, y2]`` (integers, corners inclusive) of a mask ``(H, W)``; None where it is empty."""
    mask_HW = _as_mask(mask_HW)
    columns = np.flatnonzero(mask_HW.any(axis=0))
    if columns.size == 0:
        return None
    rows = np.flatnonzero(mask_HW.any(axis=1))
    return [int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])]


def mask_to_point(mask_HW) -> list[int] | None:
    """The pixel ``[x, y]`` deepest inside a mask ``(H, W)``: the maximum of its Euclidean distance transform.

    Always a pixel of the mask, also for rings and crescents; the frame's border counts as outside. The first such
    pixel in row order on a tie; None where the mask is empty. This is how the data of VisionReasoner makes its points.
    """
    from scipy.ndimage import distance_transform_edt

    mask_HW = _as_mask(mask_HW)
    box = mask_to_box(mask_HW)
    if box is None:
        return None
    x1, y1, x2, y2 = box
    # The crop holds the whole mask, and one row of padding stands for all that lies outside it.
    depth = distance_transform_edt(np.pad(mask_HW[y1 : y2 + 1, x1 : x2 + 1], 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return [int(column) + x1, int(row) + y1]


def mask_iou(a_HW, b_HW) -> float:
    """Intersection over union of two masks ``(H, W)``; 1.0 where both are empty. Raises ValueError on unequal shapes."""
    a_HW, b_HW = _as_mask(a_HW), _as_mask(b_HW)
    if a_HW.shape != b_HW.shape:
        raise ValueError(f"masks of different sizes have no IoU: {a_HW.shape} and {b_HW.shape}")
    union = int(np.count_nonzero(a_HW | b_HW))
    return int(np.count_nonzero(a_HW & b_HW)) / union if union else 1.0


def _as_mask(mask) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask is two-dimensional (H, W); got shape {mask.shape}")
    return mask if mask.dtype == bool else mask != 0


def _parse_counts(counts) -> np.ndarray:
    """The run lengths in COCO's compressed string, int64: five bits a character, from 48, the fourth and later as differences to the last but one."""
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    if not isinstance(text, (bytes, bytearray)):
        raise ValueError(f"the counts of a run-length mask are a string or a list of integers; got {type(counts).__name__}")
    if not text:
        return np.zeros(0, np.int64)
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if (wrong := (codes < 0) | (codes >= 64)).any():
        raise ValueError(f"{chr(text[int(wrong.argmax())])!r} cannot stand in the counts of a run-length mask")
    ends = np.flatnonzero(codes < 32)
    if not len(ends) or ends[-1] < len(codes) - 1:
        raise ValueError("the counts of the run-length mask break off in the middle of a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > _MOST_DIGITS:
        raise ValueError(f"a number of {digits.max()} characters cannot stand in the counts of a run-length mask")
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    runs = np.add.reduceat((codes & 31) << 5 * place, starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << 5 * digits, 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs
