"""Training sets of Seg-Zero and VisionReasoner (refCOCOg_*_840, VisionReasoner_multi_object_*_840): Parquet or Arrow files of rows
id, problem, solution, image. They have boxes and points in pixels of the stored image, and no masks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.episodes import Annotation
from rollout.importers.item import Benchmark, Defect, Item, Query, SourceError, Track, Truth
from rollout.media import Media
from segmentation_service.video import SUFFIXES

COLUMNS = ("id", "problem", "solution", "image")
_PAIR = re.compile(r"\(\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\)")


@dataclass(frozen=True)
class BoxesAndPoints:
    """targets: (box, point) of each object, named "0", "1", ..."""

    targets: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]

    def read(self, media: Media, listed: Sequence[int], object_ids: Sequence[str]) -> Truth:
        annotations = [_annotation(box, point, media.hw) for box, point in self.targets]
        return Truth((0,), {str(n): Track((0,), (a,)) for n, a in enumerate(annotations)})


def _annotation(box: Sequence[float], point: Sequence[float], hw: tuple[int, int]) -> Annotation:
    """Rounded to pixels; an edge at the image's very end is its last pixel. Raises Defect for what lies outside."""
    height, width = hw
    if not all(map(math.isfinite, (*box, *point))):
        raise Defect("box or point is not a number", f"{box}, {point}")
    x1, y1, x2, y2 = (round(v) for v in box)
    x, y = (round(v) for v in point)
    if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height and x1 < width and y1 < height):
        raise Defect("box outside of the image", f"{box} in {width}x{height}")
    if not (x1 <= x <= x2 and y1 <= y <= y2):
        raise Defect("point outside of its box", f"{point}, {box}")
    x2, y2 = min(x2, width - 1), min(y2, height - 1)
    return Annotation(0, None, (x2 - x1 + 1) * (y2 - y1 + 1), (x1, y1, x2, y2), (min(x, x2), min(y, y2)))


def targets_of(solution: object) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    """(box, point) of each object of VisionReasoner's JSON or Seg-Zero's tags, of whose two points the first is kept."""
    if isinstance(solution, str) and solution.lstrip().startswith("<box>"):
        box, _, points = solution.partition("</box>")
        corners, first = _PAIR.findall(box), _PAIR.findall(points)[:1]
        if len(corners) != 2 or not first:
            raise Defect("unreadable solution", solution[:80])
        return ((tuple(float(v) for corner in corners for v in corner), tuple(map(float, first[0]))),)
    try:
        entries = json.loads(solution) if isinstance(solution, str) else solution
        targets = tuple((tuple(map(float, e["bbox_2d"])), tuple(map(float, e["point_2d"]))) for e in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise Defect("unreadable solution", f"{str(solution)[:80]}: {error}") from error
    if any(len(box) != 4 or len(point) != 2 for box, point in targets):
        raise Defect("unreadable solution", str(solution)[:80])
    if not targets:
        raise Defect("empty annotation list")
    return targets


def _files(source: Path, split: str) -> list[Path]:
    found = sorted(source.rglob("*.parquet")) or sorted(f for f in source.rglob("*.arrow") if not f.name.startswith("cache-"))
    return found or [source / "*.parquet"]


def _column_names(file: Path) -> list[str]:
    try:
        if file.suffix == ".parquet":
            return pq.read_schema(file).names
        with pa.memory_map(str(file)) as memory:
            return pa.ipc.open_stream(memory).schema.names
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{file} is not a readable Parquet or Arrow file ({error}); download it again") from error


def _groups(file: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The row groups of a Parquet file, or the batches of an Arrow stream."""
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=list(columns))
    else:
        with pa.memory_map(str(file)) as memory:
            for batch in pa.ipc.open_stream(memory):
                yield pa.Table.from_batches([batch]).select([c.split(".")[0] for c in columns])


@lru_cache(maxsize=2)
def _images(file: Path, group: int) -> list[dict]:
    table = next(t for n, t in enumerate(_groups(file, ("image",))) if n == group)
    return table["image"].to_pylist()


def _image_bytes(file: Path, group: int, row: int) -> bytes:
    data = _images(file, group)[row]["bytes"]
    if not data:
        raise Defect("row without an image", f"{file}, row group {group}, row {row}")
    return data


def _items(source: Path, split: str, out: Path) -> list[Item]:
    items: list[Item] = []
    for file in _files(source, split):
        missing = [c for c in COLUMNS if c not in _column_names(file)]
        if missing:
            raise SourceError(f"{file}: column {', '.join(missing)} is missing; rows of these sets have {', '.join(COLUMNS)}")
        for group, table in enumerate(_groups(file, ("id", "problem", "solution", "image.path"))):
            for row, entry in enumerate(table.to_pylist()):
                items.append(_item(entry, len(items), partial(_image_bytes, file, group, row), out))
    return items


def _item(row: dict, number: int, extract: partial, out: Path) -> Item:
    suffix = Path((row["image"] or {}).get("path") or "").suffix.lower()
    image = out / "images" / f"{number:07d}{suffix if suffix in SUFFIXES else '.png'}"
    targets, defect = (), None
    try:
        targets = targets_of(row["solution"])
    except Defect as found:
        defect = found
    query = Query(str(number), str(row["problem"]), tuple(str(n) for n in range(len(targets))), defect=defect)
    return Item(str(row["id"]), image, (query,), BoxesAndPoints(targets), kind="image", extract=extract)


VISIONREASONER = Benchmark(name="visionreasoner", splits=("train",), files=_files, items=_items)
