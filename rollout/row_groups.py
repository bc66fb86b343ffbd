"""Random access to the row groups of Parquet files; those read last stay in memory, up to a limit of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CACHE_BYTES = 256 * 2**20
OPEN_FILES = 16


class RowGroups:
    """The row groups of `files`, which may name a file more than once. Nothing but footers is read until a group is asked for.

    `listed` int32 (L,): number of the distinct row group at each place of the list; `places`: (file, group in it) of each
    distinct one; `sizes` int64 (D,): its rows. Memory grows with the number of row groups only: 4 bytes for each listed one.
    Threads may share it.
    """

    def __init__(self, files: Sequence[Path], cache_bytes: int = CACHE_BYTES) -> None:
        self.places: list[tuple[Path, int]] = []
        sizes, numbers = [], {}
        for file in dict.fromkeys(files):
            footer = pq.read_metadata(file)
            numbers[file] = np.arange(len(sizes), len(sizes) + footer.num_row_groups, dtype=np.int32)
            sizes += [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
            self.places += [(file, g) for g in range(footer.num_row_groups)]
        self.sizes = np.array(sizes, np.int64)
        self.listed = np.concatenate([numbers[file] for file in files])
        self._open = lru_cache(OPEN_FILES)(pq.ParquetFile)
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple, pa.Table] = OrderedDict()
        self._cache_bytes, self._held = cache_bytes, 0

    def table(self, number: int, columns: Sequence[str]) -> pa.Table:
        """The columns of a distinct row group, from memory if they were read lately. `objects.annotations.area` is a column inside
        the lists of another; a column that the file does not have is left out."""
        key = (number, tuple(columns))
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
            table = self._read(number, columns)
            self._tables[key] = table
            self._held += table.nbytes
            while self._held > self._cache_bytes and len(self._tables) > 1:
                self._held -= self._tables.popitem(last=False)[1].nbytes
            return table

    def stream(self, numbers: Sequence[int] | np.ndarray, columns: Sequence[str]) -> Iterator[pa.Table]:
        """These row groups one after the other; none is kept."""
        for number in numbers:
            with self._lock:
                table = self._read(number, columns)
            yield table

    def _read(self, number: int, columns: Sequence[str]) -> pa.Table:
        file, group = self.places[number]
        parquet = self._open(file)
        paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
        return parquet.read_row_group(group, columns=[path for path in paths if any(_is_of(path.split("."), c.split(".")) for c in columns)])


def _is_of(path: list[str], column: list[str]) -> bool:
    """Whether a leaf such as objects.list.element.object_id belongs to a column; how the levels of lists are called differs between writers."""
    rest = iter(path)
    return path[0] == column[0] and all(name in rest for name in column)
