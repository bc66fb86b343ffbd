"""video_quality and temporal_consistency by hand and against the restated evaluators; beside terms on the target frame."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import plain_measures
from reward_service import FrameTarget, MissingInput, RewardConfig, Target, TermWeights, maximum, score, score_group
from segmentation_service.masks import encode_rle

HW = (4, 10)
A = [0, 0, 3, 3]
OFF = dict.fromkeys(("think_format", "segmentation_format", "iou", "box_l1", "point", "negative_point", "no_repeat"), 0.0)
TWO_TERMS = {"video_quality": 1.0, "temporal_consistency": 1.0}


def config(weights=TWO_TERMS, **settings):
    return RewardConfig(weights=TermWeights(**OFF | weights), **{"video_quality_grading": "graded"} | settings)


def columns(first, last):
    """The mask of these columns, inclusive. Its boundary (4 pixels a column) is the column before it, if there is one, and its last."""
    mask = np.zeros(HW, bool)
    mask[:, first : last + 1] = True
    return mask


AWAY = np.zeros(HW, bool)


def target(frames, boxes=(A,), **values):
    return Target(HW, boxes, frames={t: FrameTarget(masks=masks) for t, masks in frames.items()}, **values)


def answer(count):
    return f"<think>a</think><answer>{json.dumps([{'bbox_2d': A, 'point_2d': [1, 1]}] * count)}</answer>"


def earned(text, truth, tracks, **settings):
    terms = score(text, truth, config(**settings), length=0, predicted_masks=tracks).terms
    return terms["video_quality"], terms["temporal_consistency"]


ONE = target({2: [columns(0, 3)], 5: [columns(1, 4)], 9: [None]})
# IoU of the true masks from frame to frame: 3/5, 0.


@pytest.mark.parametrize(
    "tracks, j, f, steady",
    [
        ({2: [columns(0, 3)], 5: [columns(1, 4)], 9: [AWAY]}, 1, 1, 1),
        # Standing still. On frame 5: 3 of 5 columns; precision 1 (column 3 is beside 4), recall 1/2 (column 0 is not).
        ({2: [columns(0, 3)], 5: [columns(0, 3)], 9: [AWAY]}, (1 + 3 / 5 + 1) / 3, (1 + 2 / 3 + 1) / 3, 1 - (2 / 5 + 0) / 2),
        # Still drawn where the target is out of view: the change from 5 to 9 is none instead of all.
        ({2: [columns(0, 3)], 5: [columns(1, 4)], 9: [columns(1, 4)]}, 2 / 3, 2 / 3, 1 - (0 + 1) / 2),
        # Lost after frame 2: gone too early, and then it stays gone.
        ({2: [columns(0, 3)], 5: [AWAY], 9: [None]}, 2 / 3, 2 / 3, 1 - (3 / 5 + 1) / 2),
        # Elsewhere, moving as the target does: nothing but the frame on which both are away. F of frame 5: column 5 is beside 4.
        ({2: [columns(6, 9)], 5: [columns(6, 8)], 9: [AWAY]}, 1 / 3, (0 + 1 / 2 + 1) / 3, 1 - (3 / 4 - 3 / 5 + 0) / 2),
        ({2: [AWAY], 5: [AWAY], 9: [AWAY]}, 0, 0, 0),  # never found: the frame without the target does not pay
        ({2: [None], 5: [None], 9: [None]}, 0, 0, 0),  # not prompted
    ],
)
def test_by_hand(tracks, j, f, steady):
    for masks in (tracks | {3: [columns(0, 9)]}, {t: [m if m is None else encode_rle(m) for m in ms] for t, ms in reversed(tracks.items())}):
        for measure, expected in (("j", j), ("f", f), ("jf", (j + f) / 2)):
            assert earned(answer(1), ONE, masks, video_measure=measure) == pytest.approx((expected, steady * j))
            at = earned(answer(1), ONE, masks, video_measure=measure, video_quality_grading="threshold", video_quality_threshold=0.7)
            assert at == (float(expected > 0.7), pytest.approx(steady * j))


def test_a_threshold_is_strict_and_one_frame_has_no_change():
    half = target({0: [columns(0, 7)]})
    at = lambda **values: earned(answer(1), half, {0: [columns(0, 3)]}, video_measure="j", **values)
    assert at() == (0.5, 0.5)  # consistency is the mean J
    assert at(video_quality_grading="threshold") == (0, 0.5) and at(video_quality_grading="threshold", video_quality_threshold=0.49) == (1, 0.5)


def test_masks_that_are_steadily_wrong_earn_nothing():
    still = target({t: [columns(0, 3)] for t in range(3)})
    assert earned(answer(1), still, {t: [columns(6, 9)] for t in range(3)}) == (0, 0)


def test_unions_of_objects_are_compared_as_the_benchmarks_do():
    truth = {0: [columns(0, 3), columns(6, 7)], 1: [columns(0, 3), None]}
    both = {0: [columns(6, 7), columns(0, 3)], 1: [None, columns(0, 3)]}
    for frames in (truth, {0: truth[0][0] | truth[0][1], 1: encode_rle(truth[1][0])}):  # one an object, or of the union
        assert earned(answer(2), target(frames, [A, A]), both) == (1, 1)
        # One mask for all of the target, and an object that cannot be prompted.
        assert earned(answer(2), target(frames, [A, A]), {0: [columns(0, 7), None], 1: [columns(0, 3), None]}, video_measure="j")[0] == (6 / 8 + 1) / 2
    three = {t: [*masks, columns(9, 9)] for t, masks in both.items()}
    assert earned(answer(3), target(truth, [A, A]), three, video_measure="j")[0] == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert earned(answer(3), target(truth, [A, A]), three, video_measure="j", max_objects=2)[0] == 1
    salvaged = '```json\n[{"bbox_2d": [0, 0, 3, 3], "point_2d": [1, 1]}]\n```'
    assert earned(salvaged, ONE, {2: [columns(0, 3)], 5: [columns(1, 4)], 9: [AWAY]}) == (0, 0)


@pytest.mark.parametrize("text, value", [("<think>a</think><answer>[]</answer>", 1), (answer(1), 0), ("", 0), ("<answer>[{}]</answer>", 0)])
def test_an_empty_target_asks_for_the_empty_list(text, value):
    for truth in (target({0: [], 1: []}, []), Target(HW)):
        masks = {t: [AWAY] * (text == answer(1)) for t in (0, 1)}
        assert earned(text, truth, masks) == (value, value)


def test_a_target_that_is_away_on_all_annotated_frames():
    away = target({0: [None], 1: [None]})
    assert earned(answer(1), away, {0: [columns(0, 0)], 1: [AWAY]}) == (0.5, 0.5 * (1 - 1))
    assert earned(answer(1), away, {0: [AWAY], 1: [AWAY]}) == (0, 0) == earned(answer(0), away, {})


def blobs(rng, size=(30, 70)):
    """A few rectangles, which may be empty."""
    mask = np.zeros(size, bool)
    for _ in range(rng.integers(0, 3)):
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        mask[y : y + rng.integers(1, 20), x : x + rng.integers(1, 30)] = True
    return mask


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_bounds_and_the_restated_evaluators(seed):
    rng = np.random.default_rng(seed)
    counts, frames = rng.integers(0, 4, 3).tolist(), sorted(rng.choice(50, rng.integers(1, 13), replace=False).tolist())
    truth = {t: [blobs(rng), blobs(rng)] for t in frames}
    goal = Target((30, 70), [A, A], frames={t: FrameTarget(masks=masks) for t, masks in truth.items()})
    tracks = [{t: [truth[t][0] if rng.random() < 0.3 else blobs(rng) for _ in range(n)] for t in frames} for n in counts]
    measure = ("j", "f", "jf")[seed % 3]
    settings = config(TWO_TERMS, video_measure=measure)
    group = score_group([answer(n) for n in counts], goal, settings, lengths=[0] * 3, predicted_masks=tracks)
    for n, track, found in zip(counts, tracks, group):
        alone = score(answer(n), goal, settings, length=0, predicted_masks=track)
        assert (found.total, found.terms, found.diagnostics) == (alone.total, alone.terms, alone.diagnostics)
        assert 0 <= found.total <= maximum(settings) and all(0 <= found.terms[name] <= 1 for name in TWO_TERMS)
        unions = [np.any([np.zeros((30, 70), bool), *track[t]], axis=0) for t in frames]
        true = [truth[t][0] | truth[t][1] for t in frames]
        j = np.mean([plain_measures.jaccard(p, g) for p, g in zip(unions, true)])
        f = np.mean([plain_measures.boundary_f(p, g) for p, g in zip(unions, true)])
        pairs = zip(unions, unions[1:], true, true[1:])
        drift = [abs(plain_measures.jaccard(p, q) - plain_measures.jaccard(g, h)) for p, q, g, h in pairs] or [0.0]
        if not any(u.any() for u in unions):
            j = f = 0.0
        assert found.terms["video_quality"] == pytest.approx({"j": j, "f": f, "jf": (j + f) / 2}[measure])
        assert found.terms["temporal_consistency"] == pytest.approx(j * (1 - np.mean(drift)))


@pytest.mark.parametrize("accuracy", ["mask", "video"])
@pytest.mark.parametrize("t", [5, 7])  # one of the annotated frames, and one beside them
def test_terms_on_the_target_frame_and_over_the_video_together(accuracy, t):
    frames = {2: [columns(0, 3)], 5: [columns(1, 4)], 9: [None]}
    truth = target(frames, masks=columns(1, 4)[None], frame=t)
    tracks = {2: [columns(0, 3)], 5: [columns(0, 3)], 9: [AWAY], t: columns(0, 3)[None]}
    settings = dict(accuracy_iou=accuracy, iou_grading="graded", mask_iou_grading="graded", video_measure="j")
    together = config(TWO_TERMS | {"iou": 1.0, "mask_iou": 1.0}, **settings)
    s = score(answer(1), truth, together, length=0, predicted_masks=tracks)
    j = (1 + 3 / 5 + 1) / 3
    expected = {"iou": {"mask": 3 / 5, "video": j}[accuracy], "mask_iou": 3 / 5, "video_quality": j, "temporal_consistency": 0.8 * j}
    assert {name: s.terms[name] for name in expected} == pytest.approx(expected)
    assert s.diagnostics["mask_iou"] == 3 / 5 and s.total == pytest.approx(sum(expected.values()))
    # Terms on the target frame alone take its masks as they are, or out of those of the video.
    still = config({"mask_iou": 1.0}, mask_iou_grading="graded")
    for masks in (tracks, tracks[t], {t: tracks[t]}):
        assert score(answer(1), truth, still, length=0, predicted_masks=masks).terms["mask_iou"] == 3 / 5
    group = score_group([answer(1), answer(0), ""], truth, together, lengths=[0] * 3, predicted_masks=[tracks, {}, None])
    assert group[0].terms == s.terms and group[1].total == group[2].total == 0


def test_no_mask_is_decoded_twice(monkeypatch):
    from segmentation_service import masks as module

    decoded, original = [], module.decode_rle
    monkeypatch.setattr(module, "decode_rle", lambda rle: decoded.append(rle) or original(rle))
    rle = lambda *ends: encode_rle(columns(*ends))
    frames = {t: [rle(t, t + 3), rle(9, 9)] for t in range(4)}
    truth = target(frames, [A, A], masks=[columns(2, 5), columns(9, 9)], frame=2)
    tracks = [{t: [rle(t, t + n) for n in range(count)] for t in range(4)} for count in (1, 3)]
    everything = config(TWO_TERMS | {"iou": 1.0, "mask_iou": 1.0}, accuracy_iou="video")
    score_group([answer(1), answer(3)], truth, everything, lengths=[0] * 2, predicted_masks=tracks)
    assert len(decoded) == 4 * (2 + 1 + 3)


BOTH = config({"video_quality": 1.0, "mask_iou": 1.0})


@pytest.mark.parametrize("text", [answer(1), answer(0), ""])
@pytest.mark.parametrize(
    "truth, settings, given, message",
    [
        (ONE, config(), None, r"video_quality, temporal_consistency\) needs SAM2's masks: pass predicted_masks"),
        (Target(HW, [A]), config(), {}, r"video_quality, temporal_consistency\) needs target.frames"),
        (target({0: None}), config(), {0: [AWAY]}, r"need masks in target.frames\[0\]"),
        (target({0: [AWAY]}, masks=[AWAY]), BOTH, {0: [AWAY]}, r"\(mask_iou\) needs .*: set target.frame"),
        (target({0: [AWAY]}, masks=[AWAY]), config({"iou": 1.0}, accuracy_iou="mask"), {0: [AWAY]}, "accuracy_iou=mask.* set target.frame"),
        (target({0: [AWAY]}, frame=0), BOTH, {0: [AWAY]}, "mask_iou term needs target.masks"),
    ],
)
def test_a_missing_input_is_an_error_whatever_the_completion(truth, settings, given, message, text):
    if isinstance(given, dict) and text != answer(1):
        given = {t: [] for t in given}
    with pytest.raises(MissingInput, match=message):
        score(text, truth, settings, length=0, predicted_masks=given)


@pytest.mark.parametrize(
    "truth, given, settings, message",
    [
        (ONE, {2: [AWAY], 5: [AWAY]}, config(), "lacks frame 9"),
        (ONE, {2: [AWAY], 5: [AWAY], 9: None}, config(), "lacks frame 9"),
        (ONE, columns(0, 3)[None], config(), "lacks frame 2 .*pass {frame id: masks}"),
        (ONE, {2: [AWAY], 5: [AWAY] * 2, 9: [AWAY]}, config(), r"predicted_masks\[5\] has 2 masks for an answer of 1 objects"),
        (ONE, {2: [AWAY], 5: [np.zeros((5, 5), bool)], 9: [AWAY]}, config(), r"\(5, 5\)"),
        (target({2: np.zeros((5, 5), bool)}), {2: [AWAY]}, config(), r"target.frames\[2\].masks are \(5, 5\)"),
        (target({2: [AWAY]}, masks=[AWAY], frame=3), {2: [AWAY]}, BOTH, r"predicted_masks\[3\] is None for an answer with objects"),
        (target({2: [AWAY]}, masks=[AWAY], frame=2), {2: [AWAY] * 2}, BOTH, r"predicted_masks\[2\] has 2 masks"),
    ],
)
def test_inputs_that_do_not_fit(truth, given, settings, message):
    with pytest.raises(ValueError, match=message):
        score(answer(1), truth, settings, length=0, predicted_masks=given)
