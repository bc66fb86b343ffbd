"""Does HTFS choose frames that show the target? Samplers compared on held-out toy videos, recorded as JSON.

    python -m examples.toy.sampler_evidence --out docs/frame-sampler-toy.json

Trains the model if it is not there (examples/toy/train_sampler.py), writes videos that the training never sees, and runs
`videoseg sample-frames` with every sampler. It can be stopped and started again: what is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.side_by_side import machine, publish
from cluster import cli
from examples.toy import train_sampler
from examples.toy.sampler_teacher import MIN_SHARE, MOST_FRAMES, partly_visible
from examples.toy.train_sampler import LEVEL, POLICY, SETTINGS, WORLD
from rollout.episodes import Episode, read_episodes, write_episodes
from rollout.frame_samplers import BASELINES
from rollout.frame_samples import FrameSample, read_samples
from rollout.toy_data import ToyDataConfig, write_toy_data
from rollout.toy_world import DIFFICULTY

UNTRAINED = "htfs, untrained"  # a control: it asks the policy that training starts from
SAMPLERS = ("htfs", *BASELINES, UNTRAINED)
SEED = 7  # of the videos, and of what is drawn from them


@dataclass(frozen=True)
class Pair:
    """Two episodes of a video that name a shape each. The target is in view in part of the video only."""

    target: Episode
    another: Episode


def chosen(episodes: Iterable[Episode]) -> Iterator[Pair]:
    """Of every video one pair, drawn evenly; none of a video without such a target or without another shape."""
    by_video: dict[str, list[Episode]] = {}
    for episode in (e for e in episodes if e.difficulty == DIFFICULTY[LEVEL]):
        by_video.setdefault(episode.video_id, []).append(episode)
    for number, shapes in enumerate(by_video.values()):
        rng = np.random.default_rng([SEED, number])
        for i in rng.permutation(len(shapes)):
            visible_T = np.isin(shapes[i].annotated_frames, shapes[i].target_frames(MIN_SHARE))
            if partly_visible(visible_T) and len(shapes) > 1:
                yield Pair(shapes[i], shapes[i - 1])
                break


def write_data(folder: Path, videos: int) -> list[Pair]:
    """Makes `folder`/episodes, where it is missing, with the videos in `folder`/toy; returns its pairs. The target comes first in half
    of them, so that `uniform` gives it its earlier frame and its later one alike."""
    toy, file = folder / "toy", folder / "episodes/episodes.parquet"
    if not toy.exists():
        write_toy_data(toy, ToyDataConfig(train=0, valid_u=videos, valid=0, queries=1000, seed=SEED, world=WORLD))
    pairs = list(chosen(read_episodes(toy / "valid_u")))
    if not file.exists():
        order = [(pair.target, pair.another)[:: 1 if i % 2 else -1] for i, pair in enumerate(pairs)]
        write_episodes((replace(e, video=f"../toy/valid_u/{e.video}") for both in order for e in both), file)
    return pairs


def sample(sampler: str, folder: Path, model: Path) -> dict[str, FrameSample]:
    """What `videoseg sample-frames` chooses with one of SAMPLERS for the episodes of `folder`, by their ids."""
    out = folder / f"{sampler.replace(', ', '_')}.parquet"
    command = ["sample-frames", str(folder / "episodes"), str(out), str(SETTINGS), "--sampler", sampler.partition(",")[0]]
    command += ["--model", str(POLICY if sampler == UNTRAINED else model)]
    print(f"--- videoseg {' '.join(command)}", flush=True)
    if cli.main(command) != 0:
        raise SystemExit(f"no frames sampled with {sampler}")
    return {row.episode_id: row.sample for row in read_samples(out)}


def summarise(episodes: Sequence[Episode], samples: Sequence[FrameSample]) -> dict:
    """Of the frames chosen for the episodes: the share of those that show the target, with its 95% interval, and the target's area in
    the frame over its largest in the video, the mean; further the key segment's mean share of the video, and counted fall-backs."""
    hits, areas, segments, fallbacks = [], [], [], Counter()
    for episode, s in zip(episodes, samples, strict=True):
        area = {t: sum(a.area for a in episode.visible(t)) for t in episode.annotated_frames}
        hits.append(s.target_frame in episode.target_frames(MIN_SHARE))
        areas.append(area[s.target_frame] / max(area.values()))
        segments.append((s.segment[1] - s.segment[0]) / episode.num_frames)
        fallbacks.update(s.fallbacks)
    return {
        "shows_target": round(float(np.mean(hits)), 4),
        "interval": [round(end, 4) for end in wilson(sum(hits), len(hits))],
        "area": round(float(np.mean(areas)), 4),
        "key_segment": round(float(np.mean(segments)), 4),
        "fallbacks": dict(fallbacks.most_common()),
    }


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927)."""
    share, extra = hits / count, z * z / count
    half = z * math.sqrt((share * (1 - share) + extra / 4) / count)
    return (share + extra / 2 - half) / (1 + extra), (share + extra / 2 + half) / (1 + extra)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/frame-sampler-toy.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/toy-sampler"), help="folder of model, data and samples")
    parser.add_argument("--videos", type=int, default=1680, help="videos to write; about half have a target that is in view in part only")
    args = parser.parse_args(arguments)
    model = args.work / "model"
    if not model.exists():
        train_sampler.main(["--out", str(model)])
    pairs = write_data(args.work, args.videos)
    targets, began, results = [pair.target for pair in pairs], time.time(), {}
    for sampler in SAMPLERS:
        samples = sample(sampler, args.work, model)
        results[sampler] = summarise(targets, [samples[pair.target.episode_id] for pair in pairs])
        if sampler == "htfs":
            results["htfs, asked about another shape"] = summarise(targets, [samples[pair.another.episode_id] for pair in pairs])
    record = {
        "command": "python -m examples.toy.sampler_evidence",
        "machine": machine(threads=1),
        "videos": len(pairs),
        "share_of_frames_that_show_the_target": round(float(np.mean([len(e.target_frames(MIN_SHARE)) / e.num_frames for e in targets])), 4),
        "world": asdict(WORLD) | {"seed": SEED, "videos": args.videos, "target_in_view_in_at_most": MOST_FRAMES},
        "training": json.loads((model / "training.json").read_text()),
        "sampling_seconds": round(time.time() - began),
        "samplers": results,
    }
    publish(record, args.out)
    return record


if __name__ == "__main__":
    main()
