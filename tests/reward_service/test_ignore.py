"""Pixels to ignore are in no overlap of masks: by hand, as LISA's evaluation has it, and whatever lies in them changes nothing."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks import plain_measures
from reward_service import FrameTarget, RewardConfig, Target, TermWeights, score
from reward_service.score_request import ScoreRequest
from reward_service.serve_config import RewardServeConfig
from reward_service.service import RewardService
from segmentation_service.masks import encode_rle

HW = (4, 10)
A = [0, 0, 3, 3]
OFF = dict.fromkeys(("think_format", "segmentation_format", "box_l1", "point", "negative_point", "no_repeat"), 0.0)
masks = lambda *leading: arrays(bool, (*leading, *HW))


def config(accuracy_iou="mask", **weights):
    gradings = dict.fromkeys(("iou_grading", "mask_iou_grading", "video_quality_grading"), "graded")
    return RewardConfig(weights=TermWeights(**OFF | {"mask_iou": 1.0} | weights), accuracy_iou=accuracy_iou, **gradings)


def columns(first, last):
    mask = np.zeros(HW, bool)
    mask[:, first : last + 1] = True
    return mask


def answer(count):
    return f"<think>a</think><answer>{json.dumps([{'bbox_2d': A, 'point_2d': [1, 1]}] * count)}</answer>"


def earned(truth, predicted, **settings):
    terms = score(answer(1), truth, config(**settings), length=0, predicted_masks=predicted).terms
    return {name: value for name, value in terms.items() if not name.startswith("weighted")}


@pytest.mark.parametrize(
    "ignore, iou",
    [
        (None, 2 / 8),  # columns 2 and 3 of 0 to 7
        (columns(8, 9), 2 / 8),
        (columns(4, 6), 2 / 5),  # of 0 to 3, and 7
        (encode_rle(columns(3, 7)), 1 / 3),  # column 2 of 0 to 2
        ([columns(4, 5), encode_rle(columns(6, 7))], 2 / 4),
        (columns(2, 7), 0),
        (columns(0, 7), 1),  # nothing is left: J of two empty masks, and nothing to overlap for two objects
    ],
)
def test_by_hand(ignore, iou):
    found = earned(Target(HW, [A], masks=[columns(0, 3)], ignore=ignore), [columns(2, 7)])
    assert found["mask_iou"] == pytest.approx(iou) and found["iou"] == pytest.approx(0 if iou == 1 else iou)


@settings(max_examples=40, deadline=None)
@given(masks(), masks(), masks())
def test_it_is_lisas_label_255(predicted_HW, true_HW, ignore_HW):
    found = earned(Target(HW, [A], masks=[true_HW], ignore=ignore_HW), [predicted_HW])
    assert found["mask_iou"] == pytest.approx(plain_measures.giou_and_ciou([predicted_HW], [true_HW], [ignore_HW])[0], abs=2e-5)


@settings(max_examples=20, deadline=None)
@given(masks(3, 2), masks(3, 2), masks(3), masks(2), masks(2), st.sampled_from(["mask", "video"]))
def test_what_lies_in_it_changes_nothing(predicted_TNHW, true_TNHW, ignore_THW, noise_NHW, other_NHW, accuracy_iou):
    def terms(predicted_TNHW, true_TNHW):
        frames = {t: FrameTarget(masks=true_NHW, ignore=ignore_HW) for t, (true_NHW, ignore_HW) in enumerate(zip(true_TNHW, ignore_THW))}
        truth = Target(HW, [A, A], masks=true_TNHW[1], frames=frames, frame=1, ignore=ignore_THW[1])
        every_term = config(accuracy_iou, video_quality=1.0, temporal_consistency=1.0)
        return score(answer(2), truth, every_term, length=0, predicted_masks=dict(enumerate(predicted_TNHW))).terms

    inside_T1HW = ignore_THW[:, None]
    assert terms(predicted_TNHW, true_TNHW) == terms(predicted_TNHW ^ inside_T1HW & noise_NHW, true_TNHW ^ inside_T1HW & other_NHW)


def test_over_a_video_it_is_the_void_of_davis():
    rng = np.random.default_rng(5)
    predicted, true, ignore = rng.random((3, 4, 40, 60)) < 0.5
    ignore[2] = False
    frames = {t: FrameTarget(masks=[encode_rle(true[t])], ignore=encode_rle(ignore[t]) if ignore[t].any() else None) for t in range(4)}
    found = earned(Target((40, 60), [A], frames=frames, frame=0), {t: [predicted[t]] for t in range(4)}, accuracy_iou="video", mask_iou=0.0, video_quality=1.0)
    j, f = (np.mean([measure(*one) for one in zip(predicted, true, ignore)]) for measure in (plain_measures.jaccard, plain_measures.boundary_f))
    assert found["iou"] == pytest.approx(j) and found["video_quality"] == pytest.approx((j + f) / 2)


def test_by_http_and_where_it_does_not_fit():
    ignore = encode_rle(columns(4, 6))
    item = {
        "completion": answer(1),
        "target": {"image_size": HW, "boxes": [A], "masks": [encode_rle(columns(0, 3))], "ignore": ignore, "frames": {3: {"masks": [None], "ignore": ignore}}},
        "predicted_masks": [encode_rle(columns(2, 7))],
        "length": 0,
    }
    wrong = item | {"target": item["target"] | {"ignore": encode_rle(np.zeros((4, 9), bool))}}
    weights = OFF | {"mask_iou": 1.0, "iou": 0.0}
    asked = ScoreRequest(items=[item, wrong], reward={"weights": weights, "mask_iou_grading": "graded"})
    good, bad = asyncio.run(RewardService(RewardServeConfig()).score(asked)).scores
    assert good.terms["mask_iou"] == pytest.approx(2 / 5)
    assert bad.invalid and "target.ignore is (4, 9), the target frame is (4, 10) (height, width)" in bad.reason
    few = RewardServeConfig(max_mask_pixels=40 * 5)  # the frame, two masks and two to ignore
    assert asyncio.run(RewardService(few).score(asked)).scores[0] == good
    few = RewardServeConfig(max_mask_pixels=40 * 5 - 1)
    assert "200 pixels of masks and frame are more" in asyncio.run(RewardService(few).score(asked)).scores[0].reason
    with pytest.raises(ValueError, match=r"target.frames\[3\].ignore is \(2, 2\)"):
        Target(HW, [A], frames={3: FrameTarget(ignore=np.zeros((2, 2), bool))}).ignored_HW(3)
