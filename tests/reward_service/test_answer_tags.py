"""Tags: equal to the published regular expressions, and linear where those are not."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service import tags

PIECES = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "\u2003", "{", "}", "{}", "a", "[1]", "<", "</answer"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def group(pattern, text):
    match = re.search(pattern, text, re.DOTALL)
    return match.group(match.re.groups) if match else None


@settings(max_examples=500, deadline=None)
@given(TEXT)
def test_equal_to_the_published_patterns(text):
    full = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL)
    assert tags.has_think_format(text) == bool(full)
    assert tags.first_answer(text) == group(r"<answer>\s*(.*?)\s*</answer>", text)
    assert tags.first_answer_object(text) == group(r"<answer>\s*(\{.*?\})\s*</answer>", text)
    assert tags.first_braces(text) == group(r"{[^}]+}", text)


@pytest.mark.parametrize(
    "text, reasoning",
    [
        ("<think>one two</think><answer>[]</answer>", "one two"),
        ("one two</think><answer>[]</answer>", "one two"),  # the chat template opened the block
        ("<think>one two", "one two"),  # cut off: it still costs
        ("<think>one two<answer>[]</answer>", "one two"),
        ("<think>one</think>x<think>two</think>", "one"),
        ("</think><think>one</think>", "one"),
        ("<think></think>", ""),
        ("<answer>[]</answer>", ""),
        ("no tags at all", ""),
        ("", ""),
    ],
)
def test_think_span(text, reasoning):
    start, end = tags.think_span(text)
    assert text[start:end] == reasoning == tags.think_text(text)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>the <answer>x</answer> tag</think> <answer>[1]</answer>", "[1]"),  # thinking of the tags is allowed
        ("<answer>[1]</answer><answer>[2]</answer>", "[1]"),
        ("<think>a</think>so<answer>[1]</answer>", "[1]"),
        ("<think>a</think><answer>[1", "[1"),
        ("<think>a</think>", ""),
    ],
)
def test_answer_region(text, answer):
    start, end, closed = tags.answer_region(text)
    assert text[start:end] == answer
    assert closed == (answer.endswith("]"))


GARBAGE = {
    "open braces": "{",
    "empty braces": "{}",
    "spaces in an answer": "<answer>" + " " * 40,
    "answers that open": "<answer>{",
    "thoughts that close": "</think>   ",
    "closing braces": "} ",
    "half tags": "</answer",
    "thoughts that open": "<think>",
}


@pytest.mark.parametrize("unit", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("wrap", ["{}", "<think>{}</answer>", "<answer>{}", "<answer>{{{}"])
def test_work_is_linear(monkeypatch, unit, wrap):
    """Counts the characters that the searches for tags look at; the patterns may not backtrack at all."""
    patterns = [value.pattern for value in vars(tags).values() if isinstance(value, re.Pattern)]
    assert len(patterns) == 3 and all(p.count("*") == p.count("*+") == 1 for p in patterns)
    looked_at = 0

    def find(text, what, start=0):
        nonlocal looked_at
        at = text.find(what, start)
        looked_at += (at if at >= 0 else len(text)) - start + len(what)
        return at

    monkeypatch.setattr(tags, "_find", find)
    for size in (2_000, 8_000):
        text = wrap.format(unit * (size // len(unit)))
        for scan in (tags.has_think_format, tags.first_answer, tags.first_answer_object, tags.first_braces,
                     tags.answer_region, tags.think_span):
            looked_at = 0
            scan(text)
            assert looked_at <= 12 * len(text) + 200, scan.__name__
