"""accuracy_iou=video, by hand: mean J of propagated masks over the annotated frames, object by object."""

import json

import numpy as np
import pytest

from reward_service import FrameTarget, MissingInput, RewardConfig, Target, TermWeights, score, score_group
from segmentation_service.masks import encode_rle

HW = (4, 10)
A, B = [0, 0, 3, 3], [5, 0, 8, 3]
ONLY_IOU = {name: 0.0 for name in ("think_format", "segmentation_format", "box_l1", "point", "negative_point", "no_repeat")}
GRADED = RewardConfig(accuracy_iou="video", iou_grading="graded", weights=TermWeights(**ONLY_IOU))
THRESHOLD = RewardConfig(accuracy_iou="video", weights=TermWeights(**ONLY_IOU))


def columns(first, last):
    """The mask of these columns, inclusive; 4 pixels a column."""
    mask = np.zeros(HW, bool)
    mask[:, first : last + 1] = True
    return mask


AWAY = np.zeros(HW, bool)


def target(boxes, frames):
    return Target(HW, boxes, frames={t: FrameTarget(masks=masks) for t, masks in frames.items()})


def answer(count):
    return f"<think>a</think><answer>{json.dumps([{'bbox_2d': A, 'point_2d': [1, 1]}] * count)}</answer>"


ONE = target([A], {2: [columns(0, 3)], 5: [columns(1, 4)], 9: [None]})


@pytest.mark.parametrize(
    "tracks, expected",
    [
        ({2: [columns(0, 3)], 5: [columns(1, 4)], 9: [AWAY]}, 1),
        ({2: [columns(0, 3)], 5: [columns(1, 4)], 9: [columns(9, 9)]}, 2 / 3),  # still drawn where the target is out of view
        ({2: [columns(0, 1)], 5: [AWAY], 9: [None]}, (1 / 2 + 0 + 1) / 3),  # lost on the way
        ({2: [columns(2, 5)], 5: [columns(1, 8)], 9: [AWAY]}, (2 / 6 + 4 / 8 + 1) / 3),
        ({2: [AWAY], 5: [AWAY], 9: [AWAY]}, 0),  # never found: the frame without the target does not pay
    ],
)
def test_one_object(tracks, expected):
    tracks |= {3: [columns(0, 9)]}  # frames that are not annotated do not count
    assert score(answer(1), ONE, GRADED, length=0, predicted_masks=tracks).terms["iou"] == pytest.approx(expected)
    assert score(answer(1), ONE, THRESHOLD, length=0, predicted_masks=tracks).terms["iou"] == float(expected > 0.5)
    rles = {t: [mask if mask is None else encode_rle(mask) for mask in masks] for t, masks in tracks.items()}
    assert score(answer(1), ONE, GRADED, length=0, predicted_masks=rles).terms["iou"] == pytest.approx(expected)


def test_objects_are_matched_over_the_whole_video_and_shared_among_the_larger_number():
    # On frame 0 both predictions fit A; only the rest of the video tells which is which.
    truth = target([A, B], {0: [columns(0, 3), columns(5, 8)], 1: [columns(0, 3), columns(5, 8)], 2: [None, columns(5, 8)]})
    tracks = {0: [columns(0, 3), columns(0, 3)], 1: [columns(5, 8), columns(0, 3)], 2: [columns(5, 8), None]}
    two = score(answer(2), truth, GRADED, length=0, predicted_masks=tracks)
    assert two.terms["iou"] == pytest.approx(((0 + 1 + 1) / 3 + 1) / 2)
    three = {t: [*masks, columns(9, 9)] for t, masks in tracks.items()}
    assert score(answer(3), truth, GRADED, length=0, predicted_masks=three).terms["iou"] == pytest.approx((2 / 3 + 1) / 3)
    group = score_group([answer(2), answer(0), answer(3)], truth, GRADED, lengths=[0] * 3, predicted_masks=[tracks, None, three])
    assert [s.terms["iou"] for s in group] == pytest.approx([5 / 6, 0, 5 / 9])


def test_an_empty_target():
    nothing = target([], {0: []})
    assert score("<think>a</think><answer>[]</answer>", nothing, GRADED, length=0, predicted_masks={0: []}).terms["iou"] == 1
    assert score(answer(1), nothing, GRADED, length=0, predicted_masks={0: [columns(0, 3)]}).terms["iou"] == 0


@pytest.mark.parametrize("text", [answer(1), answer(0), ""])
@pytest.mark.parametrize(
    "truth, given, message",
    [
        (ONE, None, "accuracy_iou=video. needs SAM2's masks: pass predicted_masks"),
        (Target(HW, [A]), {}, "needs target.frames"),
        (Target(HW, [A], frames={0: FrameTarget([A])}), {0: [AWAY]}, r"needs masks in target.frames\[0\]"),
    ],
)
def test_a_missing_input_is_an_error_whatever_the_completion(truth, given, message, text):
    with pytest.raises(MissingInput, match=message):
        score(text, truth, GRADED, length=0, predicted_masks=given)


@pytest.mark.parametrize(
    "truth, given, message",
    [
        (ONE, {2: [AWAY], 5: [AWAY]}, "lacks frame 9"),
        (ONE, {2: [AWAY], 5: [AWAY] * 2, 9: [AWAY]}, r"predicted_masks\[5\] has 2 masks for an answer of 1 objects"),
        (ONE, {2: [AWAY], 5: [np.zeros((5, 5), bool)], 9: [AWAY]}, r"\(5, 5\)"),
        (target([A], {2: [AWAY, AWAY]}), {2: [AWAY]}, "for each of the 1 objects"),
        (target([A], {2: AWAY}), {2: [AWAY]}, "for each of the 1 objects"),  # a union does not tell objects apart
    ],
)
def test_inputs_that_do_not_fit(truth, given, message):
    with pytest.raises(ValueError, match=message):
        score(answer(1), truth, GRADED, length=0, predicted_masks=given)
    with pytest.raises(ValueError, match="lacks frame"):
        score_group([answer(1)], ONE, GRADED, lengths=[0], predicted_masks=[None])
