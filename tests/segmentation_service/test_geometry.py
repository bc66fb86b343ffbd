"""Properties of the coordinate conversions every package relies on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segmentation_service import geometry

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
units = st.sampled_from(geometry.UNITS)


def coordinates(last):
    number = st.floats(-1e4, 1e4, allow_nan=False)
    return st.lists(st.lists(number, min_size=last, max_size=last), min_size=0, max_size=5)


@settings(max_examples=100, deadline=None)
@given(coordinates(4), sizes, sizes)
def test_scaling_there_and_back_is_the_identity(boxes, from_hw, to_hw):
    there = geometry.scale_boxes(boxes, from_hw, to_hw)
    back = geometry.scale_boxes(there, to_hw, from_hw)
    np.testing.assert_allclose(back, np.reshape(boxes, (-1, 4)), rtol=1e-12, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.data(), sizes, sizes)
def test_integer_boxes_survive_any_resize(data, from_hw, to_hw):
    height, width = from_hw
    box = [data.draw(st.integers(0, limit - 1)) for limit in (width, height, width, height)]
    back = geometry.scale_boxes(geometry.scale_boxes(box, from_hw, to_hw), to_hw, from_hw)
    assert geometry.round_boxes(back, from_hw).tolist() == box


@settings(max_examples=100, deadline=None)
@given(coordinates(2), units, sizes, sizes)
def test_policy_units_there_and_back(points, unit, policy_hw, frame_hw):
    answer = geometry.to_policy_units(points, unit, policy_hw, frame_hw)
    back = geometry.from_policy_units(answer, unit, policy_hw, frame_hw)
    np.testing.assert_allclose(back, np.reshape(points, (-1, 2)), rtol=1e-12, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(coordinates(4), sizes)
def test_rounded_boxes_lie_in_the_frame_and_near_the_clipped_ones(boxes, hw):
    rounded = geometry.round_boxes(boxes, hw)
    assert rounded.dtype == np.int64
    assert (rounded >= 0).all() and (rounded <= np.array([hw[1], hw[0]] * 2) - 1).all()
    assert (np.abs(rounded - geometry.clip_boxes(boxes, hw)) <= 0.5).all()
    assert (geometry.round_boxes(rounded, hw) == rounded).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-50, 150), min_size=4, max_size=4), max_size=5), sizes, st.integers(1, 20))
def test_being_in_the_frame_does_not_depend_on_the_scale(boxes, hw, factor):
    larger = (hw[0] * factor, hw[1] * factor)
    before = geometry.boxes_in_frame(boxes, hw)
    assert (before == geometry.boxes_in_frame(geometry.scale_boxes(boxes, hw, larger), larger)).all()
    corners = np.reshape(np.array(boxes, dtype=float), (-1, 4))[:, :2]
    scaled = geometry.scale_points(corners, hw, larger)
    assert (geometry.points_in_frame(corners, hw) == geometry.points_in_frame(scaled, larger)).all()


def test_height_and_width_are_not_swapped():
    assert geometry.scale_points([10, 10], (100, 200), (200, 200)).tolist() == [10.0, 20.0]
    assert geometry.from_policy_units([1000, 500], "relative_1000", (7, 7), (96, 128)).tolist() == [128.0, 48.0]
    assert geometry.from_policy_units([0, 0, 112, 112], "pixels", (112, 112), (96, 128)).tolist() == [0, 0, 128, 96]
    assert geometry.clip_boxes([-5, -5, 500, 500], (96, 128)).tolist() == [0, 0, 127, 95]
    assert geometry.round_points([127.9, 95.9], (96, 128)).tolist() == [127, 95]


def test_halves_round_up():
    assert geometry.round_boxes([0.5, 1.5, 2.5, 3.4999], (10, 10)).tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize(
    "box, expected",
    [
        ([0, 0, 0, 0], True),  # corners are inclusive: one pixel
        ([5, 5, 5, 9], True),
        ([9, 5, 5, 9], False),  # inverted
        ([-9, 0, -1, 9], False),
        ([-9, 0, 0, 9], True),
        ([127, 0, 300, 9], True),
        ([128, 0, 300, 9], False),
        ([0, 96, 9, 99], False),
        ([float("nan"), 0, 9, 9], False),
        ([0, 0, float("inf"), 9], False),
    ],
)
def test_boxes_in_frame(box, expected):
    assert bool(geometry.boxes_in_frame(box, (96, 128))) is expected


def test_points_in_frame_include_the_far_edge():
    points = [[0, 0], [128, 96], [128.1, 5], [-0.1, 5], [float("nan"), 5]]
    assert geometry.points_in_frame(points, (96, 128)).tolist() == [True, True, False, False, False]


def test_shapes_are_kept_and_empty_lists_are_boxes():
    assert geometry.scale_boxes([], (10, 10), (20, 20)).shape == (0, 4)
    assert geometry.scale_points(np.zeros((2, 3, 2)), (10, 10), (20, 20)).shape == (2, 3, 2)
    assert geometry.from_policy_units([], "pixels", (10, 10), (20, 20)).shape == (0, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: geometry.scale_boxes([1, 2, 3], (10, 10), (20, 20)), r"shape \(3,\)"),
        (lambda: geometry.scale_points([1, 2], (0, 10), (20, 20)), r"\(0, 10\)"),
        (lambda: geometry.from_policy_units([1, 2], "percent", (10, 10), (20, 20)), "relative_1000.*'percent'"),
        (lambda: geometry.round_boxes([0, 0, float("nan"), 1], (10, 10)), "finite"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
