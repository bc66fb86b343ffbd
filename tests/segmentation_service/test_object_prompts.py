"""What becomes of prompts that leave the frame, and what counts as the same prompt."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segmentation_service import geometry
from segmentation_service.prompts import ObjectPrompt, clip_prompt

HW = (60, 100)
NAN = math.nan


def test_inside_prompts_are_left_alone():
    prompt = ObjectPrompt((3, 4, 50, 40), ((10, 10), (60, 5)), (1, 0))
    assert clip_prompt(prompt, HW) == prompt
    one_pixel = ObjectPrompt((5, 5, 5, 5))
    assert clip_prompt(one_pixel, HW) == one_pixel


@pytest.mark.parametrize(
    "prompt, expected",
    [
        (ObjectPrompt((-5, -5, 500, 500)), ObjectPrompt((0, 0, 99, 59))),
        (ObjectPrompt((-50, 0, -1, 10)), None),
        (ObjectPrompt((100, 0, 120, 10)), None),
        (ObjectPrompt((20, 10, 10, 20)), None),
        (ObjectPrompt((NAN, 0, 10, 10)), None),
        (ObjectPrompt((0, 0, math.inf, 10)), None),
        # A broken box is not rescued by a good point.
        (ObjectPrompt((200, 0, 220, 10), ((10, 10),), (1,)), None),
        # Points outside are left out; the far edge, which relative units can name, is the last pixel.
        (ObjectPrompt((0, 0, 9, 9), ((5, 5), (300, 5), (NAN, 5), (100, 60)), (1, 1, 0, 0)), ObjectPrompt((0, 0, 9, 9), ((5, 5), (99, 59)), (1, 0))),
        (ObjectPrompt(None, ((5, 5),), (1,)), ObjectPrompt(None, ((5, 5),), (1,))),
        (ObjectPrompt(None, ((-5, 5),), (1,)), None),
        (ObjectPrompt(None, ((5, 5),), (0,)), None),
        (ObjectPrompt(None), None),
    ],
)
def test_clipping(prompt, expected):
    assert clip_prompt(prompt, HW) == expected


number = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=150, deadline=None)
@given(
    st.none() | st.tuples(number, number, number, number),
    st.lists(st.tuples(st.tuples(number, number), st.integers(0, 1)), max_size=4),
)
def test_any_numbers_give_a_prompt_inside_the_frame_or_none(box, points):
    clipped = clip_prompt(ObjectPrompt(box, tuple(p for p, _ in points), tuple(label for _, label in points)), HW)
    if clipped is None:
        return
    assert clip_prompt(clipped, HW) == clipped
    if clipped.box is not None:
        assert geometry.boxes_in_frame(clipped.box, HW)
    assert geometry.points_in_frame(np.reshape(clipped.points, (-1, 2)), HW).all()


def test_lists_and_integers_compare_equal_to_tuples_and_floats():
    a = ObjectPrompt([1, 2, 3, 4], [[5, 6]], [1])
    b = ObjectPrompt((1.0, 2.0, 3.0, 4.0), ((5.0, 6.0),), (True,))
    assert a == b and hash(a) == hash(b) and pickle.loads(pickle.dumps(a)) == a
    assert ObjectPrompt(np.array([1, 2, 3, 4]), np.array([[5, 6]]), np.array([1])) == a


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((1, 2, 3),), r"\(1.0, 2.0, 3.0\)"),
        ((None, ((1, 2, 3),), (1,)), "points are"),
        ((None, ((1, 2),), ()), "1 points and 0 labels"),
        ((None, ((1, 2),), (2,)), r"labels are 1.*\(2,\)"),
    ],
)
def test_malformed_prompts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ObjectPrompt(*arguments)
