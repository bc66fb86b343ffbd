"""J and F against a plain restatement of their definition, and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service.measures import boundary_f, jaccard, jaccard_and_f


def plain_boundary(mask):
    """Pixel by pixel: differs from its east, south or south-east neighbour inside the image."""
    height, width = mask.shape
    out = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            below, right = y + 1 < height, x + 1 < width
            neighbours = [(y, x + 1)] * right + [(y + 1, x)] * below + [(y + 1, x + 1)] * (right and below)
            out[y, x] = any(mask[y, x] != mask[n] for n in neighbours)
    return out


def plain_f(predicted, annotated, radius):
    p, g = (np.argwhere(plain_boundary(m)) for m in (predicted, annotated))
    if len(p) == 0 or len(g) == 0:
        return float(len(p) == len(g))
    near = ((p[:, None, :] - g[None, :, :]) ** 2).sum(-1) <= radius * radius
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@st.composite
def pairs(draw):
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 140))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def mask():
        kind = rng.integers(5)
        if kind == 0:
            return rng.random((height, width)) < 0.5
        out = np.full((height, width), kind == 1)  # full, empty, one pixel, a box that may touch the border
        if kind == 3:
            out[rng.integers(height), rng.integers(width)] = True
        if kind == 4:
            y, x = rng.integers(height), rng.integers(width)
            out[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = True
        return out

    return mask(), mask()


@settings(max_examples=150, deadline=None)
@given(pairs(), st.sampled_from([0.008, 0.05, 1, 3, 70]))
def test_f_is_the_definition(pair, tolerance):
    predicted, annotated = pair
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*predicted.shape))
    assert boundary_f(predicted, annotated, tolerance=tolerance) == pytest.approx(plain_f(predicted, annotated, radius), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_j_is_the_definition(pair):
    predicted, annotated = pair
    either = (predicted | annotated).sum()
    assert jaccard(predicted, annotated) == ((predicted & annotated).sum() / either if either else 1.0)


@settings(max_examples=50, deadline=None)
@given(pairs(), pairs())
def test_both_at_once_are_the_same_and_uint8_masks_count_where_they_are_not_0(pair, other):
    predicted, annotated = pair
    void = np.resize(other[0], predicted.shape)
    expected = jaccard(predicted, annotated, void), boundary_f(predicted, annotated, void)
    assert jaccard_and_f(predicted, annotated, void) == expected
    assert jaccard_and_f(predicted * np.uint8(255), annotated * np.uint8(3), void) == expected
    stacked = np.stack([predicted, annotated]), np.stack([annotated, annotated])
    assert [v.tolist() for v in jaccard_and_f(*stacked)] == [jaccard(*stacked).tolist(), boundary_f(*stacked).tolist()]


def corner_case(name):
    empty, full, one, other = np.zeros((4, 480, 854), bool)
    full[:], one[10:20, 30:40], other[10:20, 30:40] = True, True, True
    return {"empty": empty, "full": full, "one": one, "other": other, "last pixel": np.flip(one & (one.cumsum() == 1).reshape(one.shape))}[name]


@pytest.mark.parametrize(
    "predicted, annotated, j, f",
    [
        ("empty", "empty", 1, 1),
        ("full", "full", 1, 1),
        ("full", "empty", 0, 1),  # neither has a boundary
        ("one", "empty", 0, 0),
        ("empty", "one", 0, 0),
        ("one", "other", 1, 1),
        ("one", "full", 100 / (480 * 854), 0),
    ],
)
def test_corners(predicted, annotated, j, f):
    a, b = corner_case(predicted), corner_case(annotated)
    assert jaccard(a, b) == pytest.approx(j) and boundary_f(a, b) == f


def test_by_hand():
    """4x4 squares that are 3 columns apart, with a tolerance of 1, 2 and 3 pixels."""
    a, b = np.zeros((2, 12, 12), bool)
    a[4:8, 2:6], b[4:8, 5:9] = True, True
    assert jaccard(a, b) == 4 / 28
    assert boundary_f(a, b, tolerance=3) == 1
    assert plain_boundary(a).sum() == 16  # a ring of side 5, one pixel to the north-west
    assert boundary_f(a, b, tolerance=1) == pytest.approx(plain_f(a, b, 1))


@pytest.mark.parametrize("hw, radius", [((480, 854), 8), ((540, 960), 9), ((720, 1280), 12), ((1080, 1920), 18)])
def test_radius_of_common_sizes(hw, radius):
    a, b = np.zeros((2, *hw), bool)
    a[100:, :], b[100 + radius :, :] = True, True
    assert boundary_f(a, b) == 1
    b[100 + radius, :] = False
    assert boundary_f(a, b) == 0


def test_leading_axes_and_void():
    rng = np.random.default_rng(3)
    a, b, void = rng.random((3, 2, 3, 30, 70)) < 0.4
    j, f = jaccard(a, b, void), boundary_f(a, b, void)
    assert j.shape == f.shape == (2, 3)
    assert j[1, 2] == jaccard(a[1, 2] & ~void[1, 2], b[1, 2] & ~void[1, 2])
    assert f[1, 2] == boundary_f(a[1, 2] & ~void[1, 2], b[1, 2] & ~void[1, 2])
    assert isinstance(jaccard(a[0, 0], b[0, 0]), float) and isinstance(boundary_f(a[0, 0], b[0, 0]), float)
    assert jaccard(np.zeros((0, 5, 5)), np.zeros((0, 5, 5))).shape == boundary_f(np.zeros((0, 5, 5)), np.zeros((0, 5, 5))).shape == (0,)


def test_any_type_of_mask():
    a = np.array([[0, 255], [3, 0]], np.uint8)
    assert jaccard(a, a > 0) == 1 and boundary_f(a, a > 0) == 1
    assert jaccard([[1, 0]], [[1, 1]]) == 0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: jaccard(np.zeros((2, 3)), np.zeros((3, 2))), "equal"),
        (lambda: jaccard(np.zeros(3), np.zeros(3)), "H, W"),
        (lambda: boundary_f(np.zeros((0, 3)), np.zeros((0, 3))), "H, W"),
        (lambda: boundary_f(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((1, 2, 3))), "void"),
        (lambda: boundary_f(np.zeros((2, 3)), np.zeros((2, 3)), tolerance=-1), "tolerance"),
        (lambda: boundary_f(np.zeros((2, 3)), np.zeros((2, 3)), tolerance=1.5), "tolerance"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
