"""What each expression of a benchmark scores: predicted masks in a folder against the truth of imported episodes, videos in parallel.

Predictions are `FOLDER/<video_id>/<expression_id>/<frame>.png`, as the benchmarks' own programs and servers want them: one image for each
annotated frame (of an image: for the image itself), of its name and size, any value above black being the answer. How the scores of
expressions become a benchmark's numbers is the business of `cluster.benchmark_scores`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from reward_service.measures import boundary_f, intersection_and_union, jaccard, robustness
from rollout.episodes import Annotation, Episode
from segmentation_service.video import ImageFolder, open_video

from cluster.errors import UserError

T = TypeVar("T")
SCORED, NO_VIDEO, MISSING, BROKEN = "scored", "no folder of its video", "no prediction", "broken prediction"


@dataclass(frozen=True)
class ExpressionScore:
    """One expression. status: SCORED, or why not; then all numbers but `union` are 0, and `detail` says more.

    Of videos j and f, means over the annotated frames, and for ReVOS its A and R (accuracy, and robustness where a predicted pixel counts
    1 or, as published, 255; see `measures.robustness`). Of images the pixels in both masks and in either, without ignored ones.
    """

    episode_id: str
    video_id: str
    expression_id: str
    query_type: str | None
    annotator: str | None
    status: str
    detail: str = ""
    frames: int = 0
    j: float = 0.0
    f: float = 0.0
    intersection: int = 0
    union: int = 0
    accuracy: float = 0.0
    robustness: float = 0.0
    robustness_255: float = 0.0

    @property
    def jf(self) -> float:
        return (self.j + self.f) / 2

    @property
    def scored(self) -> bool:
        return self.status == SCORED


class BrokenPrediction(ValueError):
    """A prediction that cannot be scored; `status` says which kind."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def by_video(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    """Episodes of each video or image, all of them with public masks. Raises UserError where one has none, or none is given."""
    videos: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        if not episode.annotated_frames or not episode.has_masks:
            raise UserError(f"{episode.episode_id}: its masks are not public", "score a split whose masks are, or hand the predictions in (--zip)")
        videos[episode.video_id].append(episode)
    if not videos:
        raise UserError("there is no episode to score", "give a data set of `videoseg data import`")
    return videos


def over_videos(work: Callable[[list[Episode], Path], T], videos: Sequence[list[Episode]], folder: Path, workers: int) -> Iterator[T]:
    """`work(episodes, folder)` for the episodes of each video, in their order, as they are done."""
    if workers <= 1 or len(videos) <= 1:
        yield from (work(episodes, folder) for episodes in videos)
        return
    with ProcessPoolExecutor(min(workers, len(videos)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(work, videos, [folder] * len(videos))
        finally:
            pool.shutdown(cancel_futures=True)


def score_video(episodes: list[Episode], folder: Path) -> list[ExpressionScore]:
    """The expressions about one video or image."""
    names = frame_names(episodes[0])
    foreground = _Frames([a for e in episodes for o in e.objects for a in o.annotations], episodes[0])
    return [_score(episode, names, foreground, folder) for episode in episodes]


def frame_names(episode: Episode) -> list[str]:
    """The names of the video's frames without suffix, which predictions bear as well; of a video file, its frames' numbers in five digits.
    Raises VideoError where it is gone."""
    video = open_video(episode.video_path)
    return [file.stem for file in video.files] if isinstance(video, ImageFolder) else [f"{t:05d}" for t in range(len(video))]


def read_mask(folder: Path, episode: Episode, name: str) -> np.ndarray:
    """The predicted mask of one frame: bool (H, W). Raises BrokenPrediction."""
    video = folder / episode.video_id
    place = video / episode.expression_id
    if not place.is_dir():
        raise BrokenPrediction(MISSING if video.is_dir() else NO_VIDEO, str(place if video.is_dir() else video))
    file = place / f"{name}.png"
    try:
        with Image.open(file) as image:
            mask_HW = np.asarray(image.convert("L")) > 0
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenPrediction(BROKEN, f"{file}: {'no such file' if not file.exists() else error}") from error
    if mask_HW.shape != (episode.height, episode.width):
        raise BrokenPrediction(BROKEN, f"{file} is {mask_HW.shape}, the frame {(episode.height, episode.width)} (height, width)")
    return mask_HW


class _Frames:
    """Annotations by frame, decoded one frame at a time."""

    def __init__(self, annotations: Iterable[Annotation], episode: Episode) -> None:
        self._episode, self._by_frame = episode, defaultdict(dict)
        for a in annotations:
            self._by_frame[a.frame][a.counts] = a  # an object of several expressions is there once

    def counts(self, frame: int) -> np.ndarray:
        """How many of the objects cover each pixel: uint8 (H, W), modulo 256 as in the evaluators."""
        total_HW = np.zeros((self._episode.height, self._episode.width), np.uint8)
        for a in self._by_frame[frame].values():
            total_HW += self._episode.decoded(a)
        return total_HW


def _score(episode: Episode, names: list[str], foreground: _Frames, folder: Path) -> ExpressionScore:
    about = (episode.episode_id, episode.video_id, episode.expression_id, episode.query_type, episode.annotator)
    truth, rows = [_Frames(o.annotations, episode) for o in episode.objects], []
    for t in episode.annotated_frames:
        counts_HW = sum((o.counts(t) for o in truth), np.zeros((episode.height, episode.width), np.uint8))
        try:
            predicted_HW = read_mask(folder, episode, names[t])
        except BrokenPrediction as error:
            missed = intersection_and_union(np.zeros_like(counts_HW), counts_HW, episode.ignored(t))[1]
            return ExpressionScore(*about, error.status, str(error), len(episode.annotated_frames), union=missed if episode.media == "image" else 0)
        if episode.media == "image":
            rows.append((0.0, 0.0, *intersection_and_union(predicted_HW, counts_HW, episode.ignored(t))))
            continue
        scores = [jaccard(predicted_HW, counts_HW), boundary_f(predicted_HW, counts_HW), 0, 0]
        if episode.source == "revos":
            scores.append((predicted_HW * np.uint8(255) == counts_HW).mean())
            scores += [robustness(predicted_HW, counts_HW, foreground.counts(t) > 0, value) for value in (1, 255)]
        rows.append(scores)
    j, f, shared, either, *of_revos = map(np.array, zip(*rows))
    return ExpressionScore(*about, SCORED, "", len(rows), float(j.mean()), float(f.mean()), int(shared.sum()), int(either.sum()), *(float(v.mean()) for v in of_revos))
