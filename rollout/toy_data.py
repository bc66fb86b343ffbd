"""The toy world on disk: JPEG frames and Parquet episodes, in folders that are also a data set in MeViS's layout.

    OUT/train    JPEGImages/<video>/<frame>.jpg, meta_expressions.json, mask_dict.json, episodes.parquet
    OUT/valid_u  the same: our validation split
    OUT/valid    the same without mask_dict.json (MeViS hides the masks of this split): our test split

Every split draws its videos from seeds of its own, so no two share a video.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from rollout.episodes import Episode, TargetObject, annotate, write_episodes
from rollout.toy_world import DIFFICULTY, Query, ToyVideo, WorldConfig, make_video

SPLITS = {"train": "train", "valid_u": "validation", "valid": "test"}
FPS = 8.0


@dataclass(frozen=True)
class ToyDataConfig:
    train: int = 400  # videos
    valid_u: int = 120
    valid: int = 40
    queries: int = 3  # per video, at most
    seed: int = 0
    world: WorldConfig = WorldConfig()
    shuffled: bool = False
    """A control: each query's text is replaced by one about a shape drawn from all of its video, so that it tells nothing of what is meant."""
    grey: bool = False
    """All frames are grey; the truth stays."""


def write_toy_data(out: str | Path, config: ToyDataConfig = ToyDataConfig(), progress: Callable[[str], None] = print) -> None:
    """Writes the data set to a temporary name and renames it; an existing `out` is an error, never overwritten."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; remove it or choose another folder")
    work = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for number, folder in enumerate(SPLITS):
            count = getattr(config, folder)
            seeds = [1_000_000_000 + config.seed * 10_000_000 + number * 1_000_000 + i for i in range(count)]
            results = pool.map(partial(_write_video, root=work / folder, config=config), seeds, chunksize=8)
            videos = []
            for i, video in enumerate(results, 1):
                videos.append(video)
                if i % 40 == 0 or i == count:
                    progress(f"toy data, {SPLITS[folder]}: {i}/{count} videos")
            write_episodes((e for episodes, *_ in videos for e in episodes), work / folder / "episodes.parquet")
            _write_mevis(work / folder, videos, masks=folder != "valid")
    os.replace(work, out)


def _write_video(seed: int, root: Path, config: ToyDataConfig) -> tuple[list[Episode], dict, list[list[dict | None]]]:
    """Frames of one video to disk; returns its episodes, its MeViS entry, and its shapes' masks per frame as RLE."""
    video = make_video(seed, config.world)
    name = video_name(video)
    folder = root / "JPEGImages" / name
    folder.mkdir(parents=True)
    annotations: list[dict] = []  # per frame: shape index -> Annotation or None
    for t in range(video.num_frames):
        frame = video.frame(t)
        Image.fromarray(np.full_like(frame, 128) if config.grey else frame).save(folder / f"{t:05d}.jpg", quality=92, subsampling=0)
        annotations.append({i: annotate(t, mask) for i, mask in enumerate(video.masks(t))})
    queries = _choose(video, config.queries)
    if config.shuffled:
        queries = _shuffled(video, queries)
    targets = [TargetObject(str(i), tuple(a[i] for a in annotations if a[i])) for i in range(len(video.shapes))]
    episodes = [toy_episode(video, n, query, SPLITS[root.name], tuple(targets[i] for i in query.targets)) for n, query in enumerate(queries)]
    expressions = {str(n): {"exp": q.text, "obj_id": list(q.targets)} for n, q in enumerate(queries)}
    entry = {"vid_id": name, "frames": [f"{t:05d}" for t in range(video.num_frames)], "expressions": expressions}
    size = [config.world.height, config.world.width]
    rles = [[{"size": size, "counts": a[i].counts} if a[i] else None for a in annotations] for i in range(len(video.shapes))]
    return episodes, entry, rles


def video_name(video: ToyVideo) -> str:
    return f"toy_{video.seed:010d}"


def video_of(episode: Episode, world: WorldConfig = WorldConfig()) -> tuple[ToyVideo, Query]:
    """The video and the query that an episode was written from, of data that is not shuffled."""
    video = make_video(int(episode.video_id.removeprefix("toy_")), world)
    return video, next(query for query in video.queries if query.text == episode.query)


def toy_episode(video: ToyVideo, number: int, query: Query, split: str, objects: tuple[TargetObject, ...] = ()) -> Episode:
    """The episode of a video's query with this number; without `objects` its truth is not told."""
    name = video_name(video)
    return Episode(
        episode_id=f"{name}_{number}",
        source="toy",
        split=split,
        video_id=name,
        expression_id=str(number),
        video=f"JPEGImages/{name}",
        height=video.config.height,
        width=video.config.width,
        num_frames=video.num_frames,
        fps=FPS,
        query=query.text,
        difficulty=DIFFICULTY[query.level],
        annotated_frames=tuple(range(video.num_frames)) if objects else (),
        objects=objects,
    )


def _choose(video: ToyVideo, count: int):
    """At most `count` queries of a video, hard ones first among equals so that the levels come out balanced."""
    rng = np.random.default_rng([video.seed, 2])
    by_level = {level: [q for q in video.queries if q.level == level] for level in ("hard", "mid", "easy")}
    chosen = []
    while len(chosen) < count and any(by_level.values()):
        for queries in by_level.values():
            if queries and len(chosen) < count:
                chosen.append(queries.pop(int(rng.integers(len(queries)))))
    return chosen


def _shuffled(video: ToyVideo, queries: list[Query]) -> list[Query]:
    """Each query with the text of one about a shape drawn evenly, of its own level where there is one."""
    rng = np.random.default_rng([video.seed, 3])
    result = []
    for query in queries:
        shape = int(rng.integers(len(video.shapes)))
        about = [q for q in video.queries if q.targets == (shape,)]
        texts = [q.text for q in about if q.level == query.level] or [q.text for q in about]
        result.append(replace(query, text=texts[int(rng.integers(len(texts)))]))
    return result


def _write_mevis(folder: Path, videos: list, masks: bool) -> None:
    """`meta_expressions.json`, and `mask_dict.json` where the split has one."""
    meta, mask_dict = {}, {}
    for _, entry, rles in videos:
        first = len(mask_dict)
        mask_dict |= {str(first + i): frames for i, frames in enumerate(rles)}
        for expression in entry["expressions"].values():
            if masks:
                expression["anno_id"] = [first + i for i in expression["obj_id"]]
            else:
                del expression["obj_id"]
        meta[entry["vid_id"]] = entry
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": meta}))
    if masks:
        (folder / "mask_dict.json").write_text(json.dumps(mask_dict))
