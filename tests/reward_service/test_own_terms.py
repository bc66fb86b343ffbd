"""Terms of one's own: added to any preset, weighted, multiplied by the length penalty, counted in the maximum; and what is refused."""

import pytest
from scored import COMPLETIONS, HEIGHT, MASKS, WIDTH

from cluster import config, config_resolve
from cluster.errors import ConfigError
from cluster.serve_command import load_reward_settings
from reward_service import RewardConfig, Target, maximum, score, score_group
from reward_service.config_values import reward_config
from reward_service.own_terms import OwnTerm

TARGET = Target((HEIGHT, WIDTH), boxes=[[10, 10, 29, 29]], points=[[[20, 20], [21, 20]]], masks=MASKS[:1])


def objects_share(answer, target):
    return min(1.0, len(answer.objects) / 4)


def iou(answer, target):
    return 1.0


def outside(answer, target):
    return 1.5


def words(answer, target):
    return "0.5"


not_a_function = 3


@pytest.mark.parametrize("preset", ["videoseg_r1", "seg_zero", "vision_reasoner", "pixelthink"])
def test_it_is_added_before_the_length_penalty(preset):
    base, own = RewardConfig.preset(preset), RewardConfig.preset(preset)
    own.own_terms = [OwnTerm(f"{__name__}:objects_share", 0.5)]
    before, after = (score_group(COMPLETIONS, TARGET, c, difficulty=2.0, lengths=[400.0] * len(COMPLETIONS)) for c in (base, own))
    shares = [min(1.0, len(b.answer.objects) / 4) for b in after]
    assert set(shares) >= {0.0, 0.25, 0.5}
    for a, b, share in zip(before, after, shares, strict=True):
        assert b.terms["objects_share"] == share and b.terms["weighted_objects_share"] == 0.5 * share
        assert b.total == pytest.approx((a.terms["original"] + 0.5 * share) * a.terms["length_penalty"])
    assert maximum(own) == maximum(base) + 0.5
    assert score(COMPLETIONS[0], TARGET, own, 2.0, length=400.0).total == after[0].total


@pytest.mark.parametrize(
    "function, said",
    [
        ("objects_share", "not of the form package.module:function"),
        ("no.such.module:f", "cannot be imported .No module named 'no'.; is its folder on PYTHONPATH"),
        (f"{__name__}:missing", "has no attribute 'missing'"),
        (f"{__name__}:not_a_function", "is no function"),
    ],
)
def test_a_function_that_is_not_there_is_said_before_anything_starts(function, said):
    """And not to who reads the settings for another reason, such as to evaluate or export a run that was trained elsewhere."""
    with pytest.raises(ValueError, match=f"own term .*{said}"):
        OwnTerm(function).check()
    with pytest.raises(ConfigError, match=f"reward.own_terms.*{said}"):
        here = config_resolve.detect_hardware()
        config_resolve.check_hardware(config_resolve.resolve(config.load("debug", [f"reward.own_terms=[{{function: '{function}'}}]"]), here), here)
    with pytest.raises(ConfigError, match=said):
        load_reward_settings(None, [f"reward.own_terms=[{{function: '{function}'}}]"])


def test_a_run_whose_term_is_elsewhere_can_be_read():
    assert config.load("debug", ["reward.own_terms=[{function: 'no.such.module:f'}]"]).reward.own_terms[0].name == "f"


def test_it_must_have_a_name_and_a_weight_of_its_own():
    term = OwnTerm(f"{__name__}:objects_share")
    with pytest.raises(ValueError, match="objects_share is the name of another term"):
        RewardConfig(own_terms=[term, term])
    with pytest.raises(ValueError, match="iou is the name of another term"):
        RewardConfig(own_terms=[OwnTerm(f"{__name__}:iou")])
    with pytest.raises(ValueError, match="weight -1 must be at least 0"):
        OwnTerm(f"{__name__}:objects_share", -1)


@pytest.mark.parametrize("function", [outside, words])
def test_what_it_gives_must_be_a_share(function):
    with pytest.raises(ValueError, match=f"{function.__name__} gave .* must be a number from 0 to 1"):
        score(COMPLETIONS[0], TARGET, RewardConfig(own_terms=[OwnTerm(f"{__name__}:{function.__name__}")]), length=1.0)


def test_a_request_cannot_name_code():
    with pytest.raises(ValueError, match="own_terms names code to run, which a request may not"):
        reward_config(None, {"own_terms": [{"function": "os:getcwd"}]}, RewardConfig())
    kept = RewardConfig(own_terms=[OwnTerm(f"{__name__}:objects_share")])
    assert reward_config(None, {"iou_threshold": 0.6}, kept).own_terms == kept.own_terms
