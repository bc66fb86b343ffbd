"""Ref-YouTube-VOS: `meta_expressions/{train,valid,test}/`, frames in `{train,valid,test}/JPEGImages`, palette masks for train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rollout.importers.expressions import frame_names, read_videos
from rollout.importers.item import Benchmark, Defect, Item, Query, SourceError
from rollout.importers.masks import PalettePngs, RleTracks
from rollout.importers.plain_pickle import read_plain_pickle

FPS = 6.0  # every fifth frame of 30 a second


def _expressions(source: Path, split: str) -> Path:
    return source / "meta_expressions" / split / "meta_expressions.json"


def _files(source: Path, split: str) -> list[Path]:
    pickled = source / split / "mask_dict.pkl"
    return [_expressions(source, split), *([pickled] if _takes_pickle(source, split) else [])]


def _takes_pickle(source: Path, split: str) -> bool:
    """VISA's copy of the data set has one pickle of RLEs in place of the palette images."""
    return not (source / split / "Annotations").exists() and (source / split / "mask_dict.pkl").exists()


def _items(source: Path, split: str, out: Path) -> list[Item]:
    videos = read_videos(_expressions(source, split))
    if split == "valid" and _expressions(source, "test").exists():
        # The list of valid holds the videos of both; those of test have a list of their own.
        test = read_videos(_expressions(source, "test"))
        videos = {v: entry for v, entry in videos.items() if v not in test}
    folder = source / split
    if split == "test" and not (folder / "JPEGImages").exists():
        folder = source / "valid"
    public = (source / split / "Annotations").exists()
    if _takes_pickle(source, split):
        return _pickled(source / split, videos)
    if split == "train" and not public:
        raise SourceError(f"{source / split / 'Annotations'} is missing; the masks of train are public, download them too")
    items = []
    for video_id, entry in videos.items():
        # Lists of valid and test name no objects, wherever their masks may come from.
        queries = tuple(_query(n, e, public and (split == "train" or "obj_id" in e)) for n, e in entry["expressions"].items())
        masks = PalettePngs(source / split / "Annotations" / video_id) if any(q.object_ids for q in queries) else None
        items.append(Item(video_id, folder / "JPEGImages" / video_id, queries, masks, frame_names(entry), fps=FPS))
    return items


def _query(expression_id: str, entry: dict, public: bool) -> Query:
    text = str(entry.get("exp", ""))
    if not public:
        return Query(expression_id, text, None, query_type="referring")
    defect = None if entry.get("obj_id") else Defect("no object id")
    return Query(expression_id, text, (str(entry.get("obj_id")),), query_type="referring", defect=defect)


def _pickled(root: Path, videos: dict[str, dict]) -> list[Item]:
    """Masks by a running number over the sorted videos and their expression ids, sorted as text ("0", "1", "10", "2").

    Expressions about one object must have equal masks: where they have not, the pickle belongs to another list of expressions.
    """
    masks, number, items = read_plain_pickle(root / "mask_dict.pkl"), 0, []
    for video_id, entry in videos.items():
        queries = {n: _query(n, e, public=True) for n, e in entry["expressions"].items()}
        tracks: dict[str, list] = {}
        for n in sorted(queries):
            track, (o,) = masks.get(str(number)), queries[n].object_ids
            if track is not None and tracks.setdefault(o, track) != track:
                queries[n] = replace(queries[n], defect=Defect("masks do not follow the list of expressions", f"object {o}"))
            number += 1
        items.append(Item(video_id, root / "JPEGImages" / video_id, tuple(queries.values()), RleTracks(tracks), frame_names(entry), fps=FPS))
    return items


REF_YOUTUBE_VOS = Benchmark(
    name="ref_youtube_vos",
    splits=("train", "valid", "test"),
    files=_files,
    items=_items,
    published={"train": (3471, 12913), "valid": (202, None), "test": (305, None)},
)
