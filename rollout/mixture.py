"""Several data sets drawn from by weight, as one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from rollout.dataset import EpisodeDataset
from rollout.episodes import DataError, Episode
from rollout.order import ShuffledOrder

BLOCK = 25_200  # draws over which the shares are exact: divisible by 1 to 10 and by 100
_BLOCKS = 5  # last number of the seeds of blocks, see `rollout.order`


class Mixture:
    """The episodes of several data sets one after the other (`len`, `mixture[i]`), and `at(position)`, an endless stream in which each
    data set has its share, evenly spread, in an order of its own. What is at a position follows from the seed alone.

    Of every BLOCK draws a data set has weight / sum(weights), rounded to whole draws. Raises `DataError` where that is none.
    """

    def __init__(self, datasets: Sequence[EpisodeDataset], weights: Sequence[float], seed: int) -> None:
        self.datasets, self.seed = list(datasets), seed
        self.shares = block_shares(weights)
        self._first = np.cumsum([0, *(len(d) for d in datasets)])
        self._orders = [ShuffledOrder(d.group_rows, seed + number) for number, d in enumerate(datasets)]
        self._block = lru_cache(2)(self._spread)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, i: int) -> Episode:
        dataset, row = self._locate(i)
        return dataset[row]

    def row(self, i: int) -> dict:
        dataset, row = self._locate(i)
        return dataset.row(row)

    def rows(self) -> Iterator[dict]:
        return (row for dataset in self.datasets for row in dataset.rows())

    def project(self, *columns: str) -> Mixture:
        """The same with only these columns, for `row` and `rows`."""
        view = copy.copy(self)
        view.datasets = [d.project(*columns) for d in self.datasets]
        return view

    def at(self, position: int) -> int:
        """The number (as in `mixture[i]`) of the episode at a position >= 0 of the stream."""
        block, place = divmod(position, BLOCK)
        which, rank = self._block(block)
        number = int(which[place])
        return int(self._first[number]) + self._orders[number][block * int(self.shares[number]) + int(rank[place])]

    @property
    def fingerprint(self) -> str:
        """That of the data set, or of each with its draws in a block: `16800*1f0c…+8400*77aa…`."""
        prints = [d.fingerprint for d in self.datasets]
        return prints[0] if len(prints) == 1 else "+".join(f"{share}*{p}" for share, p in zip(self.shares, prints))

    def _spread(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each draw of a block the number of its data set, and how many of the block's draws before it are from that one.

        Of n draws the j-th falls at (j + u) / n of the block, u uniform in [0, 1): random, and no stretch has much more or less than the share.
        """
        rng = np.random.default_rng([self.seed, block, _BLOCKS])
        rank = np.concatenate([np.arange(n) for n in self.shares])
        which = np.repeat(np.arange(len(self.shares)), self.shares)
        order = np.argsort((rank + rng.random(BLOCK)) / self.shares[which], kind="stable")
        return which[order].astype(np.int16), rank[order].astype(np.int32)

    def _locate(self, i: int) -> tuple[EpisodeDataset, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)}")
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        return self.datasets[number], i - int(self._first[number])


def block_shares(weights: Sequence[float]) -> np.ndarray:
    """How many of BLOCK draws each weight gets: int64, sum BLOCK, each less than 1 from its exact share (largest remainders)."""
    exact = np.asarray(weights, float) / np.sum(weights) * BLOCK
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: BLOCK - shares.sum()]] += 1
    if not shares.all():
        raise DataError(f"weight {weights[int(shares.argmin())]:g} of {np.sum(weights):g} is less than one draw in {BLOCK}; raise it or leave the data set out")
    return shares
