"""Terms, matching, distances: hand-computed tables."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service import matching, terms
from reward_service.distance import MaskDistance

NAN = float("nan")


def rows(*values):
    return np.array(values, dtype=float)


@pytest.mark.parametrize(
    "predicted, true, iou",
    [
        ([0, 0, 9, 9], [0, 0, 9, 9], 1.0),
        ([0, 0, 9, 9], [0, 0, 9, 4], 0.5),  # 50 / 100: corners are inclusive
        ([0, 0, 9, 9], [9, 9, 18, 18], 1 / 199),  # they share one pixel
        ([0, 0, 9, 9], [10, 0, 19, 9], 0.0),
        ([5, 5, 5, 5], [5, 5, 5, 5], 1.0),  # a single pixel
        ([5, 5, 5, 5], [5, 5, 6, 5], 0.5),
        ([9, 9, 0, 0], [0, 0, 9, 9], 0.0),  # reversed
        ([9, 0, 0, 9], [0, 0, 9, 9], 0.0),  # half reversed
        ([5, 5, 4, 4], [5, 5, 4, 4], 0.0),  # no area at all
        ([-100, -100, 100, 100], [0, 0, 9, 9], 100 / 201**2),
        ([NAN] * 4, [0, 0, 9, 9], 0.0),
        ([-1e9, -1e9, 1e9, 1e9], [0, 0, 9, 9], 100 / (2e9 + 1) ** 2),
        ([0.0, 0.0, 0.5, 1.0], [0, 0, 1, 1], 3 / 4),
    ],
)
def test_box_iou(predicted, true, iou):
    assert matching.box_iou_matrix(rows(predicted), rows(true))[0, 0] == pytest.approx(iou, abs=1e-15)


def test_box_l1_and_point_distance():
    l1 = matching.box_l1_matrix(rows([0, 0, 10, 10], [NAN] * 4), rows([0, 0, 10, 10], [4, 8, 10, 10]))
    assert l1.tolist() == [[0, 3], [np.inf, np.inf]]
    far = matching.point_distance_matrix(rows([0, 0], [NAN, NAN]), rows([3, 4], [0, 0]))
    assert far.tolist() == [[5, 0], [np.inf, np.inf]]


def test_point_in_own_box():
    points = rows([0, 0], [10, 10], [10.5, 5], [5, 5], [NAN, NAN], [5, 5])
    boxes = rows(*[[0, 0, 10, 10]] * 3, [10, 10, 0, 0], [0, 0, 10, 10], [NAN] * 4)
    assert matching.point_in_own_box(points, boxes).tolist() == [True, True, False, False, False, False]


def test_mask_iou_matrix():
    a, b, empty = np.zeros((3, 5, 70), bool)
    a[:2], b[1:3] = True, True
    assert matching.mask_iou_matrix(np.stack([a, empty]), np.stack([b, a, empty])).tolist() == [[1 / 3, 1, 0], [0, 0, 0]]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_assignment_is_the_best_of_all(m, n, seed):
    gain = np.random.default_rng(seed).integers(0, 4, (m, n)).astype(float)
    i, j = matching.assign(gain)
    assert len(i) == len(j) == min(m, n) == len(set(i.tolist())) == len(set(j.tolist()))
    wide = gain if m <= n else gain.T
    best = max(sum(wide[k, c] for k, c in enumerate(p)) for p in itertools.permutations(range(max(m, n)), min(m, n)))
    assert gain[i, j].sum() == best


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_assignments_of_a_group_are_those_of_each(sizes, n, values, seed):
    gain = np.random.default_rng(seed).integers(0, values, (sum(sizes), n)).astype(float)
    starts = np.cumsum([0, *sizes])
    each = [(i + start, j) for start, end in itertools.pairwise(starts) for i, j in [matching.assign(gain[start:end])]]
    rows, columns = matching.assign_each(gain, np.repeat(np.arange(len(sizes)), sizes))
    assert sorted(zip(rows, columns)) == sorted((i, j) for pairs in each for i, j in zip(*pairs))


def test_thresholds_are_strict():
    assert terms.above([0.5, 0.5000001, 1.0], 0.5, "threshold").tolist() == [0, 1, 1]
    assert terms.above([0.2, 0.7], 0.5, "graded").tolist() == [0.2, 0.7]
    assert terms.below([0, 9.99, 10, np.inf], 10, "threshold", 4).tolist() == [1, 1, 0, 0]
    assert terms.below([0, 10, 20, 40, 50, np.inf], 10, "graded", 4).tolist() == [1, 0.75, 0.5, 0, 0, 0]
    assert terms.below([0, 1], 0, "graded", 4).tolist() == [0, 0]


@pytest.mark.parametrize(
    "distances, value",
    [([], 0), ([0], 0), ([0.5], 1), ([40], 1), ([40.01], 0), ([np.inf], 0), ([0, 1, 40, 41], 0.5), ([1, 2, 3], 1)],
)
def test_negative_points(distances, value):
    assert negative_points([distances], "threshold") == [value]


def test_graded_negative_points():
    # half-way from 40 to 160; none of a second answer; of a third the first lies on the target
    assert negative_points([[100], [], [0, 20, 160, np.inf]], "graded") == pytest.approx([0.5, 0, 0.25])
    assert negative_points([[0, 40, 41]], "graded", reach=1) == pytest.approx([1 / 3])


def negative_points(distances, grading, reach=4):
    """Of each answer, given the distances of its points."""
    return terms.negative_points(np.array(sum(distances, [])), [len(of) for of in distances], 40, grading, reach).tolist()


@pytest.mark.parametrize(
    "text, value",
    [
        ("", 1),
        ("a. b. c", 1),
        ("a. a", 1),  # one repeat is forgiven
        ("a. a. a", 0),
        ("a. b. a. b", 0),  # two repeats of different sentences
        ("a.a.b.c", 1),
        (" a .a", 1),
        ("....", 1),  # empty sentences do not count
        ("10.5, 10.5, 10.5, 10.5", 0),  # published: a decimal point splits, '5, 10' comes three times
    ],
)
def test_no_repeat(text, value):
    assert terms.no_repeat(text) == value


def test_no_repeat_limit():
    assert terms.no_repeat("a. a. a", max_repeats=3) == 1 and terms.no_repeat("a. a", max_repeats=1) == 0


def test_union_iou():
    a, b = np.zeros((2, 4, 4), bool)
    assert terms.union_iou(a, b) == 1  # both empty
    a[:2] = True
    assert terms.union_iou(a, b) == 0
    b[1:] = True
    assert terms.union_iou(a, b) == 4 / 16


def test_temporal_consistency():
    changes_TG, true_T = rows([0.5, 1, 0], [0.5, 1, 1]), np.array([0.5, 0.75])
    assert terms.temporal_consistency(changes_TG, true_T, [1, 0.5, 0]).tolist() == [1 - 0.125, 0.5 * (1 - 0.375), 0]
    assert terms.temporal_consistency(np.zeros((0,)), np.zeros(0), [0.25, 1]).tolist() == [0.25, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(1.0, 1.0), (7.5, 2.0), (1.75, 840 / 854)]), st.integers(0, 2**32 - 1))
def test_taxicab_distance_is_exact(height, width, pitch, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.2
    ys, xs = np.nonzero(mask)
    pixels = list(itertools.product(range(height), range(width)))
    for (y, x), measured in zip(pixels, MaskDistance(mask, pitch).at([(x, y) for y, x in pixels])):
        brute = min((pitch[0] * abs(y - v) + pitch[1] * abs(x - u) for v, u in zip(ys, xs)), default=np.inf)
        assert measured == pytest.approx(brute, abs=1e-9)
        assert (measured == 0) == mask[y, x]


def test_distance_of_points():
    mask = np.zeros((100, 200), bool)
    mask[50:60, 100:120] = True
    points = [[110, 55], [99, 55], [98.4, 49], [100, 5], [0, 0], [-1, 55], [200, 55], [201, 55], [119.4, 55]]
    assert MaskDistance(mask).at(points).tolist() == [0, 1, 3, 45, 150, np.inf, 80, np.inf, 0]  # the right edge is in the image (pixel 199)
    assert MaskDistance(np.zeros((4, 4), bool)).at([[1, 1]]).tolist() == [np.inf]
    assert MaskDistance(np.ones((4, 4), bool)).at([[1, 1]]).tolist() == [0]
    assert MaskDistance(mask, (4.0, 3.0)).at([[121, 55]]).tolist() == [6]
    assert MaskDistance(mask).at([]).tolist() == []
