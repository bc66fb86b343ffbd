"""Presets of published systems against tables computed by hand from the published definitions (domain.md 2)."""

import json

import numpy as np
import pytest

from reward_service import FrameTarget, MissingInput, RewardConfig, Target, TermWeights, score

A, B = [100, 100, 199, 199], [400, 400, 499, 499]
PA, PB = [150, 150], [450, 450]
TWO = Target((840, 840), [A, B], [[PA], [PB]])
ONE = Target((840, 840), [A], [[PA]])


def completion(answer, think="The left one. It moves"):
    return f"<think>{think}</think><answer>{answer if isinstance(answer, str) else json.dumps(answer)}</answer>"


def item(box, point):
    return {"bbox_2d": box, "point_2d": point}


def shifted(box, by):
    return [v + by for v in box]


# ---- VisionReasoner: think 1 + format 2 + accuracy 3 + no repeat 1 ----


@pytest.mark.parametrize(
    "truth, text, total",
    [
        (TWO, completion([item(B, PB), item(A, PA)]), 7),
        (TWO, completion([item(A, PA)]), 1 + 2 + 1.5 + 1),
        (ONE, completion([item(A, PA), item(B, PB)]), 1 + 2 + 1.5 + 1),
        (ONE, completion([item(shifted(A, 10), PA)]), 1 + 2 + 2 + 1),
        (ONE, completion([item([100, 100, 199, 149], [150, 149])]), 1 + 2 + 1 + 1),
        (ONE, completion([item(A, [180, 150])]), 1 + 2 + 2 + 1),
        (ONE, completion([item(A, PA)]) + " ", 0 + 2 + 3 + 1),
        (ONE, "<answer>[]</answer>" + completion([item(A, PA)]), 0 + 0 + 0 + 1),  # the first answer block is the empty one
        (ONE, completion([item(A, PA)], think="a. a. a. a."), 1 + 2 + 3 + 0),
        (ONE, completion([]), 1 + 0 + 0 + 1),
        (ONE, completion("null"), 1 + 0 + 0 + 1),
        (ONE, completion("not JSON"), 1 + 0 + 0 + 1),
        (ONE, completion("```json\n[]\n```"), 1 + 0 + 0 + 1),
        (ONE, completion(item(A, PA)), 1 + 0 + 0 + 1),  # an object: its keys are read as items, the first one breaks
        (ONE, completion([item(A, PA), {"bbox_2d": A}]), 1 + 1.5 + 0 + 1),  # one bad item costs the accuracy of all
        (ONE, completion([item(A, PA), 5]), 1 + 1 + 0 + 1),  # the format's sum so far survives
        (ONE, completion([5, item(A, PA)]), 1 + 0 + 0 + 1),
        (ONE, completion([["bbox_2d"], item(A, PA)]), 1 + 0 + 0 + 1),
        (ONE, completion(["x", item(A, PA)]), 1 + 1 + 0 + 1),  # a string can be searched for the keys
        (ONE, completion([item(["a", "b", "c", "d"], ["e", "f"])]), 1 + 2 + 0 + 1),  # the format reads lengths only
        (ONE, completion([item([str(v) for v in A], PA)]), 1 + 2 + 0 + 1),
        (ONE, completion([item(A, [True, False])]), 1 + 2 + 2 + 1),  # booleans are numbers to numpy
        (ONE, completion([item(A, PA + [1])]), 1 + 1 + 0 + 1),
        (ONE, completion([item(A + [1], PA)]), 1 + 1 + 0 + 1),
        (ONE, completion([item([float("nan")] * 4, PA)]), 1 + 2 + 0 + 1),
        (ONE, completion([item([10**400] * 4, PA)]), 1 + 2 + 0 + 1),
        (ONE, completion('[{"bbox_2d": [1], "bbox_2d": [100,100,199,199], "point_2d": [150,150]}]'), 7),  # the last key
        (ONE, completion([item(A, PA)] * 121), 1 + 2 + 3 / 120 + 1),  # cut at 120
        (ONE, completion('[{"bbox_2d": [100.5,100.5,100.5,100.5], "point_2d": [1.5,2]}]'), 1 + 2 + 0 + 0),  # '5,100' twice
        (Target((840, 840), [], []), completion([]), 1 + 0 + 0 + 1),  # nothing can be right
        (Target((840, 840), [], []), completion([item(A, PA)]), 1 + 2 + 0 + 1),
        (ONE, completion([item(shifted(A, 9), PA)]), 7),  # IoU 8281 / 11719, corners 9 apart
        (ONE, completion([item([100, 100, 150, 150], PA)]), 1 + 2 + 1 + 1),  # the point on the edge of its box
        (ONE, completion([item([199, 199, 100, 100], PA)]), 1 + 2 + 0 + 1),  # reversed
        (ONE, completion([item([[v] for v in A], PA)]), 1 + 2 + 0 + 1),
        (ONE, completion([item(A + A, PA)]), 1 + 1 + 0 + 1),
        (ONE, completion([item(A, None)]), 1 + 1 + 0 + 1),
        (ONE, completion([item(["x" * 1000, *A[1:]], PA), item(A, PA)]), 1 + 2 + 0 + 1),
        (ONE, completion([item([1e308] * 4, PA)]), 1 + 2 + 0 + 1),
        (ONE, completion([item(A, PA)] * 9), 1 + 2 + 3 / 9 + 1),
        (ONE, completion("\n " + json.dumps([item(A, PA)]) + "\t\n"), 7),
        (ONE, completion(json.dumps([item(A, PA)]) + " as asked"), 1 + 0 + 0 + 1),
        (ONE, completion([item(A, PA)]).replace("</think>", "</think>so"), 0 + 2 + 3 + 1),
        (ONE, completion([item(A, PA)])[: -len("</answer>")], 0 + 0 + 0 + 1),
        (ONE, completion([item(A, PA)], think="a. a. a."), 7),  # "<think>a" is another sentence: one was said before
        (ONE, "", 1),
    ],
)
def test_vision_reasoner(truth, text, total):
    s = score(text, truth, RewardConfig.preset("vision_reasoner"))
    assert s.total == pytest.approx(total), s.terms
    assert s.terms["segmentation_format"] <= 2
    assert s.terms["length_penalty"] == 1


# ---- Seg-Zero: think + format + IoU + points + corners ----

SEG = Target((840, 840), [A], [[PA, [120, 120]]])


def seg(bbox=A, points_1=PA, points_2=(120, 120), think="it"):
    return completion({"bbox": bbox, "points_1": points_1, "points_2": points_2}, think)


@pytest.mark.parametrize(
    "text, terms",  # think_format, segmentation_format, iou, box_l1, point
    [
        (seg(), (1, 1, 1, 1, 1)),
        (seg(points_1=[120, 120], points_2=PA), (1, 1, 1, 1, 1)),  # the better pairing counts
        (seg(bbox=shifted(A, 10)), (1, 1, 1, 0, 1)),
        (seg(bbox=[100, 100, 199, 149], points_1=[150, 149]), (1, 1, 0, 0, 1)),
        (seg(bbox=[199, 100, 199, 199]), (1, 1, 0, 0, 0)),  # a single column does not overlap; the points are outside it
        (seg(bbox=[0, 0, 839, 839], points_1=[250, 150], points_2=[220, 120]), (1, 1, 0, 0, 0)),  # mean distance exactly 100
        (seg(bbox=[0, 0, 839, 839], points_1=[249, 150], points_2=[220, 120]), (1, 1, 0, 0, 1)),
        (seg(points_1=["150", "150"]), (1, 1, 1, 1, 1)),  # int() reads digit strings
        (seg(points_1="15"), (1, 0, 1, 1, 0)),  # and characters: (1, 5) is outside the box
        (seg(points_1=[150.9, True]), (1, 1, 1, 1, 0)),
        (seg(points_1=[150, 150, 7]), (1, 0, 1, 1, 1)),  # only the format minds a third number
        (seg(bbox=["100", 100, 199, 199]), (1, 1, 0, 0, 0)),
        (seg(bbox=A + [1]), (1, 0, 0, 0, 0)),
        (seg(think="the {left} one"), (1, 0, 0, 0, 0)),  # the first braces of the whole text
        (seg(think="the {} one"), (1, 1, 1, 1, 1)),
        (completion('{"bbox": [100,100,199,199], "note": {"a": 1}}'), (1, 0, 0, 0, 0)),  # cut at the first }
        (json.dumps({"bbox": A, "points_1": PA, "points_2": [120, 120]}), (0, 1, 1, 1, 1)),  # no tags needed
        (completion({"BBox_2d": A, "Points_a": PA, "points_b": [120, 120]}), (1, 0, 0, 0, 0)),
        (seg(bbox=shifted(A, 9)), (1, 1, 1, 1, 1)),
        (seg(bbox=[199, 199, 100, 100]), (1, 1, 0, 0, 0)),
        (seg(bbox=[float("nan")] * 4), (1, 1, 0, 0, 0)),
        (seg(bbox=[10**400] * 4), (1, 1, 0, 0, 0)),
        (seg(bbox="1234"), (1, 0, 0, 0, 0)),
        (seg(points_1=[99, 150]), (1, 1, 1, 1, 0)),  # outside the box
        (seg(points_1=[100, 199]), (1, 1, 1, 1, 1)),  # on its edges, 70 away
        (seg() + ".", (0, 1, 1, 1, 1)),
        (completion("```json\n" + json.dumps({"bbox": A, "points_1": PA, "points_2": [120, 120]}) + "\n```"), (1, 1, 1, 1, 1)),
        (completion('{"bbox": 0, "bbox": [100,100,199,199], "points_1": [150,150], "points_2": [120,120]}'), (1, 1, 1, 1, 1)),  # the last key
        ("{" * 100, (0, 0, 0, 0, 0)),
        ("", (0, 0, 0, 0, 0)),
    ],
)
def test_seg_zero(text, terms):
    names = ("think_format", "segmentation_format", "iou", "box_l1", "point")
    s = score(text, SEG, RewardConfig.preset("seg_zero"))
    assert tuple(s.terms[n] for n in names) == terms and s.total == sum(terms)


def test_seg_zero_loose():
    config = RewardConfig.preset("seg_zero")
    config.strict_keys = False
    assert score(completion({"BBox_2d": A, "Points_a": PA, "points_b": [120, 120]}), SEG, config).total == 5
    assert score(completion({"bbox": A, "point_a": PA, "point_b": [120, 120]}), SEG, config).total == 4  # format says point, reward points
    assert score(completion({"bbox": A, "points": PA}), SEG, config).total == 3


def test_seg_zero_targets():
    config = RewardConfig.preset("seg_zero")
    with pytest.raises(MissingInput, match="one object"):
        score(seg(), TWO, config)
    with pytest.raises(MissingInput, match="two points"):
        score(seg(), ONE, config)
    assert score(seg(), Target((840, 840), [], []), config).total == 2  # nothing to find: no accuracy, as published


# ---- PixelThink: Seg-Zero x penalty on the words of the whole response ----


@pytest.mark.parametrize(
    "words, difficulty, uncertainty, s",
    [
        (96, 2.0, None, 1.0),
        (196, 3.4, 1.0, 0.8),
        (596, None, None, 0.0),  # unknown difficulty is easy
        (5000, 4.0, None, 1.0),  # medium has no limit
        (5000, 3.5, None, 1.0),
        (596, 3.499, None, 0.0),
        (356, 5.0, None, 0.8),
        (356, 9.0, 0.4, 1 - (356 - 266) / 500),
        (3, 2.0, None, 1.0),  # the bonus is clamped away
    ],
)
def test_pixelthink(words, difficulty, uncertainty, s):
    answer = json.dumps({"bbox": A, "points_1": PA, "points_2": [120, 120]}, separators=(",", ":"))  # one word with its tags
    text = f"<think>{'w ' * (words - 2)}w</think> <answer>{answer}</answer>"
    assert len(text.split()) == words
    got = score(text, SEG, RewardConfig.preset("pixelthink"), difficulty=difficulty, uncertainty=uncertainty)
    assert got.terms["original"] == 5 and got.total == pytest.approx(5 * s)


@pytest.mark.parametrize(
    "text, total",
    [
        ("", 0),
        ("w " * 196, 0),
        (f"{'w ' * 195}{json.dumps({'bbox': A, 'points_1': PA, 'points_2': [120, 120]}, separators=(',', ':'))}", 4 * 0.8),  # no tags
        (seg(bbox="x", think="w " * 300), 1 * 0.576),  # 300 words and the 8 of the answer
    ],
)
def test_pixelthink_on_malformed_texts(text, total):
    assert score(text, SEG, RewardConfig.preset("pixelthink"), difficulty=2.0).total == pytest.approx(total)


def test_pixelthink_may_count_tokens():
    config = RewardConfig.preset("pixelthink")
    config.length.unit = "think_tokens"
    assert score(seg(), SEG, config, length=346).total == pytest.approx(2.5)
    with pytest.raises(MissingInput):
        score(seg(), SEG, config)


# ---- Veason-R1: format 2, key frame, matched IoU, video IoU ----


def square(size, hw=(56, 56)):
    mask = np.zeros(hw, bool)
    mask[:size, :size] = True
    return mask


VIDEO = Target(
    (560, 560),
    frames={
        0: FrameTarget([A, None], [square(10), None]),  # 100 pixels
        4: FrameTarget([A, B], [square(20), None]),  # 400
        8: {"boxes": [None, None], "masks": [None, None]},
    },
)


def veason(frame, boxes):
    return completion({"keyframe_timestamp": frame, "bbox_2d_list": boxes})


def veason_answer(frame, boxes):
    return veason(frame, boxes).partition("</think>")[2]


def carried(*sizes_per_object):
    """Masks on the frames 0, 4, 8 for each object."""
    return {frame: [square(sizes[i]) for sizes in sizes_per_object] for i, frame in enumerate((0, 4, 8))}


@pytest.mark.parametrize(
    "text, masks, terms",  # think_format, segmentation_format, keyframe, iou, video_iou
    [
        (veason(4, [A, B]), carried((10, 20, 0), (0, 0, 0)), (1, 1, 1, 1, 1)),
        (veason(4, [B, A]), carried((10, 20, 0), (0, 0, 0)), (1, 1, 1, 1, 1)),
        (veason(4, [A]), carried((10, 20, 1)), (1, 1, 1, 0.5, 2 / 3)),  # a pixel where there is nothing costs that frame
        (veason(0, [A]), carried((10, 10, 0)), (1, 1, 0.25, 0.5, (1 + 0.25 + 1) / 3)),  # the absent object is a truth too
        (veason(4, [A, B, [1, 1, 9, 9]]), carried((10, 20, 0), (0, 0, 0), (40, 40, 40)), (1, 1, 1, 2 / 3, 1)),  # extra: free in video
        (veason(8, [[0, 0, 0, 0]]), carried((0, 0, 0)), (1, 1, 0, 1, 1 / 3)),  # a frame without objects has one box of zeros
        (veason(5, [A]), carried((10, 20, 0)), (1, 1, 0, 0, 0)),  # not a shown frame
        (veason("4", [A, B]), carried((10, 20, 0), (0, 0, 0)), (1, 0, 1, 1, 1)),  # read by int(), but not in the format
        (veason(4.9, [A, B]), carried((10, 20, 0), (0, 0, 0)), (1, 0, 1, 1, 1)),
        (veason(False, [A]), carried((10, 20, 0)), (1, 1, 0.25, 0.5, 1)),  # false is the integer 0
        (veason(4, [A, "x"]), carried((10, 20, 0)), (1, 0.5, 1, 0, 0)),
        (veason(4, [A]) + ".", carried((10, 20, 1)), (0, 1, 1, 0.5, 2 / 3)),
        (veason(-1, [A]), carried((10, 20, 0)), (1, 1, 0, 0, 0)),
        (veason(4, [[float("nan")] * 4]), None, (1, 1, 1, 0, 0)),
        (veason(4, [[True, 100, 199, 199]]), None, (1, 1, 1, 10000 / 19900 / 2, 0)),  # true is 1, but no box for the segmenter
        (veason(4, [A + A]), None, (1, 0, 1, 1 / 10000 / 2, 0)),  # split in four as x1, x1, y1, y1, ...: two boxes of one pixel
        (completion({"keyframe_timestamp": 4, "bbox_2d_list": {"0": A}}), None, (1, 0, 1, 0, 0)),
        (completion("```json\n" + json.dumps({"keyframe_timestamp": 4, "bbox_2d_list": [A]}) + "\n```"), carried((10, 20, 0)), (1, 0, 0, 0, 0)),
        (completion("null"), None, (1, 0, 0, 0, 0)),
        (f"<think>a{veason_answer(4, [A])}</think>{veason_answer(4, [B])}", carried((10, 20, 0)), (1, 1, 1, 0.5, 0)),  # the masks are those of B
        (veason(4, []), None, (1, 0, 1, 0, 0)),
        (completion([A]), carried((10, 20, 0)), (1, 0, 0, 0, 0)),
        ("", None, (0, 0, 0, 0, 0)),
    ],
)
def test_veason_r1(text, masks, terms):
    from reward_service import parse_answer

    n = len(parse_answer(text).objects)
    if masks is not None:
        masks = {frame: m[:n] for frame, m in masks.items()}
    s = score(text, VIDEO, RewardConfig.preset("veason_r1"), predicted_masks=masks or {})
    names = ("think_format", "segmentation_format", "keyframe", "iou", "video_iou")
    assert tuple(s.terms[n] for n in names) == pytest.approx(terms)
    assert s.total == pytest.approx(sum(terms))


def test_veason_r1_stays_in_bounds_where_the_published_arithmetic_overflows():
    config = RewardConfig.preset("veason_r1")
    config.weights.video_iou = 0
    inverse = pow(3, -1, 2**64)  # 3 * inverse = 1 modulo 2^64: an area that wraps to 1
    for box in ([0, 0, 2**32 - 1, 2**32 - 1], [0, 0, 2, inverse - 1], [100, 100, 199, 2**63 - 1], [0, 0, 2**40, 2**40]):
        assert 0 <= score(veason(4, [box]), VIDEO, config).total <= 4


def test_veason_r1_inputs():
    config = RewardConfig.preset("veason_r1")
    with pytest.raises(MissingInput, match="target.frames"):
        score(veason(4, [A]), ONE, config, predicted_masks={})
    with pytest.raises(MissingInput, match="predicted_masks"):
        score(veason(4, [A]), VIDEO, config)
    with pytest.raises(MissingInput, match=r"target.frames\[0\]"):
        score(veason(0, [A]), Target((560, 560), frames={0: FrameTarget([A])}), config, predicted_masks={0: [square(1)]})
    with pytest.raises(ValueError, match="2 masks for an answer of 1 objects"):
        score(veason(4, [A]), VIDEO, config, predicted_masks=carried((1, 1, 1), (1, 1, 1)))
    with pytest.raises(ValueError, match=r"\(7, 7\)"):
        score(veason(4, [A]), VIDEO, config, predicted_masks={f: [square(1, (7, 7))] for f in (0, 4, 8)})


# ---- ReVSeg: two turns ----

FRAMES = Target(
    (840, 840),
    frames={0: FrameTarget([[0, 0, 9, 9]]), 5: FrameTarget([A]), 9: FrameTarget([None]), 12: FrameTarget([[0, 0, 49, 99]])},
)


def turns(frame, box):
    return completion([{"frame_idx": frame, "object description": "it"}]) + "\n" + completion([{"bbox_2d": box}])


@pytest.mark.parametrize(
    "text, terms",  # segmentation_format, keyframe, iou
    [
        (turns(5, A), (1, 1, 1)),
        (turns(12, [0, 0, 49, 99]), (1, 0.5, 1)),  # area 5000 of 0..10000
        (turns(12, A), (1, 0.5, 0)),
        (turns(9, A), (1, 0, 0)),  # absent there
        (turns(7, A), (1, 0, 0)),  # not one of the frames
        (turns(5, "x"), (0.75, 1, 0)),
        (turns("x", A), (0.75, 0, 0)),
        (turns(5, [100, 100, 199, 149]), (1, 1, 0)),  # exactly 0.5
        (turns(0, [0, 0, 9, 9]), (1, 0.01, 1)),
        (turns(5.0, A), (1, 1, 1)),
        (turns(True, A), (0.75, 0, 0)),
        (turns(5, [199, 199, 100, 100]), (1, 1, 0)),  # reversed
        (turns(5, [10**400] * 4), (0.75, 1, 0)),
        (turns(5, A) + " so", (0.75, 1, 1)),
        (turns(5, A) + completion([]), (1, 1, 1)),  # a third turn belongs to the second, whose first answer counts
        (completion('```json\n[{"frame_idx": 5}]\n```') + completion([{"bbox_2d": A}]), (0.75, 0, 0)),
        (completion([{"frame_idx": 5}]), (0.5, 1, 0)),  # turn 2 never came
        (turns(5, A)[:-9], (0.5, 1, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_revseg(text, terms):
    s = score(text, FRAMES, RewardConfig.preset("revseg"))
    assert tuple(s.terms[n] for n in ("segmentation_format", "keyframe", "iou")) == pytest.approx(terms)


def test_revseg_inputs():
    with pytest.raises(MissingInput, match="target.frames"):
        score("", ONE, RewardConfig.preset("revseg"))


# ---- sizes ----


def test_published_thresholds_hold_in_their_own_space():
    """A 420x420 frame: 10 of 840 are 5 pixels of the frame."""
    half = Target((420, 420), [[50, 50, 99, 99]], [[[75, 75], [60, 60]]])
    off = lambda by: [50 + by, 50 + by, 99 + by, 99 + by]
    for by, near in ((4.5, 1), (5, 0)):
        several = completion([item(off(by), [75, 75])])
        single = completion({"bbox": off(by), "points_1": [75, 75], "points_2": [60, 60]})
        assert score(several, half, RewardConfig.preset("vision_reasoner")).terms["box_l1"] == near
        assert score(single, half, RewardConfig.preset("seg_zero")).terms["box_l1"] == near


def test_weights_of_published_terms():
    config = RewardConfig(formula="vision_reasoner", weights=TermWeights(negative_point=0, iou=3, no_repeat=0))
    config.length.penalty = False
    assert score(completion([item(A, PA)]), ONE, config).total == 1 + 2 + 5
