"""The default preset, term by term, by hand: 840x840 frames unless a test is about sizes."""

import json

import numpy as np
import pytest

from reward_service import LengthConfig, MissingInput, RewardConfig, Target, TermWeights, parse_answer, score, score_group

A, B = [100, 100, 199, 199], [400, 400, 499, 499]
PA, PB = [150, 150], [450, 450]


def masks_of(boxes, hw=(840, 840)):
    masks = np.zeros((len(boxes), *hw), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return masks


def target(*boxes_and_points):
    boxes = [b for b, _ in boxes_and_points]
    return Target((840, 840), boxes, [[p] for _, p in boxes_and_points], masks=masks_of(boxes))


ONE, TWO, NOTHING = target((A, PA)), target((A, PA), (B, PB)), Target((840, 840), [], [])


def item(box, point, negative=None):
    return {"bbox_2d": box, "point_2d": point} | ({} if negative is None else {"negative_point_2d": negative})


def completion(items, think="It is the left one. It moves."):
    return f"<think>{think}</think>\n<answer>{items if isinstance(items, str) else json.dumps(items)}</answer>"


def shifted(box, by):
    return [v + by for v in box]


@pytest.mark.parametrize(
    "truth, items, accuracy, negative",
    [
        (ONE, [item(A, PA)], (1, 1, 1), 0),
        (ONE, [item(A, PA, [90, 150])], (1, 1, 1), 1),
        (TWO, [item(B, PB), item(A, PA)], (1, 1, 1), 0),  # the order does not matter
        (TWO, [item(A, PA)], (0.5, 0.5, 0.5), 0),  # one missed
        (ONE, [item(A, PA), item(B, PB)], (0.5, 0.5, 0.5), 0),  # one too many
        (ONE, [item(A, PA)] * 4, (0.25, 0.25, 0.25), 0),
        (ONE, [item(A, PA)] * 200, (1 / 200,) * 3, 0),  # 120 are matched, all of them count
        (ONE, [item(shifted(A, 9), PA)], (1, 1, 1), 0),  # IoU 8281 / 11719, mean corner distance 9
        (ONE, [item(shifted(A, 10), PA)], (1, 0, 1), 0),  # IoU 8100 / 11900, distance 10 is not below 10
        (ONE, [item([100, 100, 199, 149], [150, 149])], (0, 0, 1), 0),  # IoU exactly 0.5 is not above it; distance 12.5
        (ONE, [item([100, 100, 199, 150], [150, 150])], (1, 0, 1), 0),  # IoU 0.51, distance 12.25
        (ONE, [item(A, [180, 150])], (1, 1, 0), 0),  # 30 away
        (ONE, [item(A, [179, 150])], (1, 1, 1), 0),
        (ONE, [item([151, 100, 250, 199], PA)], (0, 0, 0), 0),  # near enough, but outside its own box
        (ONE, [item([199, 199, 100, 100], PA)], (0, 0, 0), 0),  # reversed: no overlap, corners 99 away
        (ONE, [{"bbox_2d": A}], (1, 1, 0), 0),
        (ONE, [{"point_2d": PA}], (0, 0, 0), 0),  # a point without a box lies in no box
        (ONE, [item(A, PA), 5, {"bbox_2d": "x"}], (1 / 3,) * 3, 0),  # malformed items count as predictions
        (ONE, [], (0, 0, 0), 0),
        (NOTHING, [], (1, 1, 1), 0),
        (NOTHING, [item(A, PA, [10, 10])], (0, 0, 0), 0),
        (NOTHING, [{}], (0, 0, 0), 0),
        (ONE, [item(A, PA, [150, 150])], (1, 1, 1), 0),  # on the target
        (ONE, [item(A, PA, [60, 150])], (1, 1, 1), 1),  # 40 to the left
        (ONE, [item(A, PA, [59, 150])], (1, 1, 1), 0),
        (ONE, [item(A, PA, [80, 80])], (1, 1, 1), 1),  # 20 + 20
        (ONE, [item(A, PA, [79, 80])], (1, 1, 1), 0),
        (ONE, [item(A, PA, [[90, 150], [150, 150], [500, 500]])], (1, 1, 1), 1 / 3),
        (TWO, [item(A, PA, [390, 450]), item(B, PB, [150, 150])], (1, 1, 1), 0.5),  # near any target, on no target
    ],
)
def test_accuracy_and_negative_points(truth, items, accuracy, negative):
    s = score(completion(items), truth, length=10)
    assert (s.terms["iou"], s.terms["box_l1"], s.terms["point"]) == pytest.approx(accuracy)
    assert s.terms["negative_point"] == pytest.approx(negative)
    assert s.valid and s.terms["length_penalty"] == 1


@pytest.mark.parametrize(
    "truth, text, think, segmentation, no_repeat",
    [
        (ONE, completion([item(A, PA)]), 1, 2, 1),
        (ONE, completion([item(A, PA)]) + "\n", 0, 2, 1),
        (ONE, "well " + completion([item(A, PA)]), 0, 2, 1),
        (ONE, completion([item(A, PA), {"bbox_2d": A}]), 1, 1.5, 1),
        (ONE, completion([item(["100", 100, 199, 199], PA)]), 1, 1, 1),
        (ONE, completion({"bbox_2d": A, "point_2d": PA}), 1, 0, 1),
        (ONE, completion([]), 1, 0, 1),
        (NOTHING, completion([]), 1, 2, 1),
        (NOTHING, completion("[,]"), 1, 0, 1),
        (ONE, completion([item(A, PA)], think="So. So. So. So."), 1, 2, 0),
        (ONE, "", 0, 0, 1),
    ],
)
def test_formats(truth, text, think, segmentation, no_repeat):
    s = score(text, truth, length=0)
    assert (s.terms["think_format"], s.terms["segmentation_format"], s.terms["no_repeat"]) == (think, segmentation, no_repeat)


def test_salvaged_answers_earn_no_accuracy():
    s = score(f"<think>a</think><answer>```json\n{json.dumps([item(A, PA, [90, 150])])}\n```</answer>", ONE, length=0)
    assert s.answer.objects and s.total == 2  # think format and no repeat


def test_total_is_the_weighted_sum_times_the_penalty():
    text, config = completion([item(A, PA, [90, 150])]), RewardConfig(weights=TermWeights(iou=2, point=0.5))
    assert score(text, ONE, length=96).total == 8
    s = score(text, ONE, config, difficulty=6, length=356)
    assert s.terms["length_penalty"] == pytest.approx(0.8) and s.terms["original"] == 8.5 and s.total == pytest.approx(6.8)
    assert s.terms["weighted_iou"] == 2 and s.terms["iou"] == 1 and s.terms["weighted_point"] == 0.5
    assert sum(v for k, v in s.terms.items() if k.startswith("weighted_")) == s.terms["original"]
    assert s.diagnostics["budget"] == 256 and s.diagnostics["length"] == 356 and s.diagnostics["difficulty"] == 6


def test_matching_maximises_the_weighted_sum():
    # Item 0 has A's box, item 1 has A's point, and B's box by its corners: with the weights both pairings are forced.
    items = [item(A, [101, 101]), item([130, 130, 169, 169], PA)]
    assert score(completion(items), ONE, length=0).terms["iou"] == 0.5
    by_point = RewardConfig(weights=TermWeights(point=5))
    s = score(completion(items), ONE, by_point, length=0)
    assert (s.terms["iou"], s.terms["box_l1"], s.terms["point"]) == (0, 0, 0.5)


def test_switched_off_terms_need_no_input_and_do_not_appear():
    bare = Target((840, 840), [A])
    config = RewardConfig(weights=TermWeights(point=0, negative_point=0), length=LengthConfig(penalty=False))
    s = score(completion([item(A, PA)]), bare, config)
    assert "point" not in s.terms and "negative_point" not in s.terms and s.total == 6


@pytest.mark.parametrize(
    "truth, config, arguments, message",
    [
        (Target((840, 840), [A], [[PA]]), RewardConfig(), {"length": 1}, "target.masks"),
        (Target((840, 840), [A], masks=masks_of([A])), RewardConfig(), {"length": 1}, "target.points"),
        (Target((840, 840), [A], [[]], masks=masks_of([A])), RewardConfig(), {"length": 1}, "target.points"),
        (ONE, RewardConfig(), {}, "pass length"),
        (ONE, RewardConfig(accuracy_iou="mask"), {"length": 1}, "predicted_masks"),
        (ONE, RewardConfig(weights=TermWeights(mask_iou=1)), {"length": 1}, "predicted_masks"),
    ],
)
@pytest.mark.parametrize("text", [completion([item(A, PA)]), ""])
def test_a_missing_input_is_an_error_whatever_the_completion(truth, config, arguments, message, text):
    with pytest.raises(MissingInput, match=message):
        score(text, truth, config, **arguments)


def test_inputs_that_do_not_fit():
    config, text = RewardConfig(accuracy_iou="mask"), completion([item(A, PA)])
    with pytest.raises(ValueError, match="0 masks for an answer of 1 objects"):
        score(text, ONE, config, length=1, predicted_masks=[])
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        score(text, ONE, config, length=1, predicted_masks=np.zeros((1, 5, 5), bool))
    with pytest.raises(ValueError, match="None for an answer with objects"):
        score_group([text], ONE, config, lengths=[1], predicted_masks=[None])
    with pytest.raises(ValueError, match="2 lengths for 1 completions"):
        score_group([text], ONE, lengths=[1, 2])
    with pytest.raises(ValueError, match="frame of"):
        score(parse_answer(text).to_frame("pixels", (840, 840), (480, 640)), ONE, length=1)
    with pytest.raises(ValueError, match="share"):
        score_group([text, parse_answer(text).to_frame("pixels", (840, 840), (840, 840))], ONE, lengths=[1, 1])
    with pytest.raises(TypeError, match="NoneType"):
        score(None, ONE, length=1)
    assert score_group([], ONE) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_size": (0, 5)}, "image_size"),
        ({"image_size": (5, 5), "boxes": [[1, 2, 3]]}, "four finite"),
        ({"image_size": (5, 5), "boxes": [[1, 2, 3, float("nan")]]}, "four finite"),
        ({"image_size": (5, 5), "boxes": [[1, 2, 3, 4]], "points": []}, "one list an object"),
        ({"image_size": (5, 5), "boxes": [[1, 2, 3, 4]], "points": [[1, 2]]}, "per object"),
        ({"image_size": (5, 5), "boxes": [[1, 2, 3, 4]], "masks": []}, "one mask an object"),
    ],
)
def test_a_target_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Target(**arguments)


def test_distances_are_measured_in_normalised_space():
    """A 420x210 (W x H) frame: a pixel is 2 wide and 4 high in the space of 840."""
    box, point = [100, 50, 199, 99], [150, 75]
    truth = Target((210, 420), [box], [[point]], masks=masks_of([box], (210, 420)))
    text = lambda b, p, n: completion([item(b, p, n)])
    near = score(text([100, 50, 199, 99], [150, 82], [80, 75]), truth, length=0)  # point 28 off, negative 20 * 2 = 40
    assert (near.terms["point"], near.terms["negative_point"]) == (1, 1)
    far = score(text([105, 55, 204, 104], [150, 83], [100, 110]), truth, length=0)  # corners (10+20+10+20)/4, 32, 11 * 4
    assert (far.terms["box_l1"], far.terms["point"], far.terms["negative_point"]) == (0, 0, 0)
    raw = score(text([105, 55, 204, 104], [150, 83], [100, 110]), truth, RewardConfig(space="raw"), length=0)
    assert (raw.terms["box_l1"], raw.terms["point"], raw.terms["negative_point"]) == (1, 1, 1)


def test_units_of_the_policy():
    """The same answer in pixels of a 112x112 image, in 0..1000, and in frame pixels."""
    truth = Target((480, 640), [[160, 120, 320, 240]], [[[240, 180]]], masks=masks_of([[160, 120, 320, 240]], (480, 640)))
    in_pixels = parse_answer(completion([item([28, 28, 56, 56], [42, 42], [24, 42])])).to_frame("pixels", (112, 112), (480, 640))
    relative = parse_answer(completion([item([250, 250, 500, 500], [375, 375], [214, 375])])).to_frame("relative_1000", (112, 112), (480, 640))
    in_frame = completion([item([160, 120, 320, 240], [240, 180], [137, 180])])
    for answer in (in_pixels, relative, in_frame):
        s = score(answer, truth, length=0)
        assert s.total == 8, s.terms
    # Raw pixels of the policy's image: a corner distance of 8 of 112 pixels is below 10 there, and 60 of 840.
    off = parse_answer(completion([item([36, 36, 64, 64], [42, 42])])).to_frame("pixels", (112, 112), (480, 640))
    assert score(off, truth, length=0).terms["box_l1"] == 0
    assert score(off, truth, RewardConfig(space="raw"), length=0).terms["box_l1"] == 1


def test_no_rounding_stands_between_an_answer_and_its_thresholds():
    """Corners exactly 10 apart on an 840x840 policy image stay so, whatever the frame: not below 10."""
    truth = Target((854, 854), [[v * 854 / 840 for v in A]], [[[152, 152]]], masks=np.zeros((1, 854, 854), bool))
    answer = parse_answer(completion([item(shifted(A, 10), PA)])).to_frame("pixels", (840, 840), (854, 854))
    assert score(answer, truth, length=0).terms["box_l1"] == 0


def test_iou_of_masks_replaces_that_of_boxes():
    config = RewardConfig(accuracy_iou="mask")
    text = completion([item(B, PB), item(A, PA)])
    half = masks_of([B, A])
    half[1, :, 150:] = False  # half of A: IoU exactly 0.5
    assert score(text, TWO, config, length=0, predicted_masks=masks_of([B, A])).terms["iou"] == 1
    assert score(text, TWO, config, length=0, predicted_masks=masks_of([A, B])).terms["iou"] == 0  # boxes pair them otherwise
    s = score(text, TWO, config, length=0, predicted_masks=half)
    assert s.terms["iou"] == 0.5 and s.terms["box_l1"] == 1 and s.diagnostics["box_iou"] == 1
    assert s.diagnostics["mask_iou"] == 0.75
    graded = RewardConfig(accuracy_iou="mask", iou_grading="graded")
    assert score(text, TWO, graded, length=0, predicted_masks=half).terms["iou"] == 0.75
    assert score(text, TWO, config, length=0, predicted_masks=[masks_of([B])[0], None]).terms["iou"] == 0.5


def test_masks_may_be_run_lengths():
    from segmentation_service.masks import encode_rle

    rle = [encode_rle(m) for m in masks_of([A])]
    truth = Target((840, 840), [A], [[PA]], masks=rle)
    s = score(completion([item(A, PA, [90, 150])]), truth, RewardConfig(accuracy_iou="mask"), length=0, predicted_masks=rle)
    assert s.total == 8


def test_mask_iou_term():
    config = RewardConfig(weights=TermWeights(mask_iou=1))
    one = lambda items, masks, truth=ONE, c=config: score(completion(items), truth, c, length=0, predicted_masks=masks).terms["mask_iou"]
    assert one([item(A, PA)], masks_of([A])) == 1
    assert one([item(A, PA)], masks_of([B])) == 0
    assert one([], []) == 0
    assert one([], [], NOTHING) == 1
    assert one([item(A, PA)], np.zeros((1, 840, 840), bool), NOTHING) == 0  # any object is wrong there
    assert one('{"bbox_2d": [100, 100, 199, 199]}', masks_of([A])) == 0  # salvaged
    graded = RewardConfig(weights=TermWeights(mask_iou=1), mask_iou_grading="graded")
    assert one([item(A, PA), item(B, PB)], masks_of([A, B]), ONE, graded) == 0.5


def test_graded_terms():
    config = RewardConfig(iou_grading="graded", box_l1_grading="graded", point_grading="graded", negative_grading="graded")
    s = score(completion([item(shifted(A, 10), [150, 180], [40, 150])]), ONE, config, length=0)
    assert s.terms["iou"] == pytest.approx(8100 / 11900)
    assert s.terms["box_l1"] == pytest.approx(0.75)  # 10 of 4 * 10
    assert s.terms["point"] == pytest.approx(0.75)  # 30 of 4 * 30
    assert s.terms["negative_point"] == pytest.approx(1 - 20 / 120)  # 60 away: 20 past tau, of 3 * 40


def test_no_repeat_may_read_the_reasoning_only():
    text = completion('[{"bbox_2d": [10.5, 10.5, 10.5, 10.5], "point_2d": [10.5, 10.5]}]')
    assert score(text, ONE, length=0).terms["no_repeat"] == 0
    assert score(text, ONE, RewardConfig(no_repeat_scope="think"), length=0).terms["no_repeat"] == 1


def test_a_group_scores_like_its_completions_one_by_one():
    rng = np.random.default_rng(0)
    texts = ["", completion("[1"), completion([])]
    for _ in range(20):
        boxes = [shifted([A, B][rng.integers(2)], int(rng.integers(-12, 13))) for _ in range(rng.integers(0, 5))]
        texts.append(completion([item(b, [b[0] + 40, b[1] + 50], [b[0] - 20, b[1]]) for b in boxes]))
    lengths = rng.integers(0, 400, len(texts)).tolist()
    together = score_group(texts, TWO, difficulty=4, lengths=lengths)
    for text, used, s in zip(texts, lengths, together):
        alone = score(text, TWO, difficulty=4, length=used)
        assert (s.total, s.terms, s.diagnostics) == (alone.total, alone.terms, alone.diagnostics)


def test_targets_travel_without_what_they_cached():
    import pickle

    score(completion([item(A, PA, [90, 150])]), ONE, length=0)
    again = pickle.loads(pickle.dumps(ONE))
    assert ONE._cache and not again._cache and score(completion([item(A, PA)]), again, length=0).total == 7
