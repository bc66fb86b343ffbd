"""Soft length penalty: classes, budgets, factor."""

import pytest

from reward_service.config import LengthConfig, RewardConfig
from reward_service.length import budget, difficulty_class, penalty, used_length
from reward_service.target import MissingInput

OURS, PIXELTHINK = LengthConfig(), RewardConfig.preset("pixelthink").length


@pytest.mark.parametrize(
    "difficulty, name, ours, pixelthink",
    [
        (1, "easy", 96, 96),
        (3.4999, "easy", 96, 96),
        (3.5, "medium", 176, None),
        (4.9999, "medium", 176, None),
        (5, "hard", 256, 256),
        (10, "hard", 256, 256),
        (-3, "easy", 96, 96),
    ],
)
def test_classes_and_budgets(difficulty, name, ours, pixelthink):
    assert difficulty_class(difficulty, OURS) == name
    assert budget(difficulty, None, OURS) == ours and budget(difficulty, None, PIXELTHINK) == pixelthink


def test_budget_corners():
    assert budget(None, None, OURS) == 96  # unknown difficulty is 3.0
    assert budget(6, 0.4, PIXELTHINK) == 266 and budget(2, 0.4, PIXELTHINK) == 96
    assert budget(6, 0.4, OURS) == 256  # VideoSeg-R1 has no uncertainty
    assert budget(6, None, LengthConfig(budget_scale=0.125)) == 32
    with pytest.raises(ValueError, match="NaN"):
        budget(float("nan"), None, OURS)


@pytest.mark.parametrize(
    "used, allowed, s",
    [(0, 96, 1), (96, 96, 1), (97, 96, 0.998), (196, 96, 0.8), (596, 96, 0), (5000, 96, 0), (5000, None, 1)],
)
def test_penalty(used, allowed, s):
    assert penalty(used, allowed, OURS) == pytest.approx(s)


def test_floor_and_the_formula_as_written():
    assert penalty(5000, 96, LengthConfig(floor=0.3)) == 0.3
    assert penalty(1096, 96, LengthConfig(clamp=False)) == pytest.approx(-1.0)
    assert penalty(10, 0, LengthConfig(beta=0.05)) == 0.5


def test_what_is_counted():
    text = "<think>one two  three</think>\n<answer>[] []</answer>"
    assert used_length(text, 7, OURS) == 7
    assert used_length(text, None, LengthConfig(unit="words")) == 5
    assert used_length(text, None, LengthConfig(unit="think_words")) == 3
    with pytest.raises(MissingInput, match="think_tokens"):
        used_length(text, None, OURS)
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="length"):
            used_length(text, bad, OURS)
