"""Every measure against the official definition restated (benchmarks/plain_measures.py), on random and edge masks; and by hand."""

import numpy as np
import plain_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service import bitmaps
from reward_service.measures import boundary_f, box_accuracy, ciou, giou, intersection_and_union, j_and_f, jaccard, jaccard_and_f_of_pairs, point_accuracy, robustness

KINDS = ("empty", "full", "one pixel", "corner pixel", "noise", "touches the border", "several objects", "ring")


def mask_of(kind, hw, rng):
    height, width = hw
    out = np.zeros(hw, bool)

    def box():
        y, x = rng.integers(height), rng.integers(width)
        return slice(y, y + rng.integers(1, height + 1)), slice(x, x + rng.integers(1, width + 1))

    if kind == "full":
        out[:] = True
    elif kind == "one pixel":
        out[rng.integers(height), rng.integers(width)] = True
    elif kind == "corner pixel":
        out[rng.choice([0, -1]), rng.choice([0, -1])] = True
    elif kind == "noise":
        out = rng.random(hw) < rng.random()
    elif kind == "touches the border":
        out[rng.integers(height) :, :] = True
    elif kind == "several objects":
        for _ in range(3):
            out[box()] = True
    elif kind == "ring":
        out[box()] = True
        out[1:-1, 1:-1] &= ~out[1:-1, 1:-1] | (rng.random((max(height - 2, 0), max(width - 2, 0))) < 0.2)
    return out


@st.composite
def triples(draw):
    """Predicted, annotated and void masks of one size; the void mask is empty half of the time."""
    hw, rng = (draw(st.integers(1, 40)), draw(st.integers(1, 150))), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    predicted, annotated, void = (mask_of(draw(st.sampled_from(KINDS)), hw, rng) for _ in range(3))
    return predicted, annotated, void if draw(st.booleans()) else np.zeros(hw, bool)


@settings(max_examples=200, deadline=None)
@given(triples(), st.sampled_from([0.008, 0.05, 1, 4, 20]))
def test_j_and_f_are_the_davis_evaluators(masks, tolerance):
    predicted, annotated, void = masks
    assert jaccard(predicted, annotated, void) == pytest.approx(plain_measures.jaccard(predicted, annotated, void), abs=1e-12)
    assert boundary_f(predicted, annotated, void, tolerance) == pytest.approx(plain_measures.boundary_f(predicted, annotated, void, tolerance), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.lists(st.sampled_from(KINDS), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_j_and_f_of_pairs_are_those_of_each_pair(height, width, kinds, seed):
    rng = np.random.default_rng(seed)
    masks = [mask_of(kind, (height, width), rng) for kind in kinds]
    masks[0] = masks[0].astype(np.uint8) * np.uint8(3)
    pairs = [tuple(pair) for pair in rng.integers(len(masks), size=(6, 2)).tolist()]
    expected = [(plain_measures.jaccard(masks[p], masks[a]), plain_measures.boundary_f(masks[p], masks[a])) for p, a in pairs]
    np.testing.assert_allclose(jaccard_and_f_of_pairs(masks, pairs), expected, atol=1e-12)


def test_pairs_are_of_masks_of_one_shape():
    assert jaccard_and_f_of_pairs([], []) == [] == jaccard_and_f_of_pairs([np.ones((2, 3))], [])
    for wrong in ([np.ones((2, 3)), np.ones((3, 2))], [np.ones((1, 2, 3))], [np.ones((0, 3))]):
        with pytest.raises(ValueError, match="equal .H, W. shapes"):
            jaccard_and_f_of_pairs(wrong, [(0, 0)])


@pytest.mark.parametrize("kind", KINDS)
def test_j_and_f_at_480p(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    predicted, annotated, void = (mask_of(k, (480, 854), rng) for k in (kind, "several objects", "one pixel"))
    annotated |= predicted & (rng.random(predicted.shape) < 0.9)
    assert boundary_f(predicted, annotated, void) == pytest.approx(plain_measures.boundary_f(predicted, annotated, void), abs=1e-12)
    assert jaccard(predicted, annotated, void) == pytest.approx(plain_measures.jaccard(predicted, annotated, void), abs=1e-12)


@pytest.mark.parametrize("radius", [8, 9, 12, 18, 25, 100])
def test_every_pixel_of_the_disk(radius):
    """One pixel near each corner against the plain dilation by the disk."""
    for y, x in ((0, 0), (3, 129), (59, 1), (58, 126)):
        mask = np.zeros((60, 130), bool)
        mask[y, x] = True
        dilated = bitmaps.dilated(bitmaps.pack(mask).T, radius)
        found = np.unpackbits(np.ascontiguousarray(dilated.T).view(np.uint8), axis=-1, bitorder="little")[:, :130]
        yy, xx = np.mgrid[:60, :130]
        assert (found == ((yy - y) ** 2 + (xx - x) ** 2 <= radius**2)).all()


def test_j_and_f_of_a_video():
    rng = np.random.default_rng(5)
    predicted, annotated = rng.random((2, 3, 2, 20, 70)) < 0.2
    result = j_and_f(predicted, annotated)
    frames = [(p, a) for p, a in zip(predicted.reshape(-1, 20, 70), annotated.reshape(-1, 20, 70))]
    assert result.j == pytest.approx(np.mean([plain_measures.jaccard(p, a) for p, a in frames]))
    assert result.f == pytest.approx(np.mean([plain_measures.boundary_f(p, a) for p, a in frames]))
    assert result.j_and_f == (result.j + result.f) / 2
    one = np.ones((4, 4), bool)
    assert j_and_f(one, one) == (1, 1, 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(triples(), min_size=1, max_size=6))
def test_giou_and_ciou_are_lisas(images):
    predicted, annotated, ignore = zip(*images)
    pairs = [intersection_and_union(*image) for image in images]
    expected = plain_measures.giou_and_ciou(predicted, annotated, ignore)
    assert (giou(*zip(*pairs)), ciou(*zip(*pairs))) == pytest.approx(expected, abs=1e-12)


def test_giou_and_ciou_by_hand():
    pairs = [(30, 60), (0, 0), (0, 40), (10, 10)]
    assert giou(*zip(*pairs), evaluator="seg_zero") == (0.5 + 0 + 0 + 1) / 4
    assert giou(*zip(*pairs)) == pytest.approx((0.5 + 1 + 0 + 1) / 4, abs=1e-5)
    assert giou([0], [0]) == 1 / (1 + 1e-5)  # the evaluator's own small constants are kept
    assert ciou(*zip(*pairs)) == pytest.approx(40 / 110)
    assert ciou([0], [0]) == 0


def test_intersection_and_union_of_leading_axes():
    predicted, annotated, ignore = np.random.default_rng(0).random((3, 2, 5, 9, 130)) < 0.5
    shared, either = intersection_and_union(predicted, annotated, ignore)
    assert (shared == (predicted & annotated & ~ignore).sum((-2, -1))).all() and (either == ((predicted | annotated) & ~ignore).sum((-2, -1))).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(triples(), min_size=1, max_size=3), st.sampled_from([1, 255]), st.integers(0, 3))
def test_robustness_is_revos_in_both_conventions(objects, value, overlaps):
    """Overlapping instances are summed in 8 bits, as the evaluator does."""
    predicted, one, foreground = objects[0]
    annotated = one.astype(np.uint8) + np.uint8(overlaps) * one[::-1]
    foreground = foreground.astype(np.uint8) + annotated
    expected = plain_measures.robustness(predicted.astype(np.uint8) * np.uint8(value), annotated, foreground)
    assert robustness(predicted, annotated, foreground, value) == pytest.approx(expected, abs=1e-12)


def test_robustness_by_hand():
    predicted, annotated, foreground = np.zeros((3, 2, 10, 10), bool)
    annotated[:, :5], foreground[:, :8], predicted[:, :6] = True, True, True  # 10 false pixels, 80 of the foreground, in both frames
    assert robustness(predicted, annotated, foreground, 1) == pytest.approx([1 - 10 / 80] * 2)
    assert (robustness(predicted, annotated, foreground) == 0).all()  # 2,550 of 80
    predicted[0] = annotated[0]
    assert robustness(predicted, annotated, foreground).tolist() == [1, 0]
    assert robustness(np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3))) == 1


def test_box_accuracy_by_hand():
    truth = [0, 0, 10, 10]
    assert box_accuracy([[[0, 0, 10, 10]]], [truth]) == 1
    assert box_accuracy([[[0, 0, 10, 5]]], [truth]) == 0  # exactly 0.5 is not above it
    assert box_accuracy([[[0, 0, 10, 6]]], [truth]) == 1
    assert box_accuracy([[[50, 50, 60, 60], [0, 0, 10, 9]]], [truth]) == 1  # any box
    assert box_accuracy([[[0, 0, 5, 5], [5, 5, 10, 10]]], [truth]) == 1  # the box round all
    assert box_accuracy([[], [], [truth], [truth]], [None, truth, None, truth]) == 0.5
    assert box_accuracy([[[3, 3, 3, 3]]], [[3, 3, 3, 3]]) == 0  # no area, as the evaluator has it


def test_point_accuracy_by_hand():
    mask = np.zeros((10, 20), bool)
    mask[4:6, 7:9] = True
    assert point_accuracy([[[7, 4]]], [mask]) == 1
    assert point_accuracy([[[6.5, 3.5]]], [mask]) == 1 and point_accuracy([[[6.4, 4]]], [mask]) == 0
    assert point_accuracy([[[7, 4], [0, 0]], [[7, 4]]], [mask, mask]) == 0.75
    assert point_accuracy([[], [], [[3, 3]]], [mask, ~mask & mask, mask & ~mask]) == pytest.approx(1 / 3)
    assert point_accuracy([[[500, 4], [-3, 5]]], [np.ones((10, 20), bool)]) == 0  # outside


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: giou([], []), "at least one"),
        (lambda: giou([1, 2], [3]), "equally long"),
        (lambda: ciou([5], [3]), "order"),
        (lambda: giou([1], [3], evaluator="coco"), "lisa"),
        (lambda: robustness(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((3, 2))), "equal"),
        (lambda: robustness(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3)), 2), "255"),
        (lambda: j_and_f(np.zeros((0, 2, 3)), np.zeros((0, 2, 3))), "at least one"),
        (lambda: box_accuracy([], []), "at least one"),
        (lambda: point_accuracy([[[1, 1]]], []), "targets"),
    ],
)
def test_errors_say_what_to_give(call, message):
    with pytest.raises(ValueError, match=message):
        call()
