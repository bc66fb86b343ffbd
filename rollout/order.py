"""The order in which episodes are drawn: a pure function of (seed, position), so a run resumes at an exact position."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def episode_at(position: int, count: int, seed: int) -> int:
    """Index of the episode at a position of the endless stream; every epoch is a new permutation of `range(count)`."""
    return int(_epoch(count, seed, position // count)[position % count])


def substitute_at(position: int, attempt: int, count: int, seed: int) -> int:
    """Index of the episode that stands in at a position whose own cannot be used, nor those of the attempts before: uniform over
    all, so that what follows in the stream does not move. Attempts count from 1."""
    return int(np.random.default_rng([seed, position, 3, attempt]).integers(count))


def target_frame_at(position: int, frames: list[int], seed: int) -> int:
    """The target frame of the draw at a position: uniform over `frames`."""
    return frames[int(np.random.default_rng([seed, position, 1]).integers(len(frames)))]


def uniform_frames(num_frames: int, count: int) -> list[int]:
    """`count` frame ids spread evenly over the video, first and last included; fewer where the video is shorter."""
    return sorted(set(np.linspace(0, num_frames - 1, count).round().astype(int).tolist())) if count else []
