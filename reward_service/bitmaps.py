"""Masks packed 64 columns to a word, for fast counts and dilations: numpy arrays `words (..., H, ceil(W/64)) uint64`.

Column x is bit x % 64 of word x // 64. Bits past the width are zero in what `pack` and `boundary` return.
"""

from math import isqrt

import numpy as np


def pack(masks: np.ndarray) -> np.ndarray:
    """bool (..., H, W) -> words."""
    packed = np.packbits(masks, axis=-1, bitorder="little")
    missing = -packed.shape[-1] % 8
    if missing:
        packed = np.concatenate([packed, np.zeros((*packed.shape[:-1], missing), np.uint8)], axis=-1)
    return np.ascontiguousarray(packed).view("<u8")


def count(words: np.ndarray) -> np.ndarray:
    """Pixels set, int64, over the last two axes."""
    return np.bitwise_count(words).sum(axis=(-2, -1), dtype=np.int64)


def columns_shifted(words: np.ndarray, by: int) -> np.ndarray:
    """out[x] = in[x + by], zeros from outside (bits pushed past the width stay in the padding)."""
    whole, bits = divmod(abs(by), 64)
    out = np.zeros_like(words)
    n = words.shape[-1] - whole
    if n <= 0:
        return out
    if by >= 0:
        source, target = words[..., whole:], out[..., :n]
        np.right_shift(source, np.uint64(bits), out=target)
        if bits and n > 1:
            target[..., :-1] |= source[..., 1:] << np.uint64(64 - bits)
    else:
        source, target = words[..., :n], out[..., whole:]
        np.left_shift(source, np.uint64(bits), out=target)
        if bits and n > 1:
            target[..., 1:] |= source[..., :-1] >> np.uint64(64 - bits)
    return out


def boundary(words: np.ndarray, width: int) -> np.ndarray:
    """Pixels that differ from their east, south or south-east neighbour; the edge of the image repeats its last pixels."""
    last = np.zeros(words.shape[-1], np.uint64)
    last[(width - 1) // 64] = np.uint64(1) << np.uint64((width - 1) % 64)
    south = np.concatenate([words[..., 1:, :], words[..., -1:, :]], axis=-2)
    east = columns_shifted(words, 1) | (words & last)
    south_east = columns_shifted(south, 1) | (south & last)
    return (words ^ south) | (words ^ east) | (words ^ south_east)


def dilated(words: np.ndarray, radius: int) -> np.ndarray:
    """Dilation by the disk x^2 + y^2 <= radius^2; padding bits of the result are undefined."""
    out = np.zeros_like(words)
    row, half_width = words, 0  # `row`: every pixel widened by half_width to both sides
    height = words.shape[-2]
    for dy in range(radius, -1, -1):
        wanted = isqrt(radius * radius - dy * dy)
        while half_width < wanted:
            # At most half_width + 1, so that the pixel stepped over lies between two pixels of the image.
            step = min(half_width + 1, wanted - half_width)
            row = row | columns_shifted(row, step) | columns_shifted(row, -step)
            half_width += step
        if dy == 0:
            out |= row
        elif dy < height:
            out[..., dy:, :] |= row[..., :-dy, :]
            out[..., :-dy, :] |= row[..., dy:, :]
    return out


def cropped(words: np.ndarray) -> np.ndarray:
    """The smallest rows and words of (..., H, W/64) that hold every pixel set; one empty row where none is set."""
    flat = words.reshape(-1, *words.shape[-2:])
    used = np.bitwise_or.reduce(flat, axis=0)
    rows, columns = np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))
    if not len(rows):
        return words[..., :1, :1]
    return np.ascontiguousarray(words[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
