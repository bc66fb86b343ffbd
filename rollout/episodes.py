"""Episodes: one query about one video with its target masks, stored as Parquet.

A data set is a folder with `*.parquet` shards; media paths in it are relative to that folder. Masks are COCO run-length
encoded; boxes (integer, inclusive corners) and points (inside the mask) are derived once, when the data set is written.
docs/data.md has the columns with their meaning. Version 1 lacked those of `_ADDED_IN_2` and is still read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segmentation_service.masks import decode_rle, encode_rle, mask_to_box, mask_to_point

SCHEMA_VERSION = "2"
_ADDED_IN_2 = ("expression_id", "annotator", "query_type", "media", "ignore", "suspect")

_ANNOTATION = pa.struct(
    [("frame", pa.int32()), ("counts", pa.string()), ("area", pa.int32()), ("box", pa.list_(pa.int32())), ("point", pa.list_(pa.int32()))]
)
_OBJECT = pa.struct([("object_id", pa.string()), ("annotations", pa.list_(_ANNOTATION))])
_IGNORE = pa.struct([("frame", pa.int32()), ("counts", pa.string())])
SCHEMA = pa.schema(
    [
        ("episode_id", pa.string()),  # unique in the data set
        ("source", pa.string()),  # benchmark or generator
        ("split", pa.string()),  # as the benchmark calls it
        ("video_id", pa.string()),  # the benchmark's own, of a video or an image
        ("expression_id", pa.string()),  # the benchmark's own; unique in the video
        ("annotator", pa.string()),  # who wrote the query, where a benchmark has several; null elsewhere
        ("query_type", pa.string()),  # referring, reasoning or no_target, where a benchmark says; null elsewhere
        ("media", pa.string()),  # video, or image: a video of one frame
        ("video", pa.string()),  # folder of frames, video file or image file, relative to the data set
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("query", pa.string()),
        ("difficulty", pa.float32()),  # mean of the ratings, 1..10; null where not rated
        ("annotated_frames", pa.list_(pa.int32())),  # frames whose masks are known, also where no target is in view; empty: truth not public
        ("objects", pa.list_(_OBJECT)),  # targets; empty: nothing in the video fits the query
        ("ignore", pa.list_(_IGNORE)),  # pixels that count neither for nor against an answer
        ("suspect", pa.string()),  # why the masks are to be doubted; null: no reason known
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)


class DataError(ValueError):
    """A data set that cannot be used; the message names the file, the value and the remedy."""


@dataclass(frozen=True)
class Annotation:
    """One target in one frame; frames in which it cannot be seen have no annotation."""

    frame: int
    counts: str | None  # compressed COCO RLE of a mask of the episode's size; None: only box and point are known
    area: int  # pixels, of the box where there is no mask
    box: tuple[int, int, int, int]
    point: tuple[int, int]


@dataclass(frozen=True)
class TargetObject:
    object_id: str
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True)
class IgnoreMask:
    frame: int
    counts: str


@dataclass(frozen=True)
class Episode:
    """One row of a data set; the fields are the columns of `SCHEMA`. `root` is the data set's folder."""

    episode_id: str
    source: str
    split: str
    video_id: str
    video: str
    height: int
    width: int
    num_frames: int
    fps: float
    query: str
    difficulty: float | None
    annotated_frames: tuple[int, ...]
    objects: tuple[TargetObject, ...]
    expression_id: str = ""
    annotator: str | None = None
    query_type: str | None = None
    media: str = "video"
    ignore: tuple[IgnoreMask, ...] = ()
    suspect: str | None = None
    root: str = "."

    @property
    def video_path(self) -> Path:
        return Path(self.root) / self.video

    def visible(self, frame: int) -> list[Annotation]:
        """The targets' annotations in this frame, in the order of the objects."""
        return list(self._by_frame.get(frame, ()))

    @cached_property
    def _by_frame(self) -> dict[int, list[Annotation]]:
        found: dict[int, list[Annotation]] = {}
        for annotation in (a for o in self.objects for a in o.annotations):
            found.setdefault(annotation.frame, []).append(annotation)
        return found

    @cached_property
    def has_masks(self) -> bool:
        """False where the targets are known by box and point alone."""
        return all(a.counts is not None for o in self.objects for a in o.annotations)

    def masks(self, frame: int) -> np.ndarray:
        """Masks of the targets that can be seen in this frame: bool (N, H, W). Raises `DataError` where only boxes are known."""
        if not self.has_masks:
            raise DataError(f"episode {self.episode_id} has boxes and points but no masks; train on it with box and point rewards")
        masks = [self.decoded(a) for a in self.visible(frame)]
        return np.stack(masks) if masks else np.zeros((0, self.height, self.width), bool)

    def decoded(self, mask: Annotation | IgnoreMask, order: str = "C") -> np.ndarray:
        """The mask of one of the episode's annotations: bool (H, W), in memory as `decode_rle` says."""
        return decode_rle({"size": [self.height, self.width], "counts": mask.counts}, order)

    def ignored(self, frame: int) -> np.ndarray:
        """Pixels of this frame that count neither for nor against an answer: bool (H, W)."""
        ignored_HW = np.zeros((self.height, self.width), bool)
        for mask in (m for m in self.ignore if m.frame == frame):
            ignored_HW |= self.decoded(mask)
        return ignored_HW

    def target_frames(self, min_share: float = 0.001) -> list[int]:
        """Annotated frames in which the targets cover at least `min_share` of the picture; all annotated frames of a
        query without a target. None where the truth is not public, so such an episode is never drawn."""
        if not self.objects:
            return list(self.annotated_frames)
        least = min_share * self.height * self.width
        area = {t: 0 for t in self.annotated_frames}
        for a in (a for o in self.objects for a in o.annotations):
            area[a.frame] += a.area
        return [t for t in self.annotated_frames if area[t] >= least and area[t] > 0]


def annotate(frame: int, mask_HW: np.ndarray) -> Annotation | None:
    """The annotation of a mask, or None if it is empty."""
    if not mask_HW.any():
        return None
    box, point = mask_to_box(mask_HW), mask_to_point(mask_HW)
    return Annotation(frame, encode_rle(mask_HW)["counts"], int(mask_HW.sum()), tuple(map(int, box)), tuple(map(int, point)))


def write_episodes(episodes: Iterable[Episode], path: Path, rows_per_group: int = 256, metadata: Mapping[str, str] | None = None) -> int:
    """Writes one shard (to a temporary name, then renamed); returns the number of episodes.

    metadata: further key-value pairs of the file, beside its schema's version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, count = path.with_suffix(".partial"), 0
    with pq.ParquetWriter(partial, SCHEMA.with_metadata({**SCHEMA.metadata, **(metadata or {})})) as writer:
        rows: list[dict] = []
        for count, episode in enumerate(episodes, 1):
            row = asdict(episode)
            del row["root"]
            rows.append(row)
            if len(rows) == rows_per_group:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    os.replace(partial, path)
    return count


def shards(path: str | Path) -> list[Path]:
    """The Parquet files of a data set (a folder, or a single file), checked against the schema.

    Raises `DataError` if there are none, one cannot be read, or a column is missing or of another type.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"{path}: no Parquet files here; make the toy data with `videoseg data toy {path}` or import a data set")
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file ({error}); write it again") from error
        columns = _columns(schema, file)
        missing = [name for name in columns if name not in schema.names]
        if missing:
            raise DataError(f"{file}: column {', '.join(missing)} is missing; episodes need {', '.join(columns)}")
        wrong = [f"{n} is {schema.field(n).type}, not {SCHEMA.field(n).type}" for n in columns if schema.field(n).type != SCHEMA.field(n).type]
        if wrong:
            raise DataError(f"{file}: {'; '.join(wrong)}; import the data set again with this version")
    return files


def _columns(schema: pa.Schema, file: Path) -> list[str]:
    """The columns of the schema's version that a file was written in."""
    version = (schema.metadata or {}).get(b"schema_version", SCHEMA_VERSION.encode()).decode()
    if version not in ("1", SCHEMA_VERSION):
        raise DataError(f"{file} was written in version {version} of the schema, this one reads 1 and {SCHEMA_VERSION}; import the data set again")
    return [name for name in SCHEMA.names if version != "1" or name not in _ADDED_IN_2]


def read_episodes(path: str | Path) -> Iterator[Episode]:
    """All episodes in the order of the files, read one row group at a time."""
    root = str(path if Path(path).is_dir() else Path(path).parent)
    for file in shards(path):
        with pq.ParquetFile(file) as parquet:
            columns = _columns(parquet.schema_arrow, file)
            for group in range(parquet.num_row_groups):
                for row in parquet.read_row_group(group, columns).to_pylist():
                    yield episode_of_row(row, root)


def episode_of_row(row: dict, root: str) -> Episode:
    """The episode of a row as Arrow gives it (`to_pylist`); `root` is the folder that its media are relative to."""
    objects = tuple(
        TargetObject(o["object_id"], tuple(Annotation(**a | {"box": tuple(a["box"]), "point": tuple(a["point"])}) for a in o["annotations"]))
        for o in row["objects"]
    )
    ignore = tuple(IgnoreMask(**m) for m in row.get("ignore") or ())  # null where another program wrote the shard
    return Episode(**row | {"objects": objects, "ignore": ignore, "annotated_frames": tuple(row["annotated_frames"]), "root": root})
