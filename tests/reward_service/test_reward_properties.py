"""Whatever a policy writes: no exception, and no reward outside its bounds, for every preset."""

import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reward_service import FrameTarget, RewardConfig, Target, TermWeights, maximum, parse_answer, parsing, score, score_group
from reward_service.config import FORMULAS
from reward_service.presets import veason_r1, vision_reasoner

MASK = np.zeros((1, 84, 84), bool)
MASK[0, 10:20, 10:20] = True
ONE = Target((84, 84), [[10, 10, 19, 19]], [[[15, 15], [12, 12]]], masks=MASK, frames={0: FrameTarget([[10, 10, 19, 19]], MASK), 3: FrameTarget([None], [None])}, frame=0)
NOTHING = Target((84, 84), [], [], frames={0: FrameTarget([], [])})

NUMBERS = st.one_of(
    st.integers(-5, 90),
    st.floats(),
    st.sampled_from([10, 19, 15, True, None, "12", 2**31, 2**63, 2**64, 10**400, -(10**30), [1], {}, "1234"]),
)
LISTS = st.lists(NUMBERS, max_size=9) | st.just([10, 10, 19, 19]) | st.just([15, 15]) | st.lists(st.lists(NUMBERS, max_size=3), max_size=3)
KEYS = st.sampled_from(["bbox_2d", "point_2d", "negative_point_2d", "bbox", "points_1", "points_2", "bbox_2d_list", "keyframe_timestamp", "frame_idx", "é"])
VALUES = LISTS | NUMBERS | st.lists(LISTS, max_size=4)
ITEMS = st.dictionaries(KEYS, VALUES, max_size=5) | NUMBERS
PAYLOADS = st.one_of(st.lists(ITEMS, max_size=5), ITEMS).map(json.dumps) | st.text(max_size=30)
PIECES = st.one_of(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "a. ", "```json", "[", "{", "}"]), PAYLOADS)
PROPER = st.tuples(st.text(max_size=20), PAYLOADS).map(lambda t: f"<think>{t[0]}</think><answer>{t[1]}</answer>")
TEXTS = PROPER | st.lists(PIECES, max_size=10).map("".join) | st.text(max_size=60)


def masks_for(text, config):
    n = len(parse_answer(text).objects)
    if config.needs_video_masks:
        return {frame: [MASK[0]] * n for frame in (0, 3)}
    return np.repeat(MASK, n, axis=0) if config.needs_predicted_masks else None


def all_configs():
    yield from ((name, RewardConfig.preset(name)) for name in FORMULAS)
    graded = {f"{name}_grading": "graded" for name in ("iou", "box_l1", "point", "negative", "mask_iou")}
    yield "masks, graded", RewardConfig(accuracy_iou="mask", weights=TermWeights(mask_iou=1), **graded)
    yield "video", RewardConfig(accuracy_iou="video", **graded)
    yield "all", RewardConfig(accuracy_iou="video", weights=TermWeights(mask_iou=1, video_quality=1, temporal_consistency=1))
    yield "raw", RewardConfig(space="raw", no_repeat_scope="think")


@pytest.mark.parametrize("config", [c for _, c in all_configs()], ids=[n for n, _ in all_configs()])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, length=st.integers(0, 10_000), difficulty=st.none() | st.floats(0, 11), uncertainty=st.none() | st.floats(0, 1))
def test_bounds(config, text, length, difficulty, uncertainty):
    for target in (ONE, NOTHING):
        masks = masks_for(text, config)
        if target is NOTHING and config.needs_video_masks:
            masks = {0: [np.zeros((84, 84), bool)] * len(parse_answer(text).objects)}
        s = score(text, target, config, difficulty, uncertainty, length, masks)
        assert 0 <= s.total <= maximum(config) + 1e-9 and s.valid
        assert 0 <= s.terms["length_penalty"] <= 1
        assert all(v >= 0 for v in s.terms.values())


NEAR = st.tuples(st.sampled_from([[10, 10, 19, 19], [40.5, 40, 60, 60]]), st.lists(st.integers(-2, 2), min_size=4, max_size=4)).map(lambda t: [v + d for v, d in zip(*t)])
NUMBER = st.integers(-5, 90) | st.floats(0, 84) | st.floats() | st.sampled_from([True, 2**24, 2**31, 10**400])
BOXES = NEAR | st.lists(NUMBER, min_size=4, max_size=4) | st.lists(NUMBER, max_size=8)
OBJECTS = st.fixed_dictionaries({"bbox_2d": BOXES, "point_2d": st.lists(st.integers(8, 60), min_size=2, max_size=2) | st.lists(NUMBER, max_size=3)})
SAID = {
    "vision_reasoner": st.lists(OBJECTS, max_size=4),
    "veason_r1": st.fixed_dictionaries({"keyframe_timestamp": st.sampled_from([0, 0, 3, 7, "3"]), "bbox_2d_list": st.lists(BOXES, max_size=4)}),
    "revseg": st.lists(OBJECTS, max_size=2),
}
TWO = Target((84, 84), [[10, 10, 19, 19], [40, 40, 60, 60]], [[[15, 15]], [[50, 50]]], frames={0: FrameTarget([[10, 10, 19, 19], [40, 40, 60, 60]], [MASK[0]] * 2), 3: FrameTarget([None, [40, 40, 60, 60]], [None, MASK[0]])})  # fmt: skip


PARTS = st.sampled_from(["[", "]", "{", "}", ",", '"', "1", "0", "-", ".", "e9", "true", " ", "\n", "\x0c", "\x00", "\\", "\ufeff", "\ud800", "é"])
NAMED = st.sampled_from(['"bbox_2d":[1,2,3,4]', '"bbox_2d":[1,2,3,4.5]', '"point_2d":[1,2]', '"negative_point_2d":[0,1e2]', '"negative_point_2d":null'])
NAMED = NAMED | st.tuples(st.sampled_from(["bbox_2d", "bbox\\u005f2d", "point_2d", "negative_point_2d", "a"]), (VALUES | OBJECTS).map(json.dumps)).map(lambda t: '"%s":%s' % t)
LISTED = st.lists(st.lists(NAMED, max_size=4).map(lambda named: "{" + ", ".join(named) + "}") | st.just('{"bbox_2d":[1,2,3,4],"point_2d":[1,2]}'), max_size=4).map(", ".join)


@settings(max_examples=1000, deadline=None)
@given(LISTED, st.integers(0), st.text(max_size=3) | PARTS | NUMBERS.map(json.dumps))
@example('{"bbox_2d":[1,2,3,4],"point_2d":[1,2],"a":%s}' % ("9" * 4301), 0, "")
@example('{"bbox_2d":[1,2,3,4],"point_2d":[1,2],"negative_point_2d":[1,%s]}' % ("9" * 4301), 0, "")
@example('{"bbox_2d":[1,2,3,4],"point_2d":[1,%s]}' % ("[" * 3000 + "]" * 3000), 0, "")
@example('{"bbox_2d":[1,2,3,4],"point_2d":[-0,-0.0]}', 0, "")
@example('{"bbox_2d":[1,2,3,4],"point_2d":[0.1000000000000000055511151231257827021181583404541015625,2.2250738585072011e-308]}', 0, "")
@example('{"bbox_2d":[1,2,3,999999999],"point_2d":[-999999999.9999999,2]}, {"bbox_2d":[1,2,3,1e9],"point_2d":[1,2]}', 0, "")
@example(", ".join(['{"bbox_2d":[1,2,3,4],"point_2d":[1,2]}'] * 125), 0, "")
def test_perfect_answers_are_read_as_all_others(listed, at, inserted):
    """By the schema, then by json and our own checks: equal to the type of each number."""
    text = f"[{listed}]"
    at %= len(text) + 1
    text = f"<think></think><answer>{text[:at]}{inserted}{text[at:]}</answer>"
    found = parse_answer(text)
    with mock.patch.object(parsing, "_perfect_objects", lambda text: None):
        assert repr(vars(found)) == repr(vars(parse_answer(text)))


def test_the_form_that_is_asked_for_is_read_by_the_schema():
    said = [{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2.5]}, {"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2], "negative_point_2d": [5, 6]}]
    with mock.patch.object(parsing, "_decode", side_effect=AssertionError):
        assert len(parse_answer(f"<think></think><answer>{json.dumps(said)}</answer>").objects) == 2


@pytest.mark.parametrize("name", SAID)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_group_is_scored_as_each_answer_alone_would_be(name, data):
    """Alone, and in the dtype that numpy finds for the answer: the published arithmetic, of which the group's shared array must keep each bit."""
    config = RewardConfig.preset(name)
    config.space_size = data.draw(st.sampled_from([84, 840]))
    config.weights.video_iou = 0.0
    turn = '<think>a</think><answer>[{"frame_idx": 0}]</answer>' if name == "revseg" else ""
    texts = [f"{turn}<think>b</think><answer>{json.dumps(said)}</answer>" for said in data.draw(st.lists(SAID[name], min_size=1, max_size=4))]
    together = score_group(texts, TWO, config)
    with pytest.MonkeyPatch.context() as patch:
        for module in (vision_reasoner, veason_r1):
            patch.setattr(module, "all_plain", lambda rows, columns: False)
        assert [score(text, TWO, config).terms for text in texts] == [s.terms for s in together]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_empty_target_is_all_or_nothing(text):
    s = score(text, NOTHING, length=0)
    exact = s.answer.strict and s.answer.n_items == 0
    assert s.terms["iou"] == s.terms["box_l1"] == s.terms["point"] == float(exact)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(3)), drop=st.integers(0, 3))
def test_the_order_of_objects_does_not_matter(order, drop):
    boxes = [[10, 10, 19, 19], [30, 30, 49, 44], [60, 5, 70, 25]]
    target = Target((84, 84), boxes, [[[b[0] + 3, b[1] + 3]] for b in boxes])
    config = RewardConfig(weights=TermWeights(negative_point=0))
    items = [{"bbox_2d": boxes[i], "point_2d": [boxes[i][0] + 3, boxes[i][1] + 3]} for i in order][: 3 - drop]
    s = score(f"<think></think><answer>{json.dumps(items)}</answer>", target, config, length=0)
    assert s.terms["iou"] == s.terms["box_l1"] == s.terms["point"] == pytest.approx((3 - drop) / 3)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("unit", ["{", "[", "</think> ", "<answer>", "a.", '{"bbox_2d": [1,2,3,4], "point_2d": [1,2]},'])
def test_megabytes_of_garbage_are_scored(name, unit):
    config = RewardConfig.preset(name)
    text = f"<think>{unit * (1_000_000 // len(unit))}</answer>"
    masks = masks_for(text, config)
    assert score(text, ONE, config, length=0, predicted_masks=masks).total <= maximum(config)
