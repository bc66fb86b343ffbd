"""MeViS (versions 1 and 2): `{train,valid_u,valid}/` with JPEGImages, meta_expressions.json, and mask_dict.json where masks are public."""

from __future__ import annotations

from pathlib import Path

from rollout.importers.expressions import frame_names, query_of_annotations, read_json, read_videos
from rollout.importers.item import Benchmark, Item, Query, SourceError
from rollout.importers.masks import RleTracks


def _files(source: Path, split: str) -> list[Path]:
    masks = source / split / "mask_dict.json"
    return [source / split / "meta_expressions.json", *([masks] if masks.exists() else [])]


def _items(source: Path, split: str, out: Path) -> list[Item]:
    root, masks = source / split, None
    videos = read_videos(root / "meta_expressions.json")
    if (root / "mask_dict.json").exists():
        masks = read_json(root / "mask_dict.json")
    elif split in ("train", "valid_u"):
        raise SourceError(f"{root / 'mask_dict.json'} is missing; the masks of {split} are public, download them too")
    items = []
    for video_id, entry in videos.items():
        expressions = entry["expressions"].items()
        if masks is None:
            queries = tuple(Query(str(n), str(e.get("exp", "")), None, query_type="referring") for n, e in expressions)
            tracks = None
        else:
            queries = tuple(query_of_annotations(n, e, "referring") for n, e in expressions)
            tracks = RleTracks({o: masks[o] for q in queries for o in q.object_ids if o in masks})
        items.append(Item(video_id, root / "JPEGImages" / video_id, queries, tracks, frame_names(entry)))
    return items


MEVIS = Benchmark(
    name="mevis",
    splits=("train", "valid_u", "valid", "test"),
    files=_files,
    items=_items,
    published={"train": (1662, 23051), "valid_u": (50, 793), "valid": (140, 2236), "test": (154, 2490)},  # version 1
    sha256={"train/mask_dict.json": "f9d9b01a2a6d7a00", "valid_u/mask_dict.json": "6e711a3f713cd95a"},
)
