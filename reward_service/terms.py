"""The reward terms of `videoseg_r1` as pure functions: numbers in, numbers in 0..1 out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def above(overlap, threshold: float, grading: str):
    """Overlap -> 1 where it is greater than the threshold (strictly), else 0; graded: the overlap itself."""
    overlap = np.asarray(overlap, dtype=np.float64)
    return overlap if grading == "graded" else (overlap > threshold).astype(np.float64)


def below(distance, threshold: float, grading: str, reach: float):
    """Distance -> 1 where it is less than the threshold (strictly), else 0.

    Graded (ours): 1 at distance 0, falling linearly to 0 at `reach` thresholds. A threshold of 0 rewards nothing.
    """
    distance = np.asarray(distance, dtype=np.float64)
    if grading == "graded":
        return np.clip(1.0 - distance / (reach * threshold), 0.0, 1.0) if threshold > 0 else np.zeros_like(distance)
    return (distance < threshold).astype(np.float64)


def negative_points(distances_K: np.ndarray, sizes_G: Sequence[int], tau: float, grading: str, reach: float) -> np.ndarray:
    """(G,) of each answer the share of its predicted negative points with 0 < d <= tau; 0 without one. Source: VideoSeg-R1's tau_neg, 40 px.

    distances_K: L1 distance of each point to the nearest pixel of any true mask (inf: out of the image, nothing to find), answer by answer,
    of which each has so many as sizes_G says. A point on the target (d = 0) earns nothing. Graded (ours): 1 up to tau, then linearly to 0
    at `reach` x tau.
    """
    slope = (reach - 1.0) * tau if grading == "graded" else 0.0
    earned_K = (distances_K <= tau).astype(np.float64) if slope <= 0 else np.clip(1.0 - (distances_K - tau) / slope, 0.0, 1.0)
    earned_K[distances_K <= 0] = 0.0
    sums_G = np.bincount(np.repeat(np.arange(len(sizes_G)), sizes_G), earned_K, len(sizes_G))
    return sums_G / np.maximum(sizes_G, 1)


def no_repeat(text: str, max_repeats: int = 2) -> float:
    """1 unless at least `max_repeats` sentences were said before.

    Sentences are what stands between full stops, stripped, empty ones dropped (VisionReasoner; a decimal point splits
    too, which the coordinates 10.5, 10.5, 10.5 of an answer turn into repeats).
    """
    seen, repeats = set(), 0
    for sentence in text.split("."):
        sentence = sentence.strip()
        if not sentence:
            continue
        repeats += sentence in seen
        if repeats >= max_repeats:
            return 0.0
        seen.add(sentence)
    return 1.0


def union_iou(predicted_HW, true_HW) -> float:
    """IoU of two masks; 1 when both are empty (J's convention)."""
    either = np.count_nonzero(predicted_HW | true_HW)
    return np.count_nonzero(predicted_HW & true_HW) / either if either else 1.0


def temporal_consistency(predicted_TG, true_T, mean_j_G) -> np.ndarray:
    """(G,) mean J times the mean over t of 1 - |IoU(P_t, P_t+1) - IoU(G_t, G_t+1)|: masks change from frame to frame as the true ones do.

    predicted_TG, true_T: those IoUs, (T - 1, G) and (T - 1,); one frame has no change, and the mean J is left. Times J, because masks that
    are steadily wrong are steady too. Source: ours (the paper is silent).
    """
    drift_TG = [np.abs(predicted_G - true) for predicted_G, true in zip(predicted_TG, true_T)]
    return (1.0 - sum(drift_TG) / max(len(drift_TG), 1)) * np.asarray(mean_j_G)
