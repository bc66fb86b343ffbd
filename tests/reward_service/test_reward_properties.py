"""Whatever a policy writes: no exception, and no reward outside its bounds, for every preset."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service import FrameTarget, RewardConfig, Target, TermWeights, maximum, parse_answer, score
from reward_service.config import FORMULAS

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
