"""Masks packed 64 columns to a word, for fast counts and dilations: numpy arrays of uint64, column x being bit x % 64 of word x // 64.

`pack` returns words (..., H, ceil(W/64)). Boundaries and their dilations are (..., words, rows), so that a step to the next word or the
next row moves long runs of memory. Bits past the width are zero in what `pack` and `boundary` return.
"""

from math import isqrt

import numpy as np


def pack(masks: np.ndarray) -> np.ndarray:
    """bool, or uint8 of which all but 0 counts, (..., H, W) -> words."""
    packed = np.packbits(masks, axis=-1, bitorder="little")
    missing = -packed.shape[-1] % 8
    if missing:
        packed = np.concatenate([packed, np.zeros((*packed.shape[:-1], missing), np.uint8)], axis=-1)
    return np.ascontiguousarray(packed).view("<u8")


def count(words: np.ndarray) -> np.ndarray:
    """Pixels set, int64, over the last two axes."""
    return np.bitwise_count(words).sum(axis=(-2, -1), dtype=np.int64)


def east(words: np.ndarray) -> np.ndarray:
    """out[x] = in[x + 1]; zeros from outside."""
    out = words >> np.uint64(1)
    out[..., :-1, :] |= words[..., 1:, :] << np.uint64(63)
    return out


def widened(words: np.ndarray, by: int) -> np.ndarray:
    """out[x] = in[x - by] | in[x] | in[x + by], 0 < by < 64; bits pushed past the width stay in the padding."""
    near, far = np.uint64(by), np.uint64(64 - by)
    out = words >> near
    out |= words
    out |= words << near
    out[..., :-1, :] |= words[..., 1:, :] << far
    out[..., 1:, :] |= words[..., :-1, :] >> far
    return out


def occupied(words: np.ndarray) -> tuple[slice, slice]:
    """Rows and words in which any mask can have a pixel or a boundary: those with a pixel set, one more of each to the north-west, and a row of
    zeros to the south if the image has one."""
    used = np.bitwise_or.reduce(words.reshape(-1, *words.shape[-2:]), axis=0)
    rows, columns = np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))
    if not len(rows):
        return slice(1), slice(1)
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 1)


def boundary(words: np.ndarray, width: int, where: tuple[slice, slice]) -> np.ndarray:
    """Pixels that differ from their east, south or south-east neighbour; the edge of the image repeats its last pixels.

    words as `pack` gives them, of images of this width; of them the part `where` (`occupied`) is returned, (..., words, rows).
    """
    last = np.zeros((words.shape[-1], 1), np.uint64)
    last[(width - 1) // 64] = np.uint64(1) << np.uint64((width - 1) % 64)
    here = np.ascontiguousarray(words[..., *where].swapaxes(-1, -2))
    there = east(here) | here & last[where[1]]
    return (here ^ _south(here)) | (here ^ there) | (here ^ _south(there))


def _south(words: np.ndarray) -> np.ndarray:
    """out[row] = in[row + 1]; the last row twice."""
    return np.concatenate([words[..., 1:], words[..., -1:]], axis=-1)


def dilated(words: np.ndarray, radius: int) -> np.ndarray:
    """Dilation by the disk x^2 + y^2 <= radius^2; padding bits of the result are undefined."""
    out = np.zeros_like(words)
    row, half_width = words, 0  # `row`: every pixel widened by half_width to both sides
    height = words.shape[-1]
    for dy in range(radius, -1, -1):
        wanted = isqrt(radius * radius - dy * dy)
        while half_width < wanted:
            # At most half_width + 1: of a pixel at the edge only one half is there, and its copy must leave no gap.
            step = min(half_width + 1, wanted - half_width, 63)
            row = widened(row, step)
            half_width += step
        if dy == 0:
            out |= row
        elif dy < height:
            out[..., dy:] |= row[..., :-dy]
            out[..., :-dy] |= row[..., dy:]
    return out
