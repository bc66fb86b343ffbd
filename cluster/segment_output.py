"""The files of one query about one video: masks, overlay and answer.json, in a folder that gets its name when all of them are complete."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segmentation_service.masks import encode_rle
from segmentation_service.overlay import draw_overlay
from segmentation_service.palette import save_palette
from segmentation_service.video import Video, read_frame
from segmentation_service.video_writer import write_video

from cluster.checkpoints import flush_to_disk
from cluster.errors import UserError
from cluster.inference import Answered

ANSWER, MASKS, RLES, OVERLAY = "answer.json", "masks", "masks.json", "overlay.mp4"
_SPOOL = ".rles"
RETRIED = ("unreadable",)
"""Statuses that do not count as finished: somebody may have restored the video."""


@dataclass(frozen=True)
class Outputs:
    """Which files, besides answer.json: palette images, run-length masks as JSON, the overlay."""

    png: bool = True
    rle: bool = False
    overlay: bool = True


def folder_name(query: str) -> str:
    """Words of the query, which say everything or else are followed by a hash of it: one query one name, in whatever company."""
    words = re.findall(r"\w+", query.lower())
    name = "-".join(words)[:48].strip("-")
    return name if name.replace("-", " ") == query else "-".join(filter(None, (name, hashlib.sha256(query.encode()).hexdigest()[:6])))


def finished(place: Path, query: str, video: Path, settings: str) -> str | None:
    """The status of a query whose folder is complete; None where it must be done. Raises UserError where the folder is another's: of a video
    elsewhere that has the same name, or made by another policy or under other settings."""
    if not (place / ANSWER).is_file():
        if place.exists():
            raise UserError(f"there is something at {place} that `videoseg segment` has not made", "give another --out")
        return None
    record = json.loads((place / ANSWER).read_text(encoding="utf-8"))
    for what, mine in (("video", str(video)), ("query", query), ("settings", settings)):
        if record.get(what) != mine:
            raise UserError(f"{place} holds an answer with {what} {record.get(what)!r}, not {mine!r}", f"give another --out, or delete {place}")
    return None if record["status"] in RETRIED else record["status"]


class QueryFolder:
    """A folder in the making. Masks come in any order of frames and go to disk at once. After `finish` or instead of it, `discard`."""

    def __init__(self, place: Path, hw: tuple[int, int], num_frames: int, outputs: Outputs) -> None:
        self.place, self.hw, self.outputs = place, hw, outputs
        self.seconds = 0.0  # spent here
        self._work = place.with_name(f".{place.name}.partial")
        shutil.rmtree(self._work, ignore_errors=True)
        (self._work / MASKS).mkdir(parents=True)
        self._spool = (self._work / _SPOOL).open("w+b")
        self._places = np.full(num_frames, -1, np.int64)  # where each frame's masks begin in the spool

    def add(self, t: int, masks_NHW: np.ndarray) -> None:
        """The masks of frame t: bool (objects, H, W)."""
        start = time.perf_counter()
        if self.outputs.png:
            save_palette(self._work / MASKS / f"{t:05d}.png", masks_NHW, self.hw)
        self._places[t] = self._spool.seek(0, 2)
        self._spool.write(json.dumps([encode_rle(mask_HW) for mask_HW in masks_NHW]).encode() + b"\n")
        self.seconds += time.perf_counter() - start

    def finish(self, video: Video, fps: float, record: dict[str, Any]) -> None:
        """The overlay, in which each frame is drawn with its own masks, and the rest; then the folder gets its name. Raises VideoError."""
        start = time.perf_counter()
        if self.outputs.overlay:
            write_video(self._work / OVERLAY, (draw_overlay(read_frame(video, t), rles) for t, rles in enumerate(self._rles())), fps)
        if self.outputs.rle:
            self._write_rles()
        self._spool.close()
        (self._work / _SPOOL).unlink()
        if not self.outputs.png:
            (self._work / MASKS).rmdir()
        self.seconds += time.perf_counter() - start
        record["seconds"]["write"] = round(self.seconds, 3)
        _complete(self._work, self.place, record)

    def discard(self) -> None:
        """Removes what was not finished."""
        self._spool.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def _rles(self) -> Iterator[list[dict]]:
        """The masks of each frame, in rising order."""
        for start in self._places:
            self._spool.seek(start)
            yield json.loads(self._spool.readline())

    def _write_rles(self) -> None:
        with (self._work / RLES).open("w", encoding="utf-8") as file:
            file.write(f'{{"size": [{self.hw[0]}, {self.hw[1]}], "frames": [')
            for t, rles in enumerate(self._rles()):
                file.write(("," if t else "") + "\n" + json.dumps(rles))
            file.write("\n]}\n")


def write_without_masks(place: Path, record: Mapping[str, Any]) -> None:
    """The folder of a query that gets no masks: answer.json alone."""
    work = place.with_name(f".{place.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _complete(work, place, record)


def _complete(work: Path, place: Path, record: Mapping[str, Any]) -> None:
    (work / ANSWER).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    flush_to_disk(work / ANSWER)
    shutil.rmtree(place, ignore_errors=True)  # of a query that is tried again
    work.rename(place)


def answer_record(answered: Answered, policy: str, settings: str, masks_NHW: np.ndarray | None = None) -> dict[str, Any]:
    """answer.json. Boxes and points are pixels of the original frame, as answered: neither sorted nor cut to the frame."""
    episode, sample, completion = answered.episode, answered.sample, answered.completion
    objects = () if answered.answer is None else answered.answer.objects
    pixels = [None] * len(objects) if masks_NHW is None else masks_NHW.sum((1, 2)).tolist()
    return {
        "status": answered.status,
        "video": episode.video,
        "query": episode.query,
        "reasoning": answered.reasoning,
        "completion": None if completion is None else completion.text,
        "finish_reason": None if completion is None else completion.finish_reason,
        "strict": answered.answer is not None and answered.answer.strict,
        "objects": [
            {
                "object": k,
                "box": _rounded(o.box),
                "points": [_rounded(p) for p in o.points],
                "negative_points": [_rounded(p) for p in o.negative_points],
                "pixels_on_target_frame": area,
            }
            for k, (o, area) in enumerate(zip(objects, pixels, strict=True), 1)
        ],
        "target_frame": None if sample is None else sample.target_frame,
        "shown_frames": None if sample is None else sample.shown,
        "key_segment": None if sample is None else list(sample.segment),
        "fallbacks": {} if sample is None else dict(sample.fallbacks),
        "num_frames": episode.num_frames,
        "height": episode.height,
        "width": episode.width,
        "fps": round(episode.fps, 3),
        "error": answered.error,
        "policy": policy,
        "settings": settings,
        "seconds": {stage: round(seconds, 3) for stage, seconds in answered.seconds.items()},
    }


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [round(float(v), 2) for v in values]
