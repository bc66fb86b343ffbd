"""`videoseg data inspect --oracle`: the segmenter's IoU with the truth as its prompt, and a copy of the data set without what it does not find."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cluster.errors import UserError
from cluster.oracle import EPISODES_AT_ONCE, Found, Oracle, Record, look_at
from cluster.paths import resolve_path
from reward_service.config import LengthConfig
from reward_service.length import difficulty_class
from rollout.decoding import Decoders
from rollout.episodes import SCHEMA_VERSION, Episode, read_episodes, shards, write_episodes
from rollout.file_hashes import file_hashes
from rollout.report_file import REPORT, read_report, write_report
from segmentation_service.config import SegmentationConfig
from segmentation_service.embedding_cache import fingerprint
from segmentation_service.segmenter import Segmenter

RECORD = "oracle.jsonl"
EXAMPLES = 10
"""Episodes of one reason, and targets that are found worst, that a report names."""
MOST_DECODERS = 8


@dataclass(frozen=True)
class OracleConfig:
    """segmenter: SAM2 in transformers' format, a folder or hub id. drop_below: least mean IoU of a target that stays. frames: most that a
    target is looked at on, None: all. Raises UserError where a value cannot be."""

    segmenter: str = SegmentationConfig.checkpoint
    drop_below: float = 0.6
    frames: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.drop_below <= 1:
            raise UserError(f"--drop-below {self.drop_below:g} is not an IoU", "give a number from 0 to 1, such as 0.6")
        if self.frames is not None and self.frames < 1:
            raise UserError(f"--frames {self.frames} must be at least 1", "give a positive number, or leave it out for all frames")
        object.__setattr__(self, "segmenter", resolve_path(self.segmenter, "--segmenter", allow_hub=True))


class Report:
    """What was found in a data set, and which episodes stay. A target counts once a query, with its mean IoU over its frames."""

    def __init__(self, drop_below: float) -> None:
        self.drop_below = drop_below
        self.ious: dict[str, list[float]] = {"all": []}
        self.frames = self.episodes = 0
        self.kept: Counter[str] = Counter()
        self.dropped: dict[str, dict] = {}
        self._worst: dict[tuple, tuple] = {}  # by target, since queries share them

    def keeps(self, episode: Episode, found: Found) -> bool:
        """Counts an episode; whether it stays. An episode goes with the first of its targets: without it the query would mean something else."""
        self.episodes += 1
        level = "unrated" if episode.difficulty is None else difficulty_class(episode.difficulty, LengthConfig())
        for object_id, iou in found.means.items():
            by_frame = found.ious[object_id]
            for group in ("all", f"{episode.source} {episode.split} {episode.query_type or '-'}", f"difficulty {level}"):
                self.ious.setdefault(group, []).append(iou)
            self.frames += len(by_frame)
            target = (episode.source, episode.split, episode.video_id, object_id)
            this = (iou, episode.episode_id, object_id, min(by_frame, key=by_frame.__getitem__))
            self._worst[target] = min(self._worst.get(target, this), this)
            if len(self._worst) > EXAMPLES:
                del self._worst[max(self._worst, key=self._worst.__getitem__)]
        reason = self._fault(found)
        if reason is None:
            self.kept["found" if found.ious else "not looked at"] += 1
            return True
        counted = self.dropped.setdefault(reason, {"episodes": 0, "examples": []})
        counted["episodes"] += 1
        counted["examples"] = (counted["examples"] + [episode.episode_id])[:EXAMPLES]
        return False

    def _fault(self, found: Found) -> str | None:
        low = [iou < self.drop_below for iou in found.means.values()]
        if found.broken:
            return "unreadable video"
        if not any(low):
            return None
        return f"{'every target' if all(low) else 'one of several targets'} under IoU {self.drop_below:g}"

    def summary(self) -> dict:
        """The report as plain values, for a file."""
        kept = sum(self.kept.values())
        return {
            "queries": self.episodes,
            "episodes": kept,
            "skipped": self.episodes - kept,
            "skipped_by_reason": self.dropped,
            "kept_by_reason": dict(self.kept),
            "frames_looked_at": self.frames,
            "iou": {group: self._spread(ious) for group, ious in sorted(self.ious.items()) if ious},
            "worst": [{"iou": i, "episode_id": e, "object_id": o, "frame": t} for i, e, o, t in sorted(self._worst.values())],
        }

    def lines(self) -> list[str]:
        """The report as text, one line a fact."""
        found = self.summary()
        lines = [f"IoU of {len(self.ious['all'])} targets that the segmenter was shown, on {self.frames} frames, each the mean of its frames:"]
        for group, s in found["iou"].items():
            quartiles = ", ".join(f"{q:.3f}" for q in s["quartiles"])
            lines.append(f"  {group}: mean {s['mean']:.3f}, quartiles {quartiles}, under {self.drop_below:g}: {s['under']:.1%} ({s['targets']} targets)")
        lines += [f"  worst: {w['iou']:.3f} {w['episode_id']} object {w['object_id']}, least on frame {w['frame']}" for w in found["worst"]]
        lines.append(f"  {found['episodes']} of {self.episodes} episodes stay, {self.kept['not looked at']} of them without a mask to compare with")
        lines += [f"  {d['episodes']} go: {reason} (such as {d['examples'][0]})" for reason, d in self.dropped.items()]
        return lines

    def _spread(self, ious: Sequence[float]) -> dict:
        return {
            "targets": len(ious),
            "mean": float(np.mean(ious)),
            "quartiles": np.percentile(ious, [25, 50, 75]).tolist(),
            "under": float(np.mean(np.array(ious) < self.drop_below)),
        }


def inspect(folders: Sequence[Path], config: OracleConfig, out: Path | None = None, workers: int = 1) -> Iterator[tuple[Path, Report]]:
    """The report of each data set; with `out` each is also written there without what is dropped (of several, to OUT/<name of the folder>).

    Raises UserError if `out` is a data set that is read, DataError if something else is there.
    """
    places = {folder: None if out is None else out if len(folders) == 1 else out / folder.name for folder in folders}
    for folder, place in places.items():
        if place is not None and place.resolve() in (folder.resolve(), shards(folder)[0].parent.resolve()):
            raise UserError(f"{place} holds the episodes themselves", "give another folder for the copy")
    segmenter = Segmenter(config.segmenter)
    decoders = Decoders(min(workers, MOST_DECODERS))
    oracle = Oracle(segmenter, decoders, config.frames)
    try:
        for folder, place in places.items():
            report = Report(config.drop_below)
            if place is None:
                deque(_kept(folder, oracle, report), maxlen=0)
            else:
                _copy(folder, place, oracle, report, config)
            yield folder, report
    finally:
        decoders.close()


def _kept(data: Path, oracle: Oracle, report: Report, record: Record | None = None) -> Iterator[Episode | None]:
    """For each episode itself, or None where it goes. A line of progress now and then goes to standard error."""
    total = sum(pq.read_metadata(file).num_rows for file in shards(data))
    for n, (episode, found) in enumerate(look_at(read_episodes(data), oracle, record), 1):
        yield episode if report.keeps(episode, found) else None
        if n % EPISODES_AT_ONCE == 0 or n == total:
            print(f"{data}: looked at {n}/{total} episodes, {report.frames} frames", file=sys.stderr, flush=True)


def _copy(data: Path, out: Path, oracle: Oracle, report: Report, config: OracleConfig) -> None:
    """Made in OUT.partial and renamed when complete. The record says what was looked at before, also when all is done."""
    files = shards(data)
    settings = {
        "data": str(data.resolve()),
        "sha256": hashlib.sha256(b"".join(file_hashes(files).values())).hexdigest(),
        "schema_version": SCHEMA_VERSION,
        "segmenter_fingerprint": fingerprint(oracle.segmenter.backend),
    } | asdict(config)
    folder = out if out.exists() else out.with_name(f"{out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    if folder != out and not (folder / REPORT).exists():
        write_report(folder, settings)
    read_report(folder, settings, "inspection with --oracle")
    record = Record(folder / RECORD)
    try:
        kept = _kept(data, oracle, report, record)
        for file in files:
            mine = (e for e in islice(kept, pq.read_metadata(file).num_rows) if e)
            write_episodes((replace(e, video=os.path.relpath(e.video_path.resolve(), out.resolve())) for e in mine), folder / file.name)
    finally:
        record.close()
    write_report(folder, settings | report.summary())
    os.replace(folder, out)
