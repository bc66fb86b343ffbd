"""Ref-DAVIS17 as ReferFormer and VideoLISA report it: the masks of one annotator's texts merged into one picture a frame, and these given to
the DAVIS 2017 evaluator of the unsupervised task, which pairs predicted with true objects. Final numbers are means over the four annotators.

True objects are those of the benchmark's own images, with or without a text; they are read from beside the frames. The evaluator counts as
many as its first frame shows and takes void pixels (255) for background, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from reward_service.measures import jaccard_and_f_of_pairs
from rollout.episodes import Episode
from rollout.importers.masks import VOID, read_png
from rollout.importers.ref_davis17 import ANNOTATORS
from segmentation_service.video import VideoError

from cluster.errors import MissingFileError
from cluster.expression_scores import BrokenPrediction, names_of_frames, read_mask


@dataclass(frozen=True)
class MergedScore:
    """One true object of one video, for one annotator: means over all frames of J and F of the prediction paired with it. failed: that
    prediction is there for a text whose own is missing or broken."""

    annotator: str
    j: float
    f: float
    failed: bool


def merge_annotators(scores: Sequence[MergedScore], failed_count_0: bool) -> dict[str, float]:
    """Percent: means over objects, then over annotators."""
    counted = lambda s: (s.j, s.f) if not (s.failed and failed_count_0) else (0.0, 0.0)
    means = [np.mean([counted(s) for s in scores if s.annotator == a], axis=0) for a in ANNOTATORS if any(s.annotator == a for s in scores)]
    j, f = 100 * np.mean(means, axis=0)
    return {"J&F": float((j + f) / 2), "J": float(j), "F": float(f)}


def score_merged(episodes: Sequence[Episode], folder: Path) -> list[MergedScore]:
    """All objects of one video, for each annotator. Raises MissingFileError where the benchmark's images are not beside its frames."""
    try:
        names, scores = names_of_frames(episodes[0]), []
    except VideoError as error:
        raise MissingFileError(str(error), "the four-annotator protocol is about all objects of all videos; restore the benchmark's folders") from error
    truth_GTHW = _true_objects(episodes[0], names)
    for annotator in ANNOTATORS:
        mine = sorted((e for e in episodes if e.annotator == annotator), key=lambda e: int(e.expression_id))
        if mine:
            scores += _score(annotator, mine, names, truth_GTHW, folder)
    return scores


def _score(annotator: str, episodes: Sequence[Episode], names: Sequence[str], truth_GTHW: np.ndarray, folder: Path) -> list[MergedScore]:
    labels_THW, failed = _merged(episodes, names, folder)
    predicted = max(int(labels_THW.max(initial=0)), len(truth_GTHW))
    pairs = [(p, predicted + g) for p in range(predicted) for g in range(len(truth_GTHW))]
    scores_TK2 = [jaccard_and_f_of_pairs([*(labels_HW == p + 1 for p in range(predicted)), *truth_GTHW[:, t]], pairs) for t, labels_HW in enumerate(labels_THW)]
    j_PG, f_PG = np.mean(scores_TK2, axis=0).reshape(predicted, len(truth_GTHW), 2).transpose(2, 0, 1)
    return [MergedScore(annotator, float(j_PG[p, g]), float(f_PG[p, g]), p in failed) for p, g in zip(*linear_sum_assignment(-(j_PG + f_PG) / 2))]


def _merged(episodes: Sequence[Episode], names: Sequence[str], folder: Path) -> tuple[np.ndarray, set[int]]:
    """uint8 (T, H, W), k for the k-th text's mask; where masks overlap the earlier text keeps the pixel (their scores are equal, and the
    first of equal ones is taken). And the texts, counted from 0, whose prediction is missing or broken: those have no pixel."""
    labels_THW, failed = np.zeros((len(names), episodes[0].height, episodes[0].width), np.uint8), set()
    for k, episode in enumerate(episodes):
        try:
            masks_THW = np.stack([read_mask(folder, episode, name) > 0 for name in names])
        except BrokenPrediction:
            failed.add(k)
        else:
            labels_THW[masks_THW & (labels_THW == 0)] = k + 1
    return labels_THW, failed


def _true_objects(episode: Episode, names: Sequence[str]) -> np.ndarray:
    """bool (objects, T, H, W)."""
    frames = str(episode.video_path)
    folder = Path(frames.replace("JPEGImages/480p", "Annotations_unsupervised/480p") if "JPEGImages/480p" in frames else frames.replace("JPEGImages", "Annotations"))
    missing = [name for name in names if not (folder / f"{name}.png").is_file()]
    if missing:
        raise MissingFileError(f"{folder / missing[0]}.png is missing", "the four-annotator protocol reads DAVIS's own images; restore them beside the frames")
    values_THW = np.stack([read_png(folder / f"{name}.png", (episode.height, episode.width)) for name in names])
    values_THW[values_THW == VOID] = 0
    return np.stack([values_THW == k for k in range(1, int(values_THW[0].max()) + 1)]) if values_THW[0].any() else np.zeros((0, *values_THW.shape), bool)
