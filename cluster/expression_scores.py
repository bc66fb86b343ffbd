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
from typing import NamedTuple, TypeVar

import cv2
import numpy as np

from reward_service.measures import intersection_and_union, jaccard_and_f, jaccard_and_f_of_pairs, robustness
from rollout.episodes import Annotation, Episode
from rollout.media import frame_names
from segmentation_service.video import VideoError, open_video

T = TypeVar("T")
OWN = "own"
"""Source of a user's videos, whose void pixels are left out; the benchmarks' programs take void in videos as background."""
SCORED, NO_VIDEO, MISSING, BROKEN = "scored", "no folder of its video", "no prediction", "broken prediction"
UNREADABLE = "its video cannot be read"  # whose frames' names the predictions bear


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
    def scored(self) -> bool:
        return self.status == SCORED


class BrokenPrediction(ValueError):
    """A prediction that cannot be scored; `status` says which kind."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def has_truth(episode: Episode) -> bool:
    """Whether its masks are known, if only that there are none: the masks of some splits are not public."""
    return bool(episode.annotated_frames) and episode.has_masks


def by_video(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    """Episodes of each video or image."""
    videos: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        videos[episode.video_id].append(episode)
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
    """The expressions about one video or image. Frame by frame, as they share the masks of objects, which are decoded once."""
    masks = _Masks(episodes[0])
    try:
        names, failure = names_of_frames(episodes[0]), None
    except VideoError as error:
        names, failure = ("",) * episodes[0].num_frames, BrokenPrediction(UNREADABLE, str(error))
    found = [_Expression(episode, folder, failure) for episode in episodes]
    for t in sorted({t for e in episodes for t in e.annotated_frames}):
        distinct = {a.counts: a for e in found for a in e.visible[t]}
        foreground_HW = masks.covered(t, list(distinct.values())) > 0 if episodes[0].source == "revos" else None
        answers: dict[int, list[_Answer]] = defaultdict(list)  # those that the same pixels are true for
        for answer in filter(None, (expression.answer(t, names[t], masks) for expression in found)):
            answers[id(answer.counts_HW)].append(answer)
        for alike in answers.values():
            for answer, j_and_f in zip(alike, _j_and_f(episodes[0].media, alike)):
                answer.expression.add(answer, j_and_f, foreground_HW)
    return [expression.score() for expression in found]


def _j_and_f(media: str, answers: Sequence[_Answer]) -> Iterable[tuple[float, float]]:
    """J and F of answers about one frame and the same targets; those about images are measured otherwise."""
    if media == "image":
        return [(0.0, 0.0)] * len(answers)
    if answers[0].void_HW is not None:
        return [jaccard_and_f(a.predicted_HW, a.counts_HW, a.void_HW) for a in answers]
    return jaccard_and_f_of_pairs([answers[0].counts_HW, *(a.predicted_HW for a in answers)], [(n, 0) for n, _ in enumerate(answers, 1)])


def names_of_frames(episode: Episode) -> tuple[str, ...]:
    """What the predictions of its frames are called. Raises VideoError where the video is gone, or is not the one that was imported."""
    names = frame_names(open_video(episode.video_path))
    if len(names) != episode.num_frames:
        raise VideoError(f"{episode.video_path} has {len(names)} frames, and had {episode.num_frames} when it was imported")
    return names


def read_mask(folder: Path, episode: Episode, name: str) -> np.ndarray:
    """The predicted mask of one frame: uint8 (H, W), anything but 0 being the answer. Raises BrokenPrediction."""
    video = folder / episode.video_id
    place = video / episode.expression_id
    if not place.is_dir():
        raise BrokenPrediction(MISSING if video.is_dir() else NO_VIDEO, str(place if video.is_dir() else video))
    file = place / f"{name}.png"
    image = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) if file.is_file() else None  # as the official programs do
    if image is None:
        raise BrokenPrediction(BROKEN, f"{file} " + ("cannot be read" if file.exists() else "is missing"))
    if image.shape != (episode.height, episode.width):
        raise BrokenPrediction(BROKEN, f"{file} is {image.shape}, the frame {(episode.height, episode.width)} (height, width)")
    return image


class _Masks:
    """True masks of a video, each decoded once for all expressions that it belongs to. Those of the last frame that was asked for are kept."""

    def __init__(self, episode: Episode) -> None:
        self._episode, self._frame = episode, -1
        self._decoded: dict[str, np.ndarray] = {}
        self._covered: dict[tuple[str, ...], np.ndarray] = {}

    def covered(self, frame: int, annotations: Sequence[Annotation]) -> np.ndarray:
        """How many of these masks on the frame cover each pixel: uint8 (H, W), modulo 256 as in the evaluators; the same array for the same masks."""
        if frame != self._frame:
            self._frame, self._decoded, self._covered = frame, {}, {}
        for a in annotations:
            if a.counts not in self._decoded:
                columns_WH = self._episode.decoded(a, order="F").T
                self._decoded[a.counts] = cv2.transpose(columns_WH.view(np.uint8))  # several times as fast as NumPy
        which = tuple(a.counts for a in annotations)
        if which not in self._covered:
            masks = [self._decoded[counts] for counts in which]
            self._covered[which] = sum(masks[1:], masks[0]) if masks else np.zeros((self._episode.height, self._episode.width), np.uint8)
        return self._covered[which]


class _Answer(NamedTuple):
    """What an expression's prediction says of a frame, how many true masks cover each pixel, and the pixels that count for nothing (None: there are none)."""

    expression: _Expression
    predicted_HW: np.ndarray
    counts_HW: np.ndarray
    void_HW: np.ndarray | None


class _Expression:
    """One expression in the course of being scored."""

    def __init__(self, episode: Episode, folder: Path, beforehand: BrokenPrediction | None) -> None:
        """beforehand: why no prediction of it can be scored, whatever there is."""
        self._episode, self._folder, self._beforehand = episode, folder, beforehand
        self._frames, self.visible = set(episode.annotated_frames), defaultdict(list)
        for a in (a for o in episode.objects for a in o.annotations):
            self.visible[a.frame].append(a)
        self._rows: list[Sequence[float]] = []
        self._failure: BrokenPrediction | None = None
        self._missed = 0

    def answer(self, t: int, name: str, masks: _Masks) -> _Answer | None:
        """What it says of a frame. None: the frame is not annotated, or it has failed, now or before."""
        if t not in self._frames or self._failure:
            return None
        counts_HW, image = masks.covered(t, self.visible[t]), self._episode.media == "image"
        try:
            if self._beforehand:
                raise self._beforehand
            predicted_HW = read_mask(self._folder, self._episode, name)
        except BrokenPrediction as error:
            self._failure = error
            self._missed = intersection_and_union(np.zeros_like(counts_HW), counts_HW, self._episode.ignored(t))[1] if image else 0
            return None
        ignored_HW = self._episode.ignored(t) if image or (self._episode.ignore and self._episode.source == OWN) else None
        return _Answer(self, predicted_HW, counts_HW, ignored_HW)

    def add(self, answer: _Answer, j_and_f: tuple[float, float], foreground_HW: np.ndarray | None) -> None:
        predicted_HW, counts_HW = answer.predicted_HW, answer.counts_HW
        row = [*j_and_f, *(intersection_and_union(predicted_HW, counts_HW, answer.void_HW) if self._episode.media == "image" else (0, 0))]
        if foreground_HW is not None:
            row.append(np.count_nonzero((predicted_HW > 0) * np.uint8(255) == counts_HW) / counts_HW.size)
            row += [robustness(predicted_HW, counts_HW, foreground_HW, value) for value in (1, 255)]
        self._rows.append(row)

    def score(self) -> ExpressionScore:
        e = self._episode
        about = (e.episode_id, e.video_id, e.expression_id, e.query_type, e.annotator)
        if self._failure:
            return ExpressionScore(*about, self._failure.status, str(self._failure), len(self._frames), union=self._missed)
        j, f, shared, either, *of_revos = map(np.array, zip(*self._rows))
        return ExpressionScore(*about, SCORED, "", len(j), float(j.mean()), float(f.mean()), int(shared.sum()), int(either.sum()), *(float(v.mean()) for v in of_revos))
