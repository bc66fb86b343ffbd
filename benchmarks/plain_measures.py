"""The official evaluators' measures restated frame by frame in plain NumPy and OpenCV: the reference of tests and of `measures.py`'s figures.

Arguments stand in the order of our functions (predicted first). Sources: davis2017-evaluation (J, F), LISA (gIoU, cIoU), VISA (R).
"""

from __future__ import annotations

import cv2
import numpy as np


def jaccard(predicted, annotated, void=None):
    """Of one mask (H, W), or of all of a video (T, H, W), as the evaluators take them."""
    predicted, annotated = predicted.astype(bool), annotated.astype(bool)
    void = np.zeros_like(predicted) if void is None else void.astype(bool)
    both = np.sum((predicted & annotated) & ~void, axis=(-2, -1))
    either = np.sum((predicted | annotated) & ~void, axis=(-2, -1))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))[()]


def boundary_f(predicted, annotated, void=None, tolerance: float = 0.008) -> float:
    kept = np.ones(predicted.shape, bool) if void is None else ~void.astype(bool)
    radius = tolerance if tolerance >= 1 else np.ceil(tolerance * np.linalg.norm(predicted.shape))
    predicted_edge, annotated_edge = edge(predicted.astype(bool) & kept), edge(annotated.astype(bool) & kept)
    disk = disk_of(int(radius))
    predicted_near = cv2.dilate(predicted_edge.astype(np.uint8), disk)
    annotated_near = cv2.dilate(annotated_edge.astype(np.uint8), disk)
    n_predicted, n_annotated = np.sum(predicted_edge), np.sum(annotated_edge)
    if n_predicted == 0 and n_annotated > 0:
        precision, recall = 1.0, 0.0
    elif n_predicted > 0 and n_annotated == 0:
        precision, recall = 0.0, 1.0
    elif n_predicted == 0 and n_annotated == 0:
        precision, recall = 1.0, 1.0
    else:
        precision = np.sum(predicted_edge * annotated_near) / float(n_predicted)
        recall = np.sum(annotated_edge * predicted_near) / float(n_annotated)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def edge(mask: np.ndarray) -> np.ndarray:
    """Where a pixel differs from its neighbour to the east, south or south-east; in the last row and column only along it."""
    east, south, south_east = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
    east[:, :-1], south[:-1], south_east[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    out = (mask ^ east) | (mask ^ south) | (mask ^ south_east)
    out[-1], out[:, -1] = mask[-1] ^ east[-1], mask[:, -1] ^ south[:, -1]
    out[-1, -1] = False
    return out


def disk_of(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def giou_and_ciou(predicted, annotated, ignore) -> tuple[float, float]:
    """Lists of masks, as LISA's validation goes through them: labels 0, 1 and 255, histograms of the two classes."""
    total_intersection = total_union = total_iou = 0.0
    for p, a, i in zip(predicted, annotated, ignore):
        target = np.where(i, 255, a.astype(np.int64)).ravel()
        output = np.where(target == 255, 255, p.astype(np.int64).ravel())
        area = lambda labels: np.array([(labels == k).sum() for k in (0, 1)], np.float64)
        intersection = area(output[output == target])
        union = area(output) + area(target) - intersection
        iou = intersection / (union + 1e-5)
        iou[union == 0] += 1.0
        total_intersection, total_union, total_iou = total_intersection + intersection, total_union + union, total_iou + iou
    return total_iou[1] / (len(predicted) + 1e-5), (total_intersection / (total_union + 1e-10))[1]


def robustness(predicted_uint8, annotated_uint8, foreground_uint8) -> float:
    """One frame of 8-bit masks: 0/255 as read from images, or 0/1."""
    false = ((1 - annotated_uint8) * predicted_uint8).sum()
    return max(1 - false / (foreground_uint8.sum() + 1e-6), 0.0)
