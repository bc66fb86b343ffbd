"""RewardConfig: documented fields, early errors, presets."""

from dataclasses import fields, is_dataclass

import pytest

import reward_service
from reward_service import LengthConfig, RewardConfig, TermWeights, maximum
from reward_service.config import FORMULAS


NONE = {f.name: 0.0 for f in fields(TermWeights)}


def leaves(cls, path=""):
    for f in fields(cls):
        value = f.default_factory() if callable(f.default_factory) else f.default
        if is_dataclass(value):
            yield from leaves(type(value), f"{path}{f.name}.")
        else:
            yield f"{path}{f.name}", f


@pytest.mark.parametrize("path, f", list(leaves(RewardConfig)), ids=lambda v: v if isinstance(v, str) else "")
def test_every_field_says_what_it_is_and_where_from(path, f):
    assert f.metadata["help"] and "\n" not in f.metadata["help"] and f.metadata["source"]
    assert not isinstance(f.default, str) or f.default in f.metadata["choices"]


def test_defaults_are_the_preset_videoseg_r1():
    config = RewardConfig()
    assert config == RewardConfig.preset("videoseg_r1")
    assert (config.iou_threshold, config.box_l1_threshold, config.point_threshold, config.negative_reach) == (0.5, 10, 30, 40)
    assert (config.length.beta, config.length.unit, config.length.floor) == (0.002, "think_tokens", 0)
    assert config.accuracy_iou == "box" and not config.needs_predicted_masks and config.needs_length


@pytest.mark.parametrize(
    "name, most",
    [("videoseg_r1", 8), ("seg_zero", 5), ("vision_reasoner", 7), ("pixelthink", 5), ("veason_r1", 5), ("revseg", 3)],
)
def test_published_maxima(name, most):
    assert maximum(RewardConfig.preset(name)) == most


def test_needs():
    assert RewardConfig(accuracy_iou="mask").needs_predicted_masks
    assert not RewardConfig(accuracy_iou="mask", weights=TermWeights(iou=0)).needs_predicted_masks
    assert RewardConfig(weights=TermWeights(mask_iou=1)).needs_predicted_masks
    assert RewardConfig.preset("veason_r1").needs_video_masks
    assert RewardConfig(accuracy_iou="video").needs_video_masks and not RewardConfig(accuracy_iou="video").needs_predicted_masks
    assert not RewardConfig(accuracy_iou="video", weights=TermWeights(iou=0)).needs_video_masks
    assert RewardConfig(weights=TermWeights(video_quality=1)).video_terms == ("video_quality",)
    both = RewardConfig(accuracy_iou="video", weights=TermWeights(mask_iou=1, temporal_consistency=1))
    assert both.mask_terms == ("mask_iou",) and both.video_terms == ("temporal_consistency", "accuracy_iou=video")
    assert not RewardConfig.preset("pixelthink").needs_length and not RewardConfig(length=LengthConfig(penalty=False)).needs_length


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RewardConfig.preset("vision_reasonr"), "vision_reasoner"),
        (lambda: RewardConfig(formula="mine"), "reward.formula"),
        (lambda: RewardConfig(accuracy_iou="masks"), "reward.accuracy_iou.*'box', 'mask'"),
        (lambda: RewardConfig(video_measure="j&f"), "reward.video_measure='j&f': choose one of 'j', 'f', 'jf'"),
        (lambda: RewardConfig(iou_threshold=1.5), "reward.iou_threshold=1.5.*between 0.0 and 1.0"),
        (lambda: RewardConfig(iou_threshold=float("nan")), "iou_threshold"),
        (lambda: RewardConfig(weights=TermWeights(iou=-1)), "reward.weights.iou=-1"),
        (lambda: RewardConfig(length=LengthConfig(easy_below=6)), "hard_from=5.0"),
        (lambda: RewardConfig(weights=TermWeights(keyframe=1)), "keyframe.*no such term"),
        (lambda: RewardConfig(formula="vision_reasoner", weights=TermWeights(negative_point=0), iou_grading="graded"), "does not use"),
        (lambda: RewardConfig(formula="seg_zero"), "no such term"),
        (lambda: RewardConfig(formula="veason_r1", weights=TermWeights(**NONE | {"video_quality": 1})), "video_quality.*no such term.*video_iou"),
        (lambda: reward_service.scores, "it offers"),
    ],
)
def test_errors_name_the_key_and_the_remedy(make, message):
    with pytest.raises((ValueError, AttributeError), match=message):
        make()


def test_every_preset_is_its_own_formula():
    assert [RewardConfig.preset(name).formula for name in FORMULAS] == list(FORMULAS)


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, reward_service; print(sorted(m for m in sys.modules if m.split('.')[0] in ('numpy','torch','scipy','ray')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
