"""Which difficulty a group is scored with: its episode's rating, or what its own success makes of it."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest

from cluster import config, config_resolve
from cluster.draws import Draws
from cluster.errors import ConfigError
from cluster.scoring import score_group
from reward_service.difficulty import DifficultyConfig, OnlineDifficulty
from rollout.completion import Completion
from tests.conftest import TOY


@pytest.fixture(scope="module")
def draw(toy_data):
    where = [f"data.train={toy_data / 'train'}", f"data.evaluation={toy_data / 'valid_u'}", "data.generate=null"]
    settings = config.load("debug", [f"policy.path={TOY / 'policy'}", f"segmentation.checkpoint={TOY / 'sam2'}", "reward.accuracy_iou=box", *where])
    settings = config_resolve.resolve(settings, config_resolve.detect_hardware())
    return Draws.of_run(settings)[0].train(0), settings.reward


def answers(draw, right, wrong, top_logprobs=None):
    """Completions that name exactly the true boxes, and others far from them."""
    from segmentation_service.geometry import to_policy_units

    def completion(boxes):
        items = [{"bbox_2d": box, "point_2d": box[:2]} for box in boxes]
        text = f"<think>so</think><answer>{json.dumps(items)}</answer>"
        return Completion(np.zeros(3, np.int32), np.zeros(3, np.float32), text, "stop", (("0", 3),), 0, top_logprobs)

    prompt = draw.prompt
    true = np.asarray(to_policy_units(draw.target.boxes_N4(), prompt.units, prompt.policy_hw, prompt.frame_hw)).tolist()
    return [completion(true)] * right + [completion([[0, 0, 1, 1]] * len(true))] * wrong


def scored(draw_and_reward, right, wrong, online):
    draw, reward = draw_and_reward
    completions = answers(draw, right, wrong)
    return asyncio.run(score_group(draw, completions, [60] * len(completions), reward, None, online=online))


def test_without_an_estimate_the_rating_counts(draw):
    group = scored(draw, 3, 1, None)
    assert group.difficulty == draw[0].episode.difficulty and group.success_rate is None


def test_the_groups_own_success_sets_its_budget(draw):
    online = OnlineDifficulty(DifficultyConfig(source="online"))
    easy, hard = scored(draw, 4, 0, online), scored(draw, 0, 4, online)
    assert (easy.difficulty, easy.difficulty_class, easy.success_rate) == (1, "easy", 1)
    assert (hard.difficulty, hard.difficulty_class, hard.success_rate) == (10, "hard", 0)
    assert [s.diagnostics["budget"] for s in (easy.scores[0], hard.scores[0])] == pytest.approx([9.6, 25.6])  # the debug recipe's tenth of 96 and 256
    assert easy.scores[0].terms["length_penalty"] < hard.scores[0].terms["length_penalty"]
    assert online.rates == {}  # scoring takes nothing in; the loop does, once the step is learned


def test_earlier_groups_count(draw):
    online = OnlineDifficulty(DifficultyConfig(source="online", newest_weight=0.5))
    online.update(draw[0].episode.episode_id, 0.0)
    assert scored(draw, 4, 0, online).difficulty == 5.5


def test_uncertainty_widens_the_hard_budget_only(draw):
    """PixelThink: 25 words more at uncertainty 1; here 0.5, from the two largest probabilities 0.7 and 0.2 of every token."""
    the_draw, reward = draw
    reward = dataclasses.replace(reward, length=dataclasses.replace(reward.length, uncertainty_scale=25.0, budget_scale=1.0))
    completions = answers(the_draw, 1, 0, np.log([[0.7, 0.2]] * 3))
    for success, budget in ((0.0, 256 + 12.5), (1.0, 96)):
        online = OnlineDifficulty(DifficultyConfig(source="online", newest_weight=0.01))
        online.update(the_draw.episode.episode_id, success)
        group = asyncio.run(score_group(the_draw, completions, [60], reward, None, online=online))
        assert group.uncertainties == pytest.approx([0.5])
        assert group.scores[0].diagnostics["budget"] == pytest.approx(budget)


@pytest.mark.parametrize("unit, used", [("think_tokens", 60), ("response_tokens", 3), ("think_words", 1), ("words", None)])
def test_what_is_counted_as_length(draw, unit, used):
    the_draw, reward = draw
    reward = dataclasses.replace(reward, length=dataclasses.replace(reward.length, unit=unit))
    completions = answers(the_draw, 1, 0)
    group = asyncio.run(score_group(the_draw, completions, [60], reward, None))
    assert group.scores[0].diagnostics["length"] == (len(completions[0].text.split()) if unit == "words" else used)


def test_success_by_masks_needs_masks():
    with pytest.raises(ConfigError, match="difficulty.success"):
        config.load("debug", ["difficulty.source=online", "difficulty.success=mask_iou", "reward.accuracy_iou=box"])
