"""Online difficulty and uncertainty, by hand."""

import json
import math

import pytest

from reward_service.difficulty import DifficultyConfig, OnlineDifficulty, success_rate, uncertainty


def test_the_first_group_starts_the_average_and_later_ones_move_it():
    online = OnlineDifficulty(DifficultyConfig(source="online", newest_weight=0.25))
    assert online.difficulty("a", None, 0.0) == 10 and online.difficulty("a", None, 1.0) == 1
    online.update("a", 0.0)
    assert online.rate("a", 1.0) == 0.25
    online.update("a", 1.0)
    assert online.rates == {"a": 0.25}
    assert online.difficulty("a", 9.0, 0.25) == 10 - 9 * 0.25  # a rating does not count
    assert online.difficulty("b", None, 0.5) == 5.5  # samples know nothing of each other


def test_reading_changes_nothing():
    online = OnlineDifficulty()
    online.update("a", 0.5)
    before = online.state_dict()
    online.difficulty("a", None, 1.0), online.difficulty("new", None, 1.0), online.rate("a", 0.0)
    assert online.state_dict() == before == {"rates": {"a": 0.5}}


@pytest.mark.parametrize(
    "source, rated, expected",
    [
        ("offline", 2.0, 2.0),
        ("offline", None, None),
        ("offline_then_online", 2.0, 2.0),
        ("offline_then_online", None, 5.5),
        ("online", 2.0, 5.5),
        ("online", None, 5.5),
        ("blend", 2.0, 0.75 * 5.5 + 0.25 * 2.0),
        ("blend", None, 5.5),
    ],
)
def test_sources(source, rated, expected):
    assert OnlineDifficulty(DifficultyConfig(source=source, online_weight=0.75)).difficulty("a", rated, 0.5) == expected


def test_the_state_survives_json_and_goes_on_the_same():
    one, other = OnlineDifficulty(), OnlineDifficulty()
    one.update("a", 1 / 3)
    one.update("video/ünï 7", 0.1)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for online in (one, other):
        online.update("a", 0.7)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("state", [{}, {"rates": [0.5]}, {"rates": {"a": 2}}, {"rates": {"a": "0.5"}}, {"rates": {"a": math.nan}}])
def test_a_foreign_state_is_refused(state):
    with pytest.raises(ValueError, match="rates"):
        OnlineDifficulty().load_state_dict(state)


def test_success():
    assert success_rate([0.5, 0.51, 1.0, 0.0], above=0.5) == 0.5
    with pytest.raises(ValueError, match="completions"):
        success_rate([], above=0.5)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="0..1"):
            OnlineDifficulty().update("a", bad)


def test_uncertainty_is_pixelthinks():
    """Per token 1 - (p1 - p2), the mean of it."""
    ln = math.log
    assert uncertainty([(ln(0.7), ln(0.2))]) == pytest.approx(0.5)
    assert uncertainty([(ln(0.7), ln(0.2)), (ln(0.2), ln(0.7))]) == pytest.approx(0.5)
    assert uncertainty([(0.0, -math.inf), (ln(0.5), ln(0.5))]) == pytest.approx(0.5)  # sure, then undecided
    assert uncertainty([]) == 0
    assert uncertainty([(1e-7, -math.inf)]) == 0  # a log-prob that rounding put above 0
