"""Checks of a data set, episode by episode: what is written must agree with the media and with itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from rollout.episodes import Annotation, Episode
from rollout.media import Media, MediaError, read_media
from segmentation_service.masks import decode_rle, mask_to_box

QUERY_TYPES = (None, "referring", "reasoning", "no_target")


def problems(episode: Episode) -> list[str]:
    """What is wrong with one episode, as fixed phrases; empty where nothing is."""
    found = list(_media_problems(episode)) + list(_text_problems(episode))
    frames, range_ok = episode.annotated_frames, set(range(episode.num_frames))
    if list(frames) != sorted(set(frames)) or not range_ok.issuperset(frames):
        found.append("annotated frames are not rising numbers of the video")
    if not frames and (episode.objects or episode.ignore):
        found.append("objects without an annotated frame")
    if frames and episode.objects and not any(o.annotations for o in episode.objects):
        found.append("targets that are never in view")
    if len({o.object_id for o in episode.objects}) < len(episode.objects):
        found.append("object id given twice")
    for target in episode.objects:
        where = [a.frame for a in target.annotations]
        if len(set(where)) < len(where) or not set(frames).issuperset(where):
            found.append("annotation outside of the annotated frames")
        for annotation in target.annotations:
            found += _annotation_problems(annotation, episode.height, episode.width)
    for mask in episode.ignore:
        if mask.frame not in frames or _decode(mask.counts, episode.height, episode.width) is None:
            found.append("ignore mask of no annotated frame, or of another size")
    return list(dict.fromkeys(found))


def _text_problems(episode: Episode) -> Iterator[str]:
    if not episode.query.strip():
        yield "empty query"
    if episode.query_type not in QUERY_TYPES or episode.query_type == "no_target" and episode.objects:
        yield "query type does not fit"
    if episode.difficulty is not None and not 1 <= episode.difficulty <= 10:
        yield "difficulty outside of 1..10"
    if not episode.fps > 0:
        yield "frame rate is not positive"


def _media_problems(episode: Episode) -> Iterator[str]:
    media = _media(episode.video_path)
    if isinstance(media, str):
        yield media
        return
    if len(media.names) != episode.num_frames:
        yield "number of frames is not that of the media"
    if media.hw != (episode.height, episode.width):
        yield "size is not that of the media"
    if episode.media not in ("video", "image") or episode.media == "image" and episode.num_frames != 1:
        yield "media is neither a video nor an image of one frame"


@lru_cache(maxsize=256)
def _media(path: Path) -> Media | str:
    try:
        return read_media(path)
    except MediaError as error:
        return error.reason


@lru_cache(maxsize=100_000)  # the queries about a video share its objects
def _annotation_problems(annotation: Annotation, height: int, width: int) -> tuple[str, ...]:
    return tuple(_annotation_faults(annotation, height, width))


def _annotation_faults(annotation: Annotation, height: int, width: int) -> Iterator[str]:
    x1, y1, x2, y2 = annotation.box
    x, y = annotation.point
    if not (0 <= x1 <= x2 < width and 0 <= y1 <= y2 < height):
        yield "box outside of the frame"
        return
    if not (x1 <= x <= x2 and y1 <= y <= y2):
        yield "point outside of its box"
        return
    if annotation.counts is None:
        if annotation.area != (x2 - x1 + 1) * (y2 - y1 + 1):
            yield "area is not the box's"
        return
    mask_HW = _decode(annotation.counts, height, width)
    if mask_HW is None:
        yield "mask of another size, or broken"
        return
    if mask_to_box(mask_HW) != list(annotation.box):
        yield "box is not the mask's"
    if not mask_HW[y, x]:
        yield "point outside of its mask"
    if int(mask_HW.sum()) != annotation.area:
        yield "area is not the mask's"


def _decode(counts: str, height: int, width: int) -> np.ndarray | None:
    try:
        return decode_rle({"size": [height, width], "counts": counts})
    except ValueError:
        return None
