"""Hostile texts of every family of benchmarks/reward_growth.py: scored without an exception, within the maximum, by work and memory linear in them.

Counted, not timed: lines of our code that run, and bytes at the peak. The benchmark has the seconds.
"""

import sys

import numpy as np
import pytest
import reward_growth

from reward_service import maximum
from reward_service.config import FORMULAS
from reward_service.openrlhf_protocol import completion_of
from reward_service.presets.vision_reasoner import numbers

SCORERS = reward_growth.scorers()
TEXTS = dict(reward_growth.texts(3000))


def lines_run(call):
    """Lines of reward_service that run."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if "reward_service" not in frame.f_code.co_filename:
            return None
        lines += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("name", FORMULAS)
def test_hostile_texts_earn_no_more_than_the_maximum(name):
    most = maximum(reward_growth.without_masks(name))
    for family, text in TEXTS.items():
        found = SCORERS[name](text)
        assert found.valid and 0 <= found.total <= most, family


@pytest.mark.parametrize("name", SCORERS)
def test_lines_grow_linearly(name):
    """Four times the text, at most four times the lines."""
    small, large = dict(reward_growth.texts(1_000)), dict(reward_growth.texts(4_000))
    families = [f for f in small if "digits" not in f and "huge" not in f]  # one of these is as long as four
    for family in families[:: 2 if name == "parse_answer" else 8]:
        assert lines_run(lambda: SCORERS[name](large[family])) <= 4 * lines_run(lambda: SCORERS[name](small[family])) + 100, family


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("wrap", ["text beside 120 boxes", "text beside 120 boxes of one object", "boxes of one object", "list"])
def test_memory_is_linear(name, wrap):
    """NumPy makes every entry of an array as wide as its longest text: 120 boxes took 1,900 bytes for each character of one text among them."""
    text = reward_growth.WRAPS[wrap].format("a" * 50_000)
    assert reward_growth.peak_bytes(lambda: SCORERS[name](text)) < 100 * len(text)


def test_an_array_is_made_of_numbers_only():
    assert np.array_equal(numbers([[1, 2.5], [True, 4]]), [[1, 2.5], [1, 4]])
    for rows in ([["1", 2]], [[None, 2]], [[[1], 2]], [{"a": 1}], ["12"], [[1, 2], 3], [None]):
        with pytest.raises(TypeError):
            numbers(rows)


def test_a_hundred_thousand_end_tokens_are_cut():
    """Cutting them one by one from the text would copy gigabytes."""
    assert completion_of("the prompt" + "said" + "</s><eos>" * 50_000, "the prompt", ["</s>", "<eos>"]) == "said"
    assert completion_of("</s></s>", "</s>", ["</s>"]) == ""
