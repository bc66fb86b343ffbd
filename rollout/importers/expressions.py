"""Lists of expressions as the video benchmarks write them: JSON with `videos`, each with `frames` and `expressions`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rollout.importers.item import Defect, Query, SourceError


def read_json(file: Path) -> dict:
    """The contents of a JSON file. Raises SourceError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror}); download the data set in full, and give the folder that holds it") from error
    except ValueError as error:
        raise SourceError(f"{file} is not JSON ({error}); download it again") from error


def read_videos(file: Path) -> dict[str, dict]:
    """Video id -> its entry, in the order of the ids. Raises SourceError."""
    videos = read_json(file).get("videos")
    if not isinstance(videos, dict):
        raise SourceError(f"{file} has no `videos`; it is not a list of expressions")
    for video_id, entry in videos.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("expressions"), (dict, list)):
            raise SourceError(f"{file}: video {video_id} has no `expressions`; download the file again")
    return dict(sorted(videos.items()))


def frame_names(entry: Mapping) -> tuple[str, ...] | None:
    """The names of the listed frames without suffix, sorted; None where the entry lists none."""
    frames = entry.get("frames")
    return None if frames is None else tuple(sorted(str(f).removesuffix(".jpg").removesuffix(".png") for f in frames))


def query_of_annotations(expression_id: str, entry: Mapping, query_type: str, no_target: bool | None = None) -> Query:
    """A query whose targets are given by `anno_id`, as in MeViS and ReVOS.

    no_target: whether the benchmark says that nothing fits; None where it says so by empty lists alone.
    """
    objects, annotations = entry.get("obj_id"), entry.get("anno_id")
    defect, ids = None, ()
    if not isinstance(objects, list) or not isinstance(annotations, list):
        defect = Defect("no annotation ids")
    elif len(objects) != len(annotations):
        defect = Defect("object ids and annotation ids differ in number", f"{objects}, {annotations}")
    elif no_target and annotations:
        defect = Defect("no-target query with objects", str(annotations))
    elif no_target is False and not annotations:
        defect = Defect("empty annotation list")
    else:
        ids = tuple(dict.fromkeys(str(a) for a in annotations))
        query_type = query_type if ids else "no_target"
    return Query(str(expression_id), str(entry.get("exp", "")), ids, query_type=query_type, defect=defect)
