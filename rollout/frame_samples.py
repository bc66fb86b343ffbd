"""Frame samples: which frames of a video an episode's prompt shows and which one is the target frame; as Parquet, by what they depend on.

A file holds one row per episode of a data set. A row's key is a hash of everything that its sample depends on, so a row is used
again only where nothing of that has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.episodes import DataError, Episode
from rollout.order import uniform_frames
from segmentation_service.video import ImageFolder, VideoError

SCHEMA_VERSION = "1"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # hash of all that the sample depends on
        ("episode_id", pa.string()),
        ("query", pa.string()),
        ("video_fingerprint", pa.string()),
        ("sampler", pa.string()),  # its settings as JSON, the model's fingerprint among them
        ("target_frame", pa.int32()),
        ("segment", pa.list_(pa.int32())),  # first frame of the key segment, and one past its last
        ("key_frames", pa.list_(pa.int32())),
        ("reference_frames", pa.list_(pa.int32())),
        ("fallbacks", pa.string()),  # JSON: how often which one was taken
        ("replies", pa.list_(pa.list_(pa.string()))),  # of the model, look by look
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)
_PIECE = 2**20  # bytes


@dataclass(frozen=True)
class FrameSample:
    """The frames of one episode. `segment` is (first, one past the last) frame of the key segment V_key; `key_frames` are shown of
    it and `reference_frames` (X_r) of the rest, in rising order. `fallbacks` counts them by name (docs/frame-sampler.md)."""

    target_frame: int
    segment: tuple[int, int]
    key_frames: tuple[int, ...]
    reference_frames: tuple[int, ...]
    fallbacks: Mapping[str, int]
    replies: tuple[tuple[str, ...], ...] = ()

    @property
    def shown(self) -> list[int]:
        """All frames besides the target frame that a prompt shows, in rising order."""
        return sorted({*self.key_frames, *self.reference_frames})


@dataclass(frozen=True)
class SampleRow:
    """A sample with the episode that it is about. `sampler` is JSON."""

    key: str
    episode_id: str
    query: str
    video_fingerprint: str
    sampler: str
    sample: FrameSample


def frames_to_show(segment: tuple[int, int], num_frames: int, key_frames: int, reference_frames: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(frames of the key segment, reference frames): each spread evenly, the latter over what the segment leaves of the video, so that
    a part before it and a part after it get their shares; fewer where there are fewer."""
    start, end = segment
    inside = [start + i for i in uniform_frames(end - start, key_frames)]
    rest = num_frames - (end - start)
    outside = [i if i < start else i + end - start for i in uniform_frames(rest, reference_frames)] if rest else []
    return tuple(inside), tuple(outside)


def nearest(t: int, frames: Sequence[int]) -> int:
    """The frame of `frames` (rising, not empty) that is nearest to t, the earlier one of two."""
    i = bisect_left(frames, t)
    return min(frames[max(0, i - 1) : i + 1], key=lambda f: (abs(f - t), f))


@lru_cache(maxsize=65536)
def video_fingerprint(video: Path) -> str:
    """SHA-256 (hex) that tells videos apart without reading them whole: of a folder the names and sizes of all its frames and the
    contents of three, of a file its size and three pieces of 1 MiB."""
    digest = hashlib.sha256()
    if video.is_dir():
        files = ImageFolder(video).files
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\n".encode())
        for file in (files[0], files[len(files) // 2], files[-1]):
            digest.update(file.read_bytes())
        return digest.hexdigest()
    if not video.is_file():
        raise VideoError(f"{video}: no such video file or folder of frames; check the data set's root and its `video` column")
    size = video.stat().st_size
    digest.update(str(size).encode())
    with video.open("rb") as handle:
        for start in (0, size // 2, max(0, size - _PIECE)):
            handle.seek(start)
            digest.update(handle.read(_PIECE))
    return digest.hexdigest()


def sample_key(episode: Episode, sampler: Any) -> str:
    """SHA-256 (hex) of all that an episode's sample depends on; `sampler` is what its sampler says of itself (JSON values)."""
    size = [episode.num_frames, episode.fps]
    parts = [SCHEMA_VERSION, episode.episode_id, episode.query, size, video_fingerprint(episode.video_path), sampler]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_samples(rows: Iterable[SampleRow], file: Path) -> None:
    """Writes a file of samples, to a temporary name that is then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    columns = [
        {
            "key": row.key,
            "episode_id": row.episode_id,
            "query": row.query,
            "video_fingerprint": row.video_fingerprint,
            "sampler": row.sampler,
            "target_frame": row.sample.target_frame,
            "segment": row.sample.segment,
            "key_frames": row.sample.key_frames,
            "reference_frames": row.sample.reference_frames,
            "fallbacks": json.dumps(row.sample.fallbacks, sort_keys=True),
            "replies": row.sample.replies,
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(columns, SCHEMA), partial)
    os.replace(partial, file)


def read_samples(file: str | Path) -> list[SampleRow]:
    """The rows of a file in their order. Raises `DataError` where it is none of this version."""
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a readable file of frame samples ({error}); make it with `videoseg sample-frames DATA {file}`") from error
    if not table.schema.equals(SCHEMA) or (table.schema.metadata or {}).get(b"schema_version") != SCHEMA_VERSION.encode():
        raise DataError(f"{file} holds no frame samples of this version; make them with `videoseg sample-frames DATA OUT` under another name")
    return [
        SampleRow(
            **{name: row[name] for name in ("key", "episode_id", "query", "video_fingerprint", "sampler")},
            sample=FrameSample(
                row["target_frame"],
                tuple(row["segment"]),
                tuple(row["key_frames"]),
                tuple(row["reference_frames"]),
                json.loads(row["fallbacks"]),
                tuple(tuple(replies) for replies in row["replies"]),
            ),
        )
        for row in table.to_pylist()
    ]


class FrameSamples:
    """The samples of a file, to be looked up by episode."""

    def __init__(self, file: str | Path) -> None:
        self.file = str(file)
        self._rows = {row.episode_id: row for row in read_samples(file)}
        with open(file, "rb") as handle:
            self.fingerprint = hashlib.file_digest(handle, "sha256").hexdigest()[:16]
        self.most_shown = max((len(row.sample.shown) for row in self._rows.values()), default=0)

    def check(self, rows: Iterable[Mapping]) -> None:
        """Raises `DataError` if an episode (its `episode_id` and `query`) has no sample, or one that was made for another query."""
        for about in rows:
            row = self._rows.get(about["episode_id"])
            if row is None:
                raise self._error(about["episode_id"], "has no sample")
            if row.query != about["query"]:
                raise self._error(about["episode_id"], f"asks {about['query']!r}, its sample was made for {row.query!r}")

    def of(self, episode: Episode) -> FrameSample:
        """Raises `DataError` as `check` does, and if it was made for another video."""
        self.check([{"episode_id": episode.episode_id, "query": episode.query}])
        row = self._rows[episode.episode_id]
        if row.video_fingerprint != video_fingerprint(episode.video_path):
            raise self._error(episode.episode_id, f"is about {episode.video_path}, which is not the video that its sample was made for")
        return row.sample

    def _error(self, episode_id: str, fault: str) -> DataError:
        return DataError(f"{self.file}: episode {episode_id} {fault}; run `videoseg sample-frames` on this data set again")
