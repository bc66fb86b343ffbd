"""What a frame sampler is, and the ones that ask no model: first, middle, random, uniform, and the oracle that sees the masks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rollout.episodes import Episode
from rollout.frame_samples import FrameSample
from rollout.order import uniform_frames

BASELINES = ("uniform", "middle", "first", "random", "oracle")


class FrameSampler(Protocol):
    """Chooses the frames of episodes."""

    def depends_on(self, episode: Episode) -> Any:
        """Everything that this episode's sample depends on besides its id, query and video, as JSON values."""

    def sample(self, episodes: Sequence[Episode]) -> list[FrameSample]:
        """One sample per episode, in their order."""


class Baseline:
    """One of BASELINES: its target frame, and `shown` frames spread evenly over the whole video, which is its key segment."""

    def __init__(self, name: str, episodes: Sequence[Episode], shown: int = 8, seed: int = 0) -> None:
        """`episodes` is the whole data set, over which `uniform` spreads the queries of each video."""
        self.name, self.shown = name, shown
        choices: dict[str, Callable[[Episode], int]] = {
            "uniform": _Spread(episodes),
            "middle": lambda e: e.num_frames // 2,
            "first": lambda e: 0,
            "random": lambda e: random_frame(e, seed),
            "oracle": most_visible_frame,
        }
        self._choose = choices[name]

    def depends_on(self, episode: Episode) -> Any:
        return [self.name, self.shown, self._choose(episode), self._fallbacks(episode)]

    def sample(self, episodes: Sequence[Episode]) -> list[FrameSample]:
        return [
            FrameSample(self._choose(e), (0, e.num_frames), (), tuple(uniform_frames(e.num_frames, self.shown)), self._fallbacks(e)) for e in episodes
        ]

    def _fallbacks(self, episode: Episode) -> dict[str, int]:
        return {"nothing_visible": 1} if self.name == "oracle" and not _areas(episode) else {}


class _Spread:
    """Of the n queries about a video, the k-th (k = 0, 1, …) gets the frame at (k + 1/2) / n of its length."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self._count: Counter[str] = Counter()
        self._place: dict[str, int] = {}
        for e in episodes:
            self._place[e.episode_id] = self._count[str(e.video_path)]
            self._count[str(e.video_path)] += 1

    def __call__(self, episode: Episode) -> int:
        return (2 * self._place[episode.episode_id] + 1) * episode.num_frames // (2 * self._count[str(episode.video_path)])


def random_frame(episode: Episode, seed: int) -> int:
    """A frame drawn evenly, by the seed and the episode's id alone."""
    digest = hashlib.sha256(f"{seed}\0{episode.episode_id}".encode()).digest()
    return int.from_bytes(digest) * episode.num_frames >> 256


def most_visible_frame(episode: Episode) -> int:
    """The annotated frame in which the targets' areas together are largest, the first of several; the middle of the video where
    none is to be seen."""
    areas = _areas(episode)
    return max(areas, key=lambda t: (areas[t], -t)) if areas else episode.num_frames // 2


def _areas(episode: Episode) -> Counter[int]:
    areas: Counter[int] = Counter()
    for annotation in (a for o in episode.objects for a in o.annotations):
        areas[annotation.frame] += annotation.area
    return areas
