"""A data set of episodes read piecewise: any episode by its number, streams of chosen columns, a fingerprint. docs/data-reading.md says why so."""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence, Set
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rollout.episodes import SCHEMA, DataError, Episode, episode_of_row, shards
from rollout.file_hashes import file_hashes
from rollout.row_groups import CACHE_BYTES, RowGroups


class EpisodeDataset:
    """The episodes of a folder, a shard, or a list of them, which may name a shard more than once.

    min_share: leave out the episodes of which `Episode.target_frames(min_share)` has none; None: keep all. It costs one pass over
    the columns with areas. only: the `episode_id` of those to keep of the rest; None: all. `cache_bytes` bounds the row groups kept
    in memory. Raises `DataError` for files that hold no episodes.
    """

    def __init__(
        self, path: str | Path | Sequence[str | Path], min_share: float | None = None, cache_bytes: int = CACHE_BYTES, only: Set[str] | None = None
    ) -> None:
        paths = [path] if isinstance(path, (str, Path)) else path
        found = {p: shards(p) for p in dict.fromkeys(paths)}
        self.files = [file for p in paths for file in found[p]]
        self.columns: tuple[str, ...] = tuple(SCHEMA.names)
        self._groups = RowGroups(self.files, cache_bytes)
        self._kept: dict[int, np.ndarray] = {}  # row numbers, of the row groups of which some rows are left out
        sizes = self._groups.sizes.copy()
        if min_share is not None or only is not None:
            for number, usable in self._look_through(min_share, only):
                if not usable.all():
                    self._kept[number] = np.flatnonzero(usable).astype(np.int32)
                    sizes[number] = len(self._kept[number])
        self.group_rows = sizes[self._groups.listed]
        self._ends = np.cumsum(self.group_rows)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> Episode:
        row = self.row(i)
        return episode_of_row(row, row.pop("root"))

    def __iter__(self) -> Iterator[Episode]:
        """All episodes in order, a row group at a time."""
        return (episode_of_row(row, row.pop("root")) for row in self.rows())

    def project(self, *columns: str) -> EpisodeDataset:
        """The same rows with only these columns (`query`, `objects.annotations.area`), for `row` and `rows`: the rest is not read."""
        unknown = [name for name in columns if name.split(".")[0] not in SCHEMA.names]
        if unknown:
            raise DataError(f"episodes have no column {', '.join(unknown)}; the columns are {', '.join(SCHEMA.names)}")
        view = copy.copy(self)
        view.columns = columns
        return view

    def row(self, i: int) -> dict:
        """The columns of one row as plain values, and `root`, the folder that its media are relative to."""
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)}")
        place = int(np.searchsorted(self._ends, i, side="right"))
        number, row = int(self._groups.listed[place]), int(i - self._ends[place] + self.group_rows[place])
        row = int(self._kept[number][row]) if number in self._kept else row
        table = self._groups.table(number, self.columns)
        return {name: column[row].as_py() for name, column in zip(table.column_names, table.columns)} | {"root": self._root(number)}

    def rows(self) -> Iterator[dict]:
        """All rows in order, as `row` gives them, a row group at a time; nothing stays in memory."""
        for number, table in zip(self._groups.listed, self._groups.stream(self._groups.listed, self.columns)):
            root = self._root(number)
            for batch in (table.take(self._kept[number]) if number in self._kept else table).to_batches(max_chunksize=256):
                for row in batch.to_pylist():
                    yield row | {"root": root}

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the data set by the names and contents of its shards: 16 hex digits."""
        digest = hashlib.sha256()
        hashes = file_hashes(self.files)
        for file in self.files:
            digest.update(file.name.encode() + hashes[file])
        return digest.hexdigest()[:16]

    def _look_through(self, min_share: float | None, only: Set[str] | None) -> Iterator[tuple[int, np.ndarray]]:
        """For each distinct row group, which rows to keep. Says every ten seconds how far it is."""
        sizes, said = self._groups.sizes, time.monotonic()
        columns = _AREA_COLUMNS if only is None else (*_AREA_COLUMNS, "episode_id")
        for number, table in enumerate(self._groups.stream(range(len(sizes)), columns)):
            keep = np.ones(len(table), bool) if min_share is None else has_target_frame(table, min_share)
            yield number, keep if only is None else keep & np.array([episode_id in only for episode_id in table["episode_id"].to_pylist()], bool)
            if time.monotonic() > said + 10:
                said = time.monotonic()
                print(f"{self.files[0].parent}: looked for target frames in {sizes[: number + 1].sum()} of {sizes.sum()} episodes", file=sys.stderr, flush=True)

    def _root(self, number: int) -> str:
        return str(self._groups.places[number][0].parent)


_AREA_COLUMNS = ("height", "width", "annotated_frames", "objects.annotations.frame", "objects.annotations.area")


def has_target_frame(table: pa.Table, min_share: float) -> np.ndarray:
    """Which rows have a frame that `Episode.target_frames(min_share)` would name: bool (rows,). `table` has `_AREA_COLUMNS`."""
    table = table.combine_chunks()
    objects = pc.list_value_length(table["objects"]).to_numpy()
    annotations = pc.list_flatten(table["objects"]).combine_chunks().field("annotations")
    row = np.repeat(np.repeat(np.arange(len(table)), objects), pc.list_value_length(annotations).to_numpy())
    flat = pc.list_flatten(annotations)
    frame, area = flat.field("frame").to_numpy(), flat.field("area").to_numpy()
    least = min_share * table["height"].to_numpy().astype(float) * table["width"].to_numpy()
    usable = (objects == 0) & (pc.list_value_length(table["annotated_frames"]).to_numpy() > 0)
    usable[row[(area >= least[row]) & (area > 0)]] = True  # one target is enough: most rows need no sums
    rest = ~usable[row]
    frames, inverse = np.unique(row[rest] * 2**32 + frame[rest], return_inverse=True)  # one number for a frame of a row
    areas, row = np.bincount(inverse, area[rest], minlength=len(frames)), frames // 2**32
    usable[row[(areas >= least[row]) & (areas > 0)]] = True
    return usable
