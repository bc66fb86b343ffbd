"""ReasonVOS (test only): meta_expressions.json, JPEGImages/<video>, Annotations/<source>_<video>_<object>/<frame>.png."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rollout.episodes import annotate
from rollout.importers.expressions import frame_names, read_videos
from rollout.importers.item import Benchmark, Defect, Item, Query, Track, Truth
from rollout.importers.masks import OTHER_SIZE, mask_files
from rollout.media import Media

OLD_RELEASE = "release of before 2024-12-27, since corrected"


@dataclass(frozen=True)
class ObjectPngs:
    """For each object a folder of its own, with the frames whose mask is known; every pixel above 0 is the object."""

    folders: Mapping[str, Path]

    def read(self, media: Media, listed: Sequence[int], object_ids: Sequence[str]) -> Truth:
        tracks: dict[str, Track | Defect] = {}
        for o in object_ids:
            try:
                files = mask_files(self.folders[o], media, range(len(media.names)))
                annotations = [annotate(t, _read(file, media.hw)) for t, file in files]
                tracks[o] = Track(tuple(t for t, _ in files), tuple(filter(None, annotations)))
            except Defect as defect:
                tracks[o] = defect
        return Truth((), tracks)


def _read(file: Path, hw: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(file) as image:
            mask_HW = np.asarray(image if image.mode == "P" else image.convert("L")) > 0
    except (OSError, SyntaxError, ValueError) as error:
        raise Defect("unreadable mask", str(file)) from error
    if mask_HW.shape != hw:
        raise Defect(OTHER_SIZE, f"{file}: {mask_HW.shape}, the frame {hw} (height, width)")
    return mask_HW


def _files(source: Path, split: str) -> list[Path]:
    return [source / "meta_expressions.json"]


def _items(source: Path, split: str, out: Path) -> list[Item]:
    items = []
    for video_id, entry in read_videos(source / "meta_expressions.json").items():
        expressions, suspect = entry["expressions"], None
        if isinstance(expressions, dict):
            expressions, suspect = [{"exp_id": n, **e} for n, e in expressions.items()], OLD_RELEASE
        seen, queries, folders = Counter(), [], {}
        for e in expressions:
            n, o = str(e.get("exp_id")), str(e.get("obj_id"))
            seen[n] += 1
            n = n if seen[n] == 1 else f"{n}#{seen[n]}"  # ids repeat in some videos
            queries.append(Query(n, str(e.get("exp_text", "")), (o,), query_type="reasoning"))
            folders[o] = source / "Annotations" / f"{entry.get('source')}_{video_id}_{o}"
        items.append(Item(video_id, source / "JPEGImages" / video_id, tuple(queries), ObjectPngs(folders), frame_names(entry), suspect=suspect))
    return items


REASONVOS = Benchmark(name="reasonvos", splits=("test",), files=_files, items=_items, published={"test": (None, 458)})
