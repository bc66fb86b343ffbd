"""One item made into episodes, with every query that cannot be used told apart and counted, never silently kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rollout.banned_tokens import holds_media_token
from rollout.episodes import Episode, TargetObject
from rollout.importers.item import Defect, Item, Query, Truth
from rollout.media import Media, MediaError, read_media

MISSING_FRAMES = "frames missing on disk"


@dataclass(frozen=True)
class Skipped:
    """One query that was left out, and why."""

    reason: str
    where: str


def convert(item: Item, source: str, split: str, folder: Path, keep_suspect: bool) -> tuple[list[Episode], list[Skipped]]:
    """The item's episodes in the order of its queries, and what was skipped.

    folder: where the data set will lie; media paths are relative to it. keep_suspect: doubtful masks are kept in training splits
    too; they are always kept, marked, in the others.
    """
    try:
        if item.suspect and split == "train" and not keep_suspect:
            raise Defect(item.suspect)
        media, listed = _media(item)
        truth = _truth(item, media, listed)
    except (Defect, MediaError) as defect:
        return [], [_skipped(item, q, defect) for q in item.queries]
    episodes, skipped, seen = [], [], set()
    for query in item.queries:
        try:
            if query.expression_id in seen:
                raise Defect("expression id given twice")
            frames, objects = _targets(query, truth)
        except Defect as defect:
            skipped.append(_skipped(item, query, defect))
            continue
        seen.add(query.expression_id)
        episodes.append(
            Episode(
                episode_id=f"{source}/{split}/{item.video_id}/{query.expression_id}",
                source=source,
                split=split,
                video_id=item.video_id,
                expression_id=query.expression_id,
                annotator=query.annotator,
                query_type=query.query_type,
                media=item.kind,
                video=os.path.relpath(item.media.resolve(), folder.resolve()),
                height=media.hw[0],
                width=media.hw[1],
                num_frames=len(media.names),
                fps=media.fps or item.fps,
                query=query.text.strip(),
                difficulty=None,
                annotated_frames=frames,
                objects=objects,
                ignore=tuple(m for m in truth.ignore if m.frame in frames) if truth else (),
                suspect=item.suspect,
            )
        )
    return episodes, skipped


def _media(item: Item) -> tuple[Media, list[int]]:
    """The item's media, and the numbers of the frames that the benchmark lists. A video that lacks one of them is of no use:
    time would jump, and its score would not be comparable."""
    if item.extract and not item.media.exists():
        item.media.parent.mkdir(parents=True, exist_ok=True)
        partial = item.media.with_name(f".{item.media.name}.{os.getpid()}")
        partial.write_bytes(item.extract())
        partial.replace(item.media)
    media = read_media(item.media)
    if item.hw and item.hw != media.hw:
        raise Defect("frames of another size than the annotation says", f"{media.path}: {media.hw}, not {item.hw} (height, width)")
    if item.frames is None:
        return media, list(range(len(media.names)))
    if len(set(item.frames)) < len(item.frames):
        raise Defect("frame listed twice", str(media.path))
    number = {name: i for i, name in enumerate(media.names)}
    missing = [name for name in item.frames if name not in number]
    if missing or not item.frames:
        raise Defect(MISSING_FRAMES if missing else "no frames listed", f"{len(missing)} of {len(item.frames)} in {media.path}")
    return media, [number[name] for name in item.frames]


def _truth(item: Item, media: Media, listed: list[int]) -> Truth | None:
    if item.masks is None:
        return None
    wanted = dict.fromkeys(o for q in item.queries for o in q.object_ids or ())
    try:
        return item.masks.read(media, listed, list(wanted))
    except (AttributeError, TypeError, ValueError) as error:  # values of a kind that no mask has
        raise Defect("broken mask", f"{type(error).__name__}: {error}") from error


def _targets(query: Query, truth: Truth | None) -> tuple[tuple[int, ...], tuple[TargetObject, ...]]:
    """The frames whose truth is known for this query, and its targets in them."""
    if not query.text.split():
        raise Defect("empty query")
    if holds_media_token(query.text):
        raise Defect("query with a media token", query.text)
    if query.defect:
        raise query.defect
    if query.object_ids is None or truth is None:
        return (), ()
    if not query.object_ids:
        return truth.frames, ()
    tracks = {o: truth.tracks[o] for o in query.object_ids}
    for track in tracks.values():
        if isinstance(track, Defect):
            raise track
    frames = set.intersection(*(set(t.frames) for t in tracks.values()))
    objects = tuple(TargetObject(o, tuple(a for a in t.annotations if a.frame in frames)) for o, t in tracks.items())
    if not any(o.annotations for o in objects):
        raise Defect("no mask on any frame", f"objects {', '.join(query.object_ids)}")
    return tuple(sorted(frames)), objects


def _skipped(item: Item, query: Query, defect: Defect | MediaError) -> Skipped:
    return Skipped(defect.reason, f"{item.video_id}/{query.expression_id}" + (f": {defect.detail}" if defect.detail else ""))
