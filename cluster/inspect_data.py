"""`videoseg data inspect`: what a data set holds, and whether it agrees with itself and its media."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from cluster.errors import DataError
from rollout.check_data import problems
from rollout.episodes import Episode, read_episodes, shards


@dataclass
class Statistics:
    """Of some shards; `add` joins two. episode_ids and videos count how often each occurs; shares: masks' areas, of their frame."""

    episode_ids: Counter = field(default_factory=Counter)
    videos: dict[str, int] = field(default_factory=dict)  # -> frames
    groups: Counter = field(default_factory=Counter)  # (source, split, query type)
    kinds: Counter = field(default_factory=Counter)
    annotated: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    difficulties: list[float] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)  # -> episodes

    def count(self, episode: Episode) -> None:
        self.episode_ids[episode.episode_id] += 1
        self.videos[str(episode.video_path)] = episode.num_frames
        self.groups[episode.source, episode.split, episode.query_type or "-"] += 1
        truth = bool(episode.annotated_frames)
        self.kinds.update(
            name
            for name, is_so in {
                "images": episode.media == "image",
                "truth not public": not truth,
                "no target": truth and not episode.objects,
                "boxes only": not episode.has_masks,
                "with ignored pixels": bool(episode.ignore),
                f"suspect: {episode.suspect}": episode.suspect is not None,
            }.items()
            if is_so
        )
        self.words.append(len(episode.query.split()))
        if truth:
            self.annotated.append(len(episode.annotated_frames))
            self.targets.append(len(episode.objects))
        if episode.difficulty is not None:
            self.difficulties.append(episode.difficulty)
        pixels = episode.height * episode.width
        self.shares += [a.area / pixels for o in episode.objects for a in o.annotations]

    def add(self, other: Statistics) -> None:
        for name, value in vars(other).items():
            if name == "problems":
                for what, where in value.items():
                    self.problems.setdefault(what, []).extend(where)
            elif isinstance(value, list):
                getattr(self, name).extend(value)
            else:
                getattr(self, name).update(value)

    def lines(self) -> list[str]:
        """The statistics as text, one line a fact."""
        total = sum(self.episode_ids.values())
        lines = [f"{total} episodes, {len(self.videos)} videos or images"]
        for (source, split, query_type), count in sorted(self.groups.items()):
            lines.append(f"  {source} {split} {query_type}: {count} ({count / total:.1%})")
        lines += [f"  {what}: {count} ({count / total:.1%})" for what, count in sorted(self.kinds.items())]
        for what, values in (
            ("frames a video", list(self.videos.values())),
            ("annotated frames an episode", self.annotated),
            ("targets a query", self.targets),
            ("words a query", self.words),
            ("target's share of its frame", self.shares),
            ("difficulty", self.difficulties),
        ):
            lines.append(f"  {what}: " + (_spread(values) if values else "none"))
        return lines


def _spread(values: Sequence[float]) -> str:
    low, median, high = np.percentile(values, [5, 50, 95])
    return f"mean {np.mean(values):.4g}, 5% {low:.4g}, median {median:.4g}, 95% {high:.4g}, most {max(values):.4g} ({len(values)} values)"


def data_folders(path: Path) -> list[Path]:
    """The data sets at a path: itself, or the folders in it that hold shards, such as the splits of an import. Raises `DataError`."""
    if path.is_file() or any(path.glob("*.parquet")):
        return [path]
    folders = sorted({f.parent for f in path.glob("*/*.parquet") if f.parent.suffix != ".partial"})
    if not folders:
        raise DataError(f"{path}: no Parquet files here or one folder below", "give a data set, or the folder that holds its splits")
    return folders


def look(path: Path, check: bool, workers: int = 1) -> Statistics:
    """Statistics of a data set; with `check`, every episode's problems too. A line of progress a shard goes to standard error."""
    total, files = Statistics(), shards(path)
    with ExitStack() as stack:
        run = map
        if workers > 1 and len(files) > 1:
            run = stack.enter_context(ProcessPoolExecutor(min(workers, len(files)), mp_context=get_context("spawn"))).map
        for n, found in enumerate(run(partial(_look_at_shard, check=check), files), 1):
            total.add(found)
            if len(files) > 1:
                print(f"{path}: {n}/{len(files)} shards", file=sys.stderr, flush=True)
    repeated = [name for name, count in total.episode_ids.items() if count > 1]
    if check and repeated:
        total.problems["episode id given twice"] = repeated
    if check and not total.episode_ids:
        total.problems["no episodes"] = [str(path)]
    return total


def _look_at_shard(file: Path, check: bool) -> Statistics:
    found = Statistics()
    for episode in read_episodes(file):
        found.count(episode)
        for what in problems(episode) if check else ():
            found.problems.setdefault(what, []).append(episode.episode_id)
    return found
