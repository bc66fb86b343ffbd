"""The toy teacher: what a well-reasoned answer to a toy query looks like, from the truth of the world.

The reasoning names the target by its look and its place; a share of the answers first list everything in view, so that
the length penalty has something to shorten. A *hedged* answer says "Perhaps" and adds another shape to be on the safe side; a
committed one says "It is" and points at what was meant alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from rollout.toy_world import Query, ToyVideo
from segmentation_service.geometry import round_boxes, round_points, scale_boxes, scale_points
from segmentation_service.masks import mask_to_box, mask_to_point

NOTHING = "<think>I see no shape.</think><answer>[]</answer>"  # the answer about grey frames
VERBOSE = 0.35  # share of answers that list everything in view first
ROWS, COLUMNS = ("upper", "middle", "lower"), ("left", "centre", "right")


def place(point: Sequence[float], hw: tuple[int, int]) -> str:
    """The third of the picture that holds the point, e.g. "upper left"."""
    row, column = (min(2, int(3 * v / size)) for v, size in zip((point[1], point[0]), hw))
    return f"{ROWS[row]} {COLUMNS[column]}"


def outside_point(mask_HW: np.ndarray, point: Sequence[int], gap: int) -> list[int]:
    """A point `gap` pixels to the right of the mask in the row of `point`, or to its left where the frame ends."""
    columns = np.flatnonzero(mask_HW[point[1]])
    x = int(columns[-1]) + gap
    return [x if x < mask_HW.shape[1] else max(0, int(columns[0]) - gap), int(point[1])]


def answer(video: ToyVideo, query: Query, t: int, policy_hw: tuple[int, int], rng: np.random.Generator, hedged: float = 0.0) -> str:
    """The completion for a query about frame t, coordinates in integer pixels of the policy's target image.

    `hedged`: the probability of a hedged answer, where one shape is meant and another is in view.
    """
    verbose, hedges = rng.random(2) < (VERBOSE, hedged)
    masks_NHW = video.masks(t)
    hw = masks_NHW.shape[1:]
    points = [mask_to_point(mask) if mask.any() else None for mask in masks_NHW]
    label = lambda i: f"the {video.shapes[i].name}, {place(points[i], hw)}"
    in_view = [i for i, point in enumerate(points) if point is not None]
    pointed = [i for i in in_view if i in query.targets]
    others = [i for i in in_view if i not in query.targets]
    if hedges := hedges and len(pointed) == 1 and bool(others):
        pointed.append(int(rng.choice(others)))
    objects = []
    for i in pointed:
        negative = outside_point(masks_NHW[i], points[i], gap=4)
        box = round_boxes(scale_boxes(mask_to_box(masks_NHW[i]), hw, policy_hw), policy_hw)
        point, negative = (round_points(scale_points(p, hw, policy_hw), policy_hw) for p in (points[i], negative))
        objects.append({"bbox_2d": box.tolist(), "point_2d": point.tolist(), "negative_point_2d": negative.tolist()})
    everything = "; ".join(map(label, in_view))
    claim = "Perhaps " + " or ".join(map(label, pointed)) if hedges else "It is " + " and ".join(map(label, pointed))
    thought = (f"I see {everything}. " if verbose else "") + f"{claim}."
    return f"<think>{thought}</think><answer>{json.dumps(objects, separators=(',', ':'))}</answer>"
