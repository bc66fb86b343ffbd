"""Imported data in training: images are drawn as videos of one frame, boxes do without masks, and hidden truth is never drawn."""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster import config, config_resolve
from cluster.draws import Draws
from cluster.errors import DataError
from cluster.scoring import score_group
from reward_service.target import MissingInput
from rollout.engine import Completion
from rollout.importers.driver import import_data
from rollout.prompts import PromptBuilder
from segmentation_service.geometry import to_policy_units
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


def test_hidden_truth_is_never_drawn(draws_of):
    with pytest.raises(DataError, match="no episode has a frame in which its target can be seen"):
        draws_of("mevis", miniatures.mevis, "valid")
