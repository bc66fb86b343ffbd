"""iou, box_l1 and point of a group: all pairs of predicted and true objects at once, then one-to-one matching, answer by answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reward_service import matching, terms

if TYPE_CHECKING:
    from reward_service.group import Group

_NO_BOX, _NO_POINT = (np.nan,) * 4, (np.nan,) * 2


def accuracy(group: Group) -> tuple[dict[str, list[float]], list[float]]:
    """The active ones of iou, box_l1 and point, each with a value an answer, and the mean IoU of boxes matched by it, over max(M, N)."""
    target, weights, objects = group.target, group.config.weights, group.objects
    active = [name for name in ("iou", "box_l1", "point") if getattr(weights, name)]
    if not len(target):
        return dict.fromkeys(active, group.says_nothing), group.says_nothing
    pairs, box_iou_PN = _pairs(group, active)
    gain_PN = sum((getattr(weights, name) * pairs[k] for k, name in enumerate(active)), np.zeros_like(box_iou_PN))
    largest = np.array([max(a.n_items if a.strict else 0, len(target)) for a in group.answers])
    owner_P = np.repeat(np.arange(len(objects)), [len(mine) for mine in objects])
    values = _matched_means(gain_PN, pairs, owner_P, largest) if active else []
    return dict(zip(active, values)), _matched_means(box_iou_PN, box_iou_PN[None], owner_P, largest)[0]


def _matched_means(gain_PN, values_KPN, owner_P, largest_G) -> list[list[float]]:
    """For each of the K values its sum over the pairs that `gain` assigns over the `largest` number of objects, answer by answer."""
    rows, columns = matching.assign_each(gain_PN, owner_P)
    owners = owner_P[rows]
    return [(np.bincount(owners, one, len(largest_G)) / largest_G).tolist() for one in values_KPN[:, rows, columns]]


def _pairs(group: Group, active: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(len(active), P, N) values of every pair, P over all objects of the group, and the (P, N) box IoU."""
    target, config = group.target, group.config
    everyone = [one for mine in group.objects for one in mine]
    boxes = matching.rows_of([one.box or _NO_BOX for one in everyone], 4) * (group.to_answer * 2)
    true_boxes = target.boxes_N4() * (group.to_target * 2)
    box_iou = matching.box_iou_matrix(boxes, true_boxes)
    values = np.zeros((len(active), *box_iou.shape))
    for k, name in enumerate(active):
        if name == "iou":
            overlap = {"box": lambda: box_iou, "mask": lambda: _mask_pairs(group), "video": lambda: group.video.pairs_PN}[config.accuracy_iou]()
            values[k] = terms.above(overlap, config.iou_threshold, config.iou_grading)
        elif name == "box_l1":
            distance = matching.box_l1_matrix(boxes, true_boxes)
            values[k] = terms.below(distance, config.box_l1_threshold, config.box_l1_grading, config.graded_reach)
        else:
            points = matching.rows_of([one.point or _NO_POINT for one in everyone], 2) * group.to_answer
            distance = matching.point_distance_matrix(points, target.points_N2() * group.to_target)
            near = terms.below(distance, config.point_threshold, config.point_grading, config.graded_reach)
            values[k] = near * matching.point_in_own_box(points, boxes)[:, None]
    return values, box_iou


def _mask_pairs(group: Group) -> np.ndarray:
    true_masks = group.counted(group.target.masks_NHW("iou (accuracy_iou=mask)"))
    rows = [matching.mask_iou_matrix(group.counted(masks[: len(mine)]), true_masks) for mine, masks in zip(group.objects, group.masks)]
    return np.concatenate(rows)
