"""ReVOS: one JPEGImages and one mask_dict.json for both splits, meta_expressions_{train,valid}_.json with the types of its queries."""

from __future__ import annotations

from pathlib import Path

from rollout.importers.expressions import frame_names, query_of_annotations, read_json, read_videos
from rollout.importers.item import Benchmark, Defect, Item, Query
from rollout.importers.masks import RleTracks

QUERY_TYPES = {0: "referring", 1: "reasoning", 2: "no_target"}
SUSPECT = "masks may belong to other frames (TAO, UVO)"
"""The release's masks of many videos from TAO and UVO are shifted in time (VISA, issues 9 and 18). The files do not tell which."""


def _files(source: Path, split: str) -> list[Path]:
    return [source / f"meta_expressions_{split}_.json", source / "mask_dict.json"]


def _items(source: Path, split: str, out: Path) -> list[Item]:
    videos, masks = read_videos(source / f"meta_expressions_{split}_.json"), read_json(source / "mask_dict.json")
    items = []
    for video_id, entry in videos.items():
        queries = tuple(_query(n, e) for n, e in entry["expressions"].items())
        hw = (entry["height"], entry["width"]) if "height" in entry and "width" in entry else None
        suspect = SUSPECT if video_id.split("/")[0].lower() in ("tao", "uvo") else None
        tracks = RleTracks({o: masks[o] for q in queries for o in q.object_ids or () if o in masks})
        items.append(Item(video_id, source / "JPEGImages" / video_id, queries, tracks, frame_names(entry), hw, suspect=suspect))
    return items


def _query(expression_id: str, entry: dict) -> Query:
    kind = QUERY_TYPES.get(entry.get("type_id"))
    if kind is None:
        return Query(expression_id, str(entry.get("exp", "")), None, defect=Defect("unknown type of query", str(entry.get("type_id"))))
    return query_of_annotations(expression_id, entry, kind, no_target=kind == "no_target")


REVOS = Benchmark(
    name="revos",
    splits=("train", "valid"),
    files=_files,
    items=_items,
    published={"train": (626, None), "valid": (416, None)},
    sha256={"meta_expressions_train_.json": "3917dfba", "meta_expressions_valid_.json": "127b975e", "mask_dict.json": "e9b43106"},
)
