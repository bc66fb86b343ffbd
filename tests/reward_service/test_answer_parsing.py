"""Parsing: strict about what may earn reward, robust about everything else."""

import json

import pytest

from reward_service import parse_answer
from reward_service.answer import AnswerObject
from reward_service.parsing import MAX_NEGATIVE_POINTS, MAX_OBJECTS

BOX, POINT = [10, 20, 30, 40], [15, 25]


def completion(answer, think="I see it."):
    return f"<think>{think}</think><answer>{answer if isinstance(answer, str) else json.dumps(answer)}</answer>"


def test_the_form_that_is_asked_for():
    answer = parse_answer(completion([{"bbox_2d": BOX, "point_2d": POINT, "negative_point_2d": [40, 50]}]))
    assert answer.think_format and answer.strict and answer.well_formed
    assert answer.objects == (AnswerObject((10, 20, 30, 40), ((15, 25),), ((40, 50),), 0),)
    assert (answer.n_items, answer.segmentation_format) == (1, 2.0)
    assert answer.objects[0].point == (15, 25)


@pytest.mark.parametrize(
    "items, format_score, objects",
    [
        ([], 0.0, 0),
        ([{"bbox_2d": BOX, "point_2d": POINT}, {"bbox_2d": BOX}], 1.5, 2),
        ([{"bbox_2d": BOX}], 1.0, 1),
        ([{"point_2d": POINT}], 1.0, 1),
        ([{"point_2d": POINT, "bbox_2d": [1, 2, 3]}], 1.0, 1),
        ([{"bbox_2d": [1, 2, 3, 4, 5], "point_2d": [1]}], 0.0, 0),
        ([{"bbox_2d": ["10", 20, 30, 40]}], 0.0, 0),  # numeric strings are not numbers
        ([{"bbox_2d": [True, 20, 30, 40]}], 0.0, 0),  # nor are booleans
        ([{"bbox_2d": [float("nan"), 20, 30, 40]}], 0.0, 0),
        ([{"bbox_2d": [float("-inf"), 20, 30, 40]}], 0.0, 0),
        ([{"bbox_2d": [10**400, 20, 30, 40]}], 0.0, 0),
        ([{"bbox_2d": [1e9, 20, 30, 40]}], 0.0, 0),
        ([{"bbox_2d": [-999999999, 2.5, 3e8, 4]}], 1.0, 1),  # huge, negative and broken numbers are legal below 1e9
        ([{"bbox_2d": [[10], 20, 30, 40], "point_2d": {"x": 1}}], 0.0, 0),
        ([{"bbox_2d": None}, 5, "bbox_2d", None, ["bbox_2d"], {}], 0.0, 0),
        ([{"bbox_2d": BOX, "point_2d": POINT}, 5], 1.0, 1),
        ([{"bbox": BOX, "points_1": POINT}], 0.0, 0),  # another format's keys earn nothing here
        ([{"bbox_2d": [30, 40, 10, 20]}], 1.0, 1),  # reversed corners are well-formed; they overlap nothing
    ],
)
def test_strict_items(items, format_score, objects):
    answer = parse_answer(completion(items))
    assert answer.strict and answer.n_items == len(items)
    assert answer.segmentation_format == pytest.approx(format_score)
    assert len(answer.objects) == objects


@pytest.mark.parametrize(
    "given, kept",
    [
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3, 4]], ((1, 2), (3, 4))),
        ([[1, 2], [3], "x", [True, 1], [5, 6]], ((1, 2), (5, 6))),
        ([], ()),
        (None, ()),
        ("near", ()),
        ([1, 2, 3], ()),
        ([[i, i] for i in range(500)], tuple((i, i) for i in range(MAX_NEGATIVE_POINTS))),
    ],
)
def test_negative_points(given, kept):
    answer = parse_answer(completion([{"bbox_2d": BOX, "negative_point_2d": given}]))
    assert answer.objects[0].negative_points == kept
    assert answer.segmentation_format == 1.0  # they have no part in the format


def test_the_last_of_duplicate_keys_counts():
    answer = parse_answer(completion('[{"bbox_2d": [1,2,3,4], "bbox_2d": "gone"}]'))
    assert answer.strict and not answer.objects


def test_many_boxes_are_counted_and_cut():
    answer = parse_answer(completion([{"bbox_2d": BOX, "point_2d": POINT}] * 10_000))
    assert answer.n_items == 10_000 and len(answer.objects) == MAX_OBJECTS and answer.segmentation_format == 2.0


GOOD = '[{"bbox_2d": [10, 20, 30, 40], "point_2d": [15, 25]}]'


@pytest.mark.parametrize(
    "text",
    [
        completion(f"```json\n{GOOD}\n```"),
        completion(f"Here it is: {GOOD} as asked."),
        completion('{"bbox_2d": [10, 20, 30, 40], "point_2d": [15, 25]}'),  # an object, not a list
        f"<think>a</think><answer>{GOOD}",  # never closed
        f"<think>a</think><answer>{GOOD[:-1]}, {{\"bbox",  # cut off
        f"<think>a [1] b</think>{GOOD}",  # no tags
        f"```json\n{GOOD}\n```",
        GOOD,
        completion('{"bbox": [10, 20, 30, 40], "points_1": [15, 25]}'),  # Seg-Zero
        completion('{"keyframe_timestamp": 3, "bbox_2d_list": [[10, 20, 30, 40]]}'),  # Veason-R1
        completion('{"time": 1.5, "boxes": [10, 20, 30, 40], "positive_points": [[15, 25]], "negative_points": [[1, 2]]}'),
    ],
)
def test_salvaged_objects_reach_the_segmenter_and_earn_nothing(text):
    answer = parse_answer(text)
    assert not answer.strict and not answer.well_formed and answer.segmentation_format == 0.0
    assert answer.objects[0].box == (10, 20, 30, 40)


def test_the_other_formats_keep_their_parts():
    one = parse_answer(completion('{"bbox": [1,2,3,4], "points_1": [1,2], "points_2": [3,4]}'))
    assert one.objects[0].points == ((1, 2), (3, 4))
    named = parse_answer(completion('{"keyframe_timestamp": 3, "bbox_2d_list": [[1,2,3,4], "x", [5,6,7,8]]}'))
    assert named.keyframe == 3 and [o.item for o in named.objects] == [0, 2]
    assert parse_answer(completion('[{"frame_idx": 7, "object description": "the dog"}]')).keyframe is None  # strict list
    thinker = parse_answer(completion('{"time": 1.5, "boxes": [1,2,3,4], "positive_points": [[1,2]], "negative_points": [[5,6]]}'))
    assert thinker.keyframe == 1.5 and thinker.objects[0].negative_points == ((5, 6),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\ud800\U0010ffff",
        completion("not JSON"),
        completion("null"),
        completion("[" * 100_000),
        completion("[" * 100_000 + "]" * 100_000),
        completion('{"a":' * 50_000),
        completion("[" + "9" * 5_000 + "]"),
        completion("[1e999999]"),
        "<answer>" * 1000,
        "<think>" + "</answer>",
    ],
)
def test_nothing_in_a_text_raises(text):
    answer = parse_answer(text)
    assert answer.objects == ()


def test_only_text_is_a_completion():
    with pytest.raises(TypeError, match="bytes"):
        parse_answer(b"<think>")


def test_units_are_converted_once():
    text = completion([{"bbox_2d": [14, 28, 56, 84], "point_2d": [28, 42], "negative_point_2d": [[0, 0], [112, 112]]}, {"point_2d": [7, 7]}])
    answer = parse_answer(text).to_frame("pixels", policy_hw=(112, 112), frame_hw=(240, 320))
    assert answer.objects[0].box == pytest.approx((40, 60, 160, 180))
    assert answer.objects[0].points[0] == pytest.approx((80, 90))
    assert answer.objects[0].negative_points == (pytest.approx((0, 0)), pytest.approx((320, 240)))
    assert answer.objects[1].box is None and answer.objects[1].point == pytest.approx((20, 15))
    assert answer.answered[0].box == (14, 28, 56, 84) and answer.units_hw == (112, 112)
    with pytest.raises(ValueError, match="already"):
        answer.to_frame("pixels", (112, 112), (240, 320))


def test_relative_units():
    answer = parse_answer(completion([{"bbox_2d": [500, 250, 1000, 1000]}])).to_frame("relative_1000", (112, 112), (240, 320))
    assert answer.objects[0].box == pytest.approx((160, 60, 320, 240))
    assert answer.units_hw == (1000, 1000) and answer.policy_hw == (112, 112)
    with pytest.raises(ValueError, match="units"):
        parse_answer("").to_frame("percent", (1, 1), (1, 1))
    assert parse_answer("").to_frame("pixels", (2, 2), (4, 4)).objects == ()
