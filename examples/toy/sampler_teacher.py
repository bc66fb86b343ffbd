"""The frame sampler's teacher: right answers to HTFS's looks at toy videos, from the truth of the world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.htfs import HTFSConfig, Look
from rollout.toy_world import Query, ToyVideo

MIN_SHARE = 0.001  # of the picture, from which on a target counts as visible: `Episode.target_frames`
MOST_FRAMES = 0.75  # of a video in which the target of a partly visible query is visible
CLEAR = 0.7  # of a target's largest area in a look, from which on it is seen well


def areas_of(video: ToyVideo) -> np.ndarray:
    """Visible pixels of every shape in every frame: int (T, N)."""
    return np.stack([video.masks(t).sum((1, 2)) for t in range(video.num_frames)])


def partly_visible(visible_T: np.ndarray) -> bool:
    """Whether a target that is visible in these frames is in view in part of the video only."""
    return 0 < visible_T.mean() <= MOST_FRAMES


class Teacher:
    """Answers the looks at one video (`rollout.htfs.Ask`, for `unit` percent): each with labels of the frames that it shows."""

    def __init__(self, video: ToyVideo, config: HTFSConfig) -> None:
        self.config = config
        self._min_area = MIN_SHARE * video.config.height * video.config.width
        areas_TN = areas_of(video)
        self._areas = {query.text: areas_TN[:, query.targets].sum(1) for query in video.queries}

    def __call__(self, looks: Sequence[Look]) -> list[list[str]]:
        return [[self.reply(look) or "none"] * len(look.seeds) for look in looks]

    def visible(self, query: Query) -> np.ndarray:
        """Whether the query's targets are visible in each frame: bool (T,)."""
        return self._areas[query.text] >= self._min_area

    def best_run(self, look: Look) -> tuple[int, int] | None:
        """First and last place in the look of the longest run of frames that show its targets well; None where none shows them."""
        areas = self._areas[look.query][list(look.frame_ids)]
        if areas.max() < self._min_area:
            return None
        edges = np.flatnonzero(np.diff(areas >= CLEAR * areas.max(), prepend=False, append=False))
        first, last = max(zip(edges[::2], edges[1::2] - 1), key=lambda run: run[1] - run[0])
        return int(first), int(last)

    def reply(self, look: Look) -> str | None:
        """The interval of the best run, or the middle of it, in whole percent."""
        run = self.best_run(look)
        if run is None:
            return None
        first, last = run
        if look.question == self.config.position_question.format(query=look.query):
            return f"{whole(look.labels[(first + last) // 2])}%"
        return f"{whole(look.labels[first])}-{whole(look.labels[last])}"


def whole(label: str) -> str:
    """The whole number of a label in percent: "12" of "12.5%"."""
    return label.partition(".")[0]
