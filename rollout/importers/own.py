"""Videos of one's own: a table `queries.csv` beside video files or folders of frames, and masks as PNGs.

Columns: `video` and `query`; `masks`, a folder with one image for each frame whose truth is known, named by the frame's number in five digits (of a
folder of frames: like the frame), 0 being background and k the k-th object (0 and 255 alone: one object; beside numbers 255 is void, which is
ignored); `objects`, the numbers that the query means
(empty: all that is masked; `none`: nothing fits it); `split` (empty: train). Without `masks` a query can be answered and not scored.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from rollout.importers.item import Benchmark, Defect, Item, Query, SourceError, Truth
from rollout.importers.masks import VOID, mask_files, numbered_truth, read_png
from rollout.media import Media

TABLE = "queries.csv"
COLUMNS = ("video", "query", "masks", "objects", "split")
SPLITS = ("train", "valid", "test")
ALL = "all"
FPS = 24.0  # of folders of frames; video files tell theirs


@dataclass(frozen=True)
class NumberedPngs:
    """A folder with one image for each frame whose truth is known. Object ALL is whatever is masked."""

    folder: Path

    def read(self, media: Media, listed: Sequence[int], object_ids: Sequence[str]) -> Truth:
        files = mask_files(self.folder, media, listed)
        numbered = any(not np.isin(read_png(file, media.hw), (0, VOID)).all() for _, file in files)
        images = ((t, read_png(file, media.hw)) for t, file in files)
        return numbered_truth(self.folder, images if numbered else ((t, values_HW // VOID) for t, values_HW in images), object_ids, everything=ALL)


def _rows(source: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of the table, checked by itself. Raises SourceError."""
    file = source / TABLE
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            table = csv.DictReader(text)
            unknown = [c for c in table.fieldnames or () if c not in COLUMNS]
            missing = [c for c in COLUMNS[:2] if c not in (table.fieldnames or ())]
            if missing or unknown:
                what = f"has no column {missing[0]!r}" if missing else f"has a column {unknown[0]!r}"
                raise SourceError(f"{file} {what}; its columns are {', '.join(COLUMNS)}, of which video and query are needed")
            for row in table:
                if None in row:
                    raise SourceError(f"{file}:{table.line_num} has more cells than columns; put a query with commas in double quotes")
                cells = {c: (row.get(c) or "").strip() for c in COLUMNS}
                yield table.line_num, cells | {"split": cells["split"] or SPLITS[0]}
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{file} cannot be read as a table in UTF-8 ({error}); write it with the columns {', '.join(COLUMNS)}") from error


def _items(source: Path, split: str, out: Path) -> list[Item]:
    by_video: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for line, row in _rows(source):
        if row["split"] not in SPLITS:
            raise SourceError(f"{source / TABLE}:{line}: split {row['split']!r}; the splits are {', '.join(SPLITS)}")
        if not row["video"]:
            raise SourceError(f"{source / TABLE}:{line} names no video")
        row["video"] = PurePosixPath(row["video"]).as_posix()  # ./a.mp4 is a.mp4
        if PurePosixPath(row["video"]).is_absolute() or ".." in PurePosixPath(row["video"]).parts:
            raise SourceError(f"{source / TABLE}:{line}: video {row['video']!r} lies outside of {source}; move or link it there, results are named by its path")
        if row["split"] == split:
            by_video.setdefault(row["video"], []).append((line, row))
    items = []
    for video, rows in by_video.items():
        folders = {row["masks"] for _, row in rows if row["masks"]}
        if len(folders) > 1:
            raise SourceError(f"{source / TABLE}:{rows[-1][0]}: {video} has masks in {' and in '.join(sorted(folders))}; put all objects of a video into one folder of images")
        masks = NumberedPngs(source / folders.pop()) if folders else None
        queries = tuple(_query(str(n), row, f"{TABLE}:{line}") for n, (line, row) in enumerate(rows))
        items.append(Item(video, source / video, queries, masks, fps=FPS))
    return items


def _query(number: str, row: dict[str, str], where: str) -> Query:
    if not row["masks"] and row["objects"] != "none":
        return Query(number, row["query"], None)
    words = row["objects"].replace(",", " ").split()
    if words == ["none"]:
        return Query(number, row["query"], (), query_type="no_target")
    if any(not w.isdecimal() or not 0 < int(w) < VOID for w in words):
        return Query(number, row["query"], None, defect=Defect("unknown object", f"{where}: objects {row['objects']!r}; give numbers from 1, or none"))
    return Query(number, row["query"], tuple(dict.fromkeys(str(int(w)) for w in words)) or (ALL,))


def _files(source: Path, split: str) -> list[Path]:
    """The table and the masks: what a second import is to notice a change of."""
    if not (source / TABLE).exists():
        return [source / TABLE]
    folders = dict.fromkeys(row["masks"] for _, row in _rows(source) if row["masks"] and row["split"] == split)
    return [source / TABLE, *(file for folder in folders for file in sorted((source / folder).glob("*.png")))]


OWN = Benchmark(name="own", splits=SPLITS, files=_files, items=_items)
