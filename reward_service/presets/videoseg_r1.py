"""VideoSeg-R1: VisionReasoner's terms, a negative-point term, one-to-one matching (domain.md 1.3, and our choices in 1.8).

A term is the function that bears the name of its weight: it takes the group and gives each answer a value from 0 to its maximum.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import chain
from typing import Sequence

from reward_service import terms
from reward_service.answer import Answer
from reward_service.config import TermWeights
from reward_service.distance import MaskDistance
from reward_service.group import Group
from reward_service.tags import think_text
from reward_service.target import Target

CONFIG: dict = {}  # the defaults of RewardConfig
SETTINGS = None


def group_terms(answers: Sequence[Answer], target: Target, config, predicted_masks):
    """Terms and diagnostics of the completions of one prompt; pairwise work is done for the whole group at once.

    predicted_masks: None, or per answer the masks of `answer.objects` on the target frame, or {frame id: such masks}.
    Diagnostics: n_predicted, n_true, box_iou (mean IoU of the boxes matched by IoU, over max(M, N)) and, where masks on the
    target frame were passed and the target has some, mask_iou (of the unions).
    """
    group = Group(answers, target, config, predicted_masks)
    values = {name: term(group) for name, term in TERMS.items() if getattr(config.weights, name)}
    comparable = predicted_masks is not None and (target.masks is not None or not len(target))
    out = []
    for i, answer in enumerate(answers):
        seen = {"n_predicted": answer.n_items if answer.strict else 0, "n_true": len(target), "box_iou": group.box_iou[i]}
        if comparable and group.masks[i] is not None:
            seen["mask_iou"] = group.mask_iou[i]
        out.append(({name: value[i] for name, value in values.items()}, seen))
    return out


def think_format(group: Group) -> list[float]:
    return [float(answer.think_format) for answer in group.answers]


def segmentation_format(group: Group) -> list[float]:
    # An empty list has no items to average. Ours: it is perfect where it is right, else it would cost to be right.
    perfect = group.says_nothing if not len(group.target) else [0.0] * len(group.answers)
    return [2.0 if right else answer.segmentation_format for answer, right in zip(group.answers, perfect)]


def iou(group: Group) -> list[float]:
    return group.accuracy["iou"]


def box_l1(group: Group) -> list[float]:
    return group.accuracy["box_l1"]


def point(group: Group) -> list[float]:
    return group.accuracy["point"]


def negative_point(group: Group) -> list[float]:
    config, target = group.config, group.target
    union = target.union_HW("negative_point")  # asked for even without points: a missing input must not hide
    pitch_yx = group.to_target[::-1]
    distance = target.cached(("distance", pitch_yx), lambda: MaskDistance(union, pitch_yx))
    points = [[p for one in a.objects[: len(mine)] for p in one.negative_points] for a, mine in zip(group.answers, group.objects)]
    distances = distance.at(list(chain.from_iterable(points)))
    return terms.negative_points(distances, list(map(len, points)), config.negative_reach, config.negative_grading, config.graded_reach).tolist()


def no_repeat(group: Group) -> list[float]:
    read = think_text if group.config.no_repeat_scope == "think" else str
    return [terms.no_repeat(read(answer.text), group.config.max_repeats) for answer in group.answers]


def mask_iou(group: Group) -> list[float]:
    return terms.above(group.mask_iou, group.config.mask_iou_threshold, group.config.mask_iou_grading).tolist()


def video_quality(group: Group) -> list[float]:
    if not len(group.target):
        return group.says_nothing
    config = group.config
    return terms.above(group.video.measure(config.video_measure), config.video_quality_threshold, config.video_quality_grading).tolist()


def temporal_consistency(group: Group) -> list[float]:
    if not len(group.target):
        return group.says_nothing
    return terms.temporal_consistency(group.video.changes_TG, group.video.true_changes_T, group.video.j_G).tolist()


TERMS = {f.name: globals()[f.name] for f in fields(TermWeights) if f.name in globals()}
MAXIMA = dict.fromkeys(TERMS, 1.0) | {"segmentation_format": 2.0}
