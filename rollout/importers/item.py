"""What an importer gives: one item a video or image, with its queries and a way to read the masks of its objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rollout.episodes import Annotation, IgnoreMask
from rollout.media import Media


class SourceError(ValueError):
    """A source folder that is not in the layout of its benchmark; the message names the file and the remedy."""


class Defect(Exception):
    """Why a query, an object or a whole video cannot be used. `reason` is one of a few fixed phrases, to be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Query:
    """object_ids: the targets; empty where nothing fits the query; None where the benchmark keeps the truth to itself.
    defect: a fault already seen in the benchmark's list of expressions."""

    expression_id: str
    text: str
    object_ids: tuple[str, ...] | None
    annotator: str | None = None
    query_type: str | None = None
    defect: Defect | None = None


@dataclass(frozen=True)
class Track:
    """One object: the frames for which its mask is known, and its annotations where it is in view."""

    frames: tuple[int, ...]
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True)
class Truth:
    """What is known about an item: a track, or what is wrong with it, for every object that was asked for.

    frames: those about which a query without a target is known to have none.
    """

    frames: tuple[int, ...]
    tracks: Mapping[str, Track | Defect]
    ignore: tuple[IgnoreMask, ...] = ()


class Masks(Protocol):
    """Where an item's masks are. Picklable: read in a worker process."""

    def read(self, media: Media, listed: Sequence[int], object_ids: Sequence[str]) -> Truth:
        """The truth about these objects. listed: the benchmark's frames as numbers in `media`.

        Raises Defect where the whole item cannot be used.
        """


@dataclass(frozen=True)
class Item:
    """One video or image.

    media: folder of frames, or image file. frames: names of the benchmark's frames without suffix, sorted; None: all there are.
    masks: None where the truth is not public. hw: the size that the annotation states. suspect: why its masks are to be doubted.
    extract: bytes of the image, read from an archive, for images that are no files yet.
    """

    video_id: str
    media: Path
    queries: tuple[Query, ...]
    masks: Masks | None
    frames: tuple[str, ...] | None = None
    hw: tuple[int, int] | None = None
    fps: float = 1.0
    kind: str = "video"
    suspect: str | None = None
    extract: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read.

    files: a split's annotation files, first the one that tells whether the split is there; their hashes stand in the report.
    items: a split's videos or images in a fixed order; third argument: the folder that will hold the data set.
    published: split -> (videos, queries) of the release that papers report on. sha256: file name -> known beginning of its hash.
    """

    name: str
    splits: tuple[str, ...]
    files: Callable[[Path, str], list[Path]]
    items: Callable[[Path, str, Path], list[Item]]
    published: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
