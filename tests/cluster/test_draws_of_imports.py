"""Imported data in training: images are drawn as videos of one frame, boxes do without masks, and hidden truth is never drawn."""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster import config, config_resolve
from cluster.draws import Draws
from cluster.errors import DataError
from cluster.evaluation import held_out_metrics
from cluster.scoring import score_group
from reward_service.target import MissingInput
from rollout.completion import Completion
from rollout.importers.driver import import_data
from rollout.prompts import PromptBuilder
from segmentation_service.geometry import to_policy_units
from segmentation_service.masks import decode_rle, mask_iou
from segmentation_service.segmenter import Segmenter
from tests.conftest import TOY

sys.path.insert(0, str(Path(__file__).parent.parent / "rollout"))
import miniatures


@pytest.fixture(scope="module")
def settings():
    where = [f"policy.path={TOY / 'policy'}", f"segmentation.checkpoint={TOY / 'sam2'}", "reward.accuracy_iou=box"]
    return config_resolve.resolve(config.load("debug", where), config_resolve.detect_hardware())


@pytest.fixture(scope="module")
def draws_of(settings, tmp_path_factory):
    builder = PromptBuilder(settings.policy.path, settings.prompt)

    def build(kind, make, split):
        root = tmp_path_factory.mktemp(kind)
        make(root / "source")
        import_data(kind, root / "source", root / "out", [split], progress=lambda line: None)
        return Draws(str(root / "out" / split), builder, settings.data, seed=0)

    return build


def right_answer(draw):
    prompt = draw.prompt
    boxes = np.asarray(to_policy_units(draw.target.boxes_N4(), prompt.units, prompt.policy_hw, prompt.frame_hw)).tolist()
    text = f"<think>so</think><answer>{json.dumps([{'bbox_2d': b, 'point_2d': b[:2]} for b in boxes])}</answer>"
    return Completion(np.zeros(3, np.int32), np.zeros(3, np.float32), text, "stop", (("0", 3),), 0)


def test_boxes_without_masks(draws_of, settings):
    draws = draws_of("visionreasoner", miniatures.visionreasoner, "train")
    draws.check_videos(seconds=60)
    with pytest.raises(DataError, match="2 of 2 episodes looked at have boxes and points but no masks, and the reward needs masks"):
        draws.check_masks(settings.reward)
    reward = replace(settings.reward, weights=replace(settings.reward.weights, negative_point=0.0))
    draws.check_masks(reward)
    for draw in draws.held_out(2)[0]:
        group = asyncio.run(score_group(draw, [right_answer(draw)], [1], reward, None))
        assert group.box_ious == pytest.approx((1,)) and group.failure is None and group.mask_ious == ()
        assert draw.target.masks is None and draw.prompt.target_frame == 0 and len(draw.video) == 1
        with pytest.raises(MissingInput, match="needs target.masks"):
            draw.target.masks_NHW("iou")


def test_an_image_with_masks(draws_of):
    draw = draws_of("reasonseg", miniatures.reasonseg, "train").train(0)
    assert np.array_equal(draw.video.frame(0), draw.frame) and draw.target.masks.shape == (1, *miniatures.HW)


def test_ignored_pixels_of_an_image_are_in_no_reward(draws_of, settings):
    """The region to ignore lies in the middle of a red target, and the toy SAM2's mask covers some of both."""

    def red(root):
        miniatures.reasonseg(root)
        frame_HW3 = np.full((*miniatures.HW, 3), 60, np.uint8)
        frame_HW3[2:16, 2:21] = (225, 45, 45)
        Image.fromarray(frame_HW3).save(root / "ReasonSeg/train/a_1.jpg", quality=95)

    draw, segmenter = draws_of("reasonseg", red, "train").train(0), Segmenter(settings.segmentation.checkpoint, device="cpu")

    async def segment(frame_HW3, hypotheses):
        return segmenter.segment_group(frame_HW3, hypotheses)

    async def propagate(video, target_frame, masks, frames):
        return [{target_frame: of_answer} for of_answer in masks]

    weights = replace(settings.reward.weights, negative_point=0.0, mask_iou=1.0, video_quality=1.0)
    gradings = dict.fromkeys(("iou_grading", "mask_iou_grading", "video_quality_grading"), "graded")
    reward = replace(settings.reward, weights=weights, accuracy_iou="mask", video_measure="j", **gradings)
    group = asyncio.run(score_group(draw, [right_answer(draw)], [1], reward, segment, propagate))
    predicted_HW, (true_HW,) = decode_rle(group.masks[0][0]), draw.target.masks
    label_HW = np.where(draw.episode.ignored(0), 255, true_HW.astype(int))  # as the file paints it
    iou = np.sum(predicted_HW & (label_HW == 1)) / np.sum((predicted_HW | (label_HW == 1)) & (label_HW != 255))
    assert iou > mask_iou(predicted_HW, true_HW) > 0.1
    assert group.mask_ious == group.video_ious == pytest.approx((iou,)) and held_out_metrics([group])["iou/mask"] == pytest.approx(iou)
    assert [group.scores[0].terms[name] for name in ("iou", "mask_iou", "video_quality")] == pytest.approx([iou] * 3)


def test_hidden_truth_is_never_drawn(draws_of):
    with pytest.raises(DataError, match="no episode has a frame in which its target can be seen"):
        draws_of("mevis", miniatures.mevis, "valid")
