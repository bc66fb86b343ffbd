"""The order in which episodes are drawn: a pure function of (seed, position), so a run resumes at an exact position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WINDOW_GROUPS = 64
_GROUPS, _ROWS = 3, 4  # last numbers of the seeds, so that no two streams are the same (`target_frame_at` has 1, foreign queries 2)


class ShuffledOrder:
    """The rows of a data set in random order, again and again: `order[p]` is the row at position p >= 0, in any order of asking.

    Every epoch shuffles the row groups, cuts them into windows of `window_groups`, and shuffles the rows of each window. So it
    is a permutation of all rows, while the rows of one window come from so few row groups that a reader can hold them. A data
    set that fits into one window is shuffled as a whole. What is kept grows with the number of row groups, not of rows.

    group_rows: rows of each row group, in the data set's order.
    """

    def __init__(self, group_rows: Sequence[int] | np.ndarray, seed: int, window_groups: int = WINDOW_GROUPS) -> None:
        self.group_rows, self.seed, self.window_groups = np.asarray(group_rows, np.int64), seed, window_groups
        self.count = int(self.group_rows.sum())
        self._first = np.cumsum(self.group_rows) - self.group_rows
        self._epoch = lru_cache(2)(self._shuffled_groups)
        self._rows = lru_cache(2)(self._shuffled_rows)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self._rows(epoch, window)[place - starts[window]])

    def _shuffled_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The row groups in this epoch's order, and the place of each window's first row."""
        groups = np.arange(len(self.group_rows))
        if len(groups) > self.window_groups:
            np.random.default_rng([self.seed, epoch, _GROUPS]).shuffle(groups)
        rows = self.group_rows[groups]
        return groups, (np.cumsum(rows) - rows)[:: self.window_groups]

    def _shuffled_rows(self, epoch: int, window: int) -> np.ndarray:
        groups, starts = self._epoch(epoch)
        groups = groups[window * self.window_groups : (window + 1) * self.window_groups]
        rows = np.concatenate([np.arange(self._first[g], self._first[g] + self.group_rows[g]) for g in groups])
        seed = [self.seed, epoch] if len(starts) == 1 else [self.seed, epoch, window, _ROWS]
        return rows[np.random.default_rng(seed).permutation(len(rows))]


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
