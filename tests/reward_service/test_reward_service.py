"""A batch of items in, for each a score or the reason why it alone has none; masks asked for once a group."""

import asyncio
import re

import pytest
from scored import COMPLETIONS, GOOD, HEIGHT, MASKS, TARGETS, WIDTH, expected, item, items, mask, outcome

from reward_service import RewardConfig, Target, parse_answer, score
from reward_service.client import LocalClient, load
from reward_service.score_request import InvalidItem, ScoreRequest
from reward_service.serve_config import RewardServeConfig
from reward_service.service import RewardService
from segmentation_service.masks import encode_rle
from segmentation_service.service_request import Rle, SegmentRequest, SegmentResponse, ServiceError
from tests.conftest import ROOT

MASK_IOU = {"weights": {"mask_iou": 1.0}}


def ask(batch, service=None, config=None, **values):
    service = service or RewardService(config or RewardServeConfig())
    return asyncio.run(service.score(ScoreRequest(items=batch, **values))).scores


def reason(batch, **values):
    (found,) = ask([batch], **values)
    assert isinstance(found, InvalidItem) and not hasattr(found, "total")
    return found.reason


class Segmenting:
    """A segmentation service that answers every object with its box, filled; `faults` are raised for what they name."""

    def __init__(self):
        self.requests, self.fault, self.hangs = [], lambda request: None, False

    async def segment_async(self, request: SegmentRequest) -> SegmentResponse:
        self.requests.append(request)
        if self.hangs:
            await asyncio.Event().wait()
        if (error := self.fault(request)) is not None:
            raise error
        filled = [[Rle(**encode_rle(mask(*map(int, o.box)))) for o in h] for h in request.hypotheses]
        tracks = None
        if request.propagate:
            tracks = [{t: tuple(masks) for t in request.propagate} for masks in filled]
        return SegmentResponse(masks=filled, tracks=tracks)


def segmenting(**values):
    client = Segmenting()
    return client, RewardService(RewardServeConfig(**values), client)


@pytest.mark.parametrize("preset", [None, "vision_reasoner", "seg_zero", "pixelthink"])
def test_scores_are_those_of_the_plain_function(preset):
    batch = items()
    config = RewardConfig.preset(preset) if preset else RewardConfig()
    assert [outcome(s) for s in ask(batch, preset=preset)] == [expected(one, config) for one in batch]


def test_the_answer_is_told_in_pixels_of_the_frame():
    text = GOOD.replace("10, 10, 29, 29", "100, 200, 300, 500")
    (found,) = ask([item(text, units="relative_1000")])
    answer = parse_answer(text).to_frame("relative_1000", (HEIGHT, WIDTH), (HEIGHT, WIDTH))
    assert found.answer.objects[0].box == answer.objects[0].box and found.answer.think_format and found.answer.strict
    assert found.total == score(answer, Target(**TARGETS[0]), length=7).total
    (found,) = ask([item(policy_size=[HEIGHT * 2, WIDTH * 2])])
    answer = parse_answer(GOOD).to_frame("pixels", (HEIGHT * 2, WIDTH * 2), (HEIGHT, WIDTH))
    assert found.answer.objects[0].box == answer.objects[0].box and found.total == score(answer, Target(**TARGETS[0]), length=7).total


def test_settings_of_a_request_stand_over_those_of_the_server():
    config = RewardServeConfig(reward=RewardConfig(iou_threshold=0.99))
    totals = lambda **values: ask([item(COMPLETIONS[1])], config=config, **values)[0].terms["iou"]
    assert totals() == 0.0 and totals(reward={"iou_threshold": 0.5}) == 1.0 and totals(preset="videoseg_r1") == 1.0
    found = ask([item()], preset="vision_reasoner", reward={"weights": {"iou": 3}, "length": {"easy_budget": None}})[0]
    assert found.terms["weighted_iou"] == 3 * found.terms["iou"]


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(preset="vision_reasonor"), "did you mean 'vision_reasoner'?"),
        (dict(reward={"weight": {}}), "reward.weight: unknown key; did you mean 'weights'?"),
        (dict(reward={"weights": {"box_11": 1}}), "reward.weights.box_11: unknown key; did you mean 'box_l1'?"),
        (dict(reward={"length": {"unit": "letters"}}), "reward.length.unit='letters': choose one of"),
        (dict(reward={"weights": 3}), "reward.weights has settings of its own"),
        (dict(reward={"iou_threshold": "0.5"}), "reward.iou_threshold='0.5': must be a number"),
        (dict(reward={"iou_threshold": True}), "must be a number"),
        (dict(reward={"iou_threshold": float("nan")}), "must be a number"),
        (dict(reward={"iou_threshold": 1.5}), "must be between"),
        (dict(reward={"space_size": 840.5}), "must be a whole number"),
        (dict(reward={"length": {"easy_budget": "x"}}), "must be a number or null"),
        (dict(preset="vision_reasoner", reward={"negative_reach": 3.0}), "formula 'vision_reasoner' does not use it"),
        (dict(preset="seg_zero", reward={"weights": {"no_repeat": 1.0}}), "has no such term"),
    ],
)
def test_settings_that_cannot_be_refuse_the_request(values, said):
    with pytest.raises(ServiceError, match="422") as refused:
        ask([item()], **values)
    assert said in refused.value.message


@pytest.mark.parametrize(
    "wrong, said",
    [
        (3, "the item: "),
        ({"target": TARGETS[0]}, "completion: Field required"),
        (item(3), "completion: Input should be a valid string"),
        (item(lenght=3), "unknown key 'lenght'; did you mean 'length'?"),
        ({**item(), "target": {**TARGETS[0], "box": []}}, "target: unknown key 'box'; did you mean 'boxes'?"),
        ({**item(), "target": {"boxes": []}}, "target.image_size: Field required"),
        ({**item(), "target": {**TARGETS[0], "image_size": [0, 5]}}, "target.image_size.0"),
        ({**item(), "target": {**TARGETS[0], "boxes": [[1, 2, 3]]}}, "target.boxes.0"),
        ({**item(), "target": {**TARGETS[0], "boxes": [[1, 2, 3, float("nan")]]}}, "target.boxes.0.3: Input should be a finite number"),
        ({**item(), "target": {**TARGETS[0], "points": [[[1, 2]]]}}, "1 lists of points for 2 boxes"),
        ({**item(), "target": {**TARGETS[0], "masks": TARGETS[1]["masks"]}}, "1 masks for 2 boxes"),
        ({**item(), "target": {**TARGETS[1], "masks": [encode_rle(mask(0, 0, 1, 1, (5, 5)))]}}, "the target frame is (60, 100)"),
        ({**item(), "target": {**TARGETS[1], "masks": [{"size": [60, 100], "counts": "~"}]}}, "mask"),
        ({**item(), "target": {**TARGETS[1], "masks": [{"size": [2**20, 2**20], "counts": "0"}]}}, "pixels of masks and frame are more than"),
        ({**item(), "target": {"image_size": [2**20, 2**20]}}, "pixels of masks and frame are more than"),
        ({**item(), "target": {"image_size": [60, 100], "boxes": [[0, 0, 1, 1]] * 257}}, "257 objects"),
        ({**item(), "target": {"image_size": [60, 100], "frames": dict.fromkeys(range(5000), {})}}, "5000 entries"),
        (item(length=None), "pass length"),
        (item(length=-1), "length: "),
        (item(difficulty=float("inf")), "difficulty: "),
        (item(units="inches"), "units: "),
        (item(frame=-1), "frame: "),
    ],
)
def test_an_item_that_cannot_be_scored_says_why_and_changes_nothing_about_the_others(wrong, said):
    batch = [item(), wrong, item(COMPLETIONS[1])]
    scores = ask(batch)
    assert [outcome(s) for s in (scores[0], scores[2])] == [expected(batch[0]), expected(batch[2])]
    assert scores[1].invalid and said in scores[1].reason and len(scores[1].reason) < 1100 and not scores[1].temporary


def test_a_missing_input_is_invalid_whatever_the_completion_was():
    target = {key: value for key, value in TARGETS[0].items() if key != "masks"}
    assert "negative_point" in reason({**item(), "target": target}) and "negative_point" in reason({**item(""), "target": target})


def test_totals_that_are_no_number_are_invalid():
    assert "total is" in reason(item(length=1e9), reward={"length": {"beta": 1e308, "clamp": False}})


def test_too_many_items():
    with pytest.raises(ServiceError, match="413: 3 items are more than the 2"):
        ask([item()] * 3, config=RewardServeConfig(max_items=2))
    assert ask([]) == ()


def test_a_million_wrong_things_are_one_error():
    many = {str(n): 0 for n in range(3000)}
    for wrong in (many, {**item(), "target": {**TARGETS[0], "boxes": [[]] * 3000}}, {**item(), "target": {**TARGETS[0], **many}}):
        (found,) = ScoreRequest(items=[wrong]).items
        assert len(found.reason) < 300
    with pytest.raises(ValueError, match="5000 entries are more than"):
        ScoreRequest(items=[{}] * 5000)


def test_masks_that_come_with_the_item():
    given = item(predicted_masks=[encode_rle(MASKS[0])])
    (found,) = ask([given], reward=MASK_IOU)
    wanted = score(GOOD, Target(**TARGETS[0]), mask_iou_config(), length=7, predicted_masks=[MASKS[0]])
    assert (found.total, found.terms) == (wanted.total, wanted.terms)
    assert "2 masks for an answer of 1 objects" in reason(item(predicted_masks=[None, None]), reward=MASK_IOU)
    assert "send predicted_masks, or start the service with segmentation=URL" in reason(item(), reward=MASK_IOU)
    assert ask([item("no object")], reward=MASK_IOU)[0].terms["mask_iou"] == 0.0, "an answer without objects needs none"


def mask_iou_config():
    config = RewardConfig()
    config.weights.mask_iou = 1.0
    return config


def test_masks_are_asked_for_once_a_group():
    client, service = segmenting()
    batch = [item(completion, video=video, frame=frame) for video, frame in (("a", 1), ("b", 1), ("a", 2)) for completion in COMPLETIONS[:4]]
    scores = ask(batch, service, reward=MASK_IOU)
    assert sorted((r.video, r.frame, len(r.hypotheses)) for r in client.requests) == [("a", 1, 3), ("a", 2, 3), ("b", 1, 3)]
    for given, found in zip(batch, scores):
        answer = parse_answer(given["completion"])
        masks = [mask(*map(int, o.box)) for o in answer.objects]
        assert found.total == score(answer, Target(**TARGETS[0]), mask_iou_config(), length=7, predicted_masks=masks).total
    prompt = client.requests[0].hypotheses[0][0]
    assert prompt.points == ((20, 20), (33, 20)) and prompt.labels == (1, 0)
    assert "`video` and `frame`" in ask([item(frame=3)], service, reward=MASK_IOU)[0].reason


def test_answers_that_would_be_too_much_for_one_request_are_several():
    client, service = segmenting()
    one = '{"bbox_2d": [10, 10, 29, 29], "negative_point_2d": [' + ", ".join(["[1, 1]"] * 100) + "]}"
    many = f"<think>x</think><answer>[{', '.join([one] * 100)}]</answer>"
    scores = ask([item(many, video="a", frame=0)] * 3 + [item(video="a", frame=0)] * 70, service, reward=MASK_IOU)
    assert [len(r.hypotheses) for r in client.requests] == [2, 64, 7] and [sum(map(len, r.hypotheses)) for r in client.requests] == [200, 163, 7]
    assert all(len(r.hypotheses) <= 64 and all(len(o.points) <= 64 for h in r.hypotheses for o in h) for r in client.requests)
    assert len({s.total for s in scores[:3]}) == len({s.total for s in scores[3:]}) == 1


def test_video_masks_start_where_the_answer_says():
    client, service = segmenting()
    frames = {str(t): {"boxes": [[10, 10, 29, 29]], "masks": [encode_rle(MASKS[0])]} for t in (3, 8)}
    target = {"image_size": [HEIGHT, WIDTH], "boxes": [[10, 10, 29, 29]], "frames": frames}
    text = '<think>a</think><answer>{"keyframe_timestamp": %s, "bbox_2d_list": [[10, 10, 29, 29]]}</answer>'
    batch = [{"completion": text % t, "target": target, "video": "v"} for t in (3, 8, 5, '"x"')]
    scores = ask(batch, service, preset="veason_r1")
    assert sorted((r.frame, r.propagate) for r in client.requests) == [(3, (3, 8)), (8, (3, 8))]
    assert [s.terms["video_iou"] for s in scores] == [1.0, 1.0, 0.0, 0.0]
    brought = {"3": [encode_rle(MASKS[0])], "8": [encode_rle(MASKS[1])]}
    (found,) = ask([{**batch[0], "predicted_tracks": brought}], preset="veason_r1")
    assert found.terms["video_iou"] == 0.5


def test_video_masks_start_on_the_target_frame_whatever_the_answer_says():
    client, service = segmenting()
    frames = {str(t): {"masks": [encode_rle(MASKS[0])]} for t in (3, 8)}
    target = {**TARGETS[1], "frames": frames}
    text = '<think>a</think><answer>[{"bbox_2d": [10, 10, 29, 29], "point_2d": [20, 20], "frame_idx": 8}]</answer>'
    asked = {"completion": text, "target": target, "video": "v", "frame": 5, "length": 1}
    settings = {"accuracy_iou": "video", "iou_grading": "graded"}
    (found,) = ask([asked], service, reward=settings)
    assert [(r.frame, r.propagate) for r in client.requests] == [(5, (3, 8))] and found.terms["iou"] == 1.0
    assert "`video` and `frame`" in ask([{**asked, "frame": None}], service, reward=settings)[0].reason
    assert "target.frames" in ask([{**asked, "target": TARGETS[1]}], service, reward=settings)[0].reason


EVERY_MASK_TERM = {
    "accuracy_iou": "video",
    "weights": {"mask_iou": 1.0, "video_quality": 1.0, "temporal_consistency": 1.0},
    **dict.fromkeys(("iou_grading", "mask_iou_grading", "video_quality_grading"), "graded"),
}


def test_terms_on_the_target_frame_and_over_the_video_are_one_request():
    client, service = segmenting()
    frames = {str(t): {"masks": [encode_rle(MASKS[0])]} for t in (3, 8)}
    batch = [item(completion, 1, video="v", frame=5) for completion in (GOOD, COMPLETIONS[2], COMPLETIONS[3])]
    for one in batch:
        one["target"] = {**one["target"], "frames": frames}
    scores = ask(batch, service, reward=EVERY_MASK_TERM)
    ((video, frame, propagate, hypotheses),) = [(r.video, r.frame, r.propagate, len(r.hypotheses)) for r in client.requests]
    assert (video, frame, propagate, hypotheses) == ("v", 5, (3, 8), 2)
    names = ("iou", "mask_iou", "video_quality", "temporal_consistency")
    assert [[s.terms[name] for name in names] for s in scores] == [[1.0] * 4, [0.0] * 4, [0.0] * 4]
    batch = [{**one, "frame": None, "target": {**one["target"], "frame": 5}} for one in batch]
    assert ask(batch, service, reward=EVERY_MASK_TERM) == scores and client.requests[1] == client.requests[0]
    assert "frame=4 and target.frame=5" in ask([{**batch[0], "frame": 4}], service, reward=EVERY_MASK_TERM)[0].reason


def test_masks_on_the_target_frame_may_come_beside_those_of_the_video_or_among_them():
    target = {**TARGETS[1], "frames": {"3": {"masks": [encode_rle(MASKS[0])]}}}
    half, full = ([encode_rle(m)] for m in (mask(10, 10, 29, 19), MASKS[0]))
    graded = lambda reward=EVERY_MASK_TERM, **values: ask([{**item(), "target": target, **values}], reward=reward)[0]
    beside = graded(predicted_tracks={"3": full}, predicted_masks=half, frame=5)
    among = graded(predicted_tracks={"3": full, "5": half}, frame=5)
    assert beside == among and (among.terms["mask_iou"], among.terms["video_quality"]) == (0.5, 1.0)
    assert "set target.frame" in graded(predicted_tracks={"3": full}, predicted_masks=half).reason
    assert "send predicted_tracks" in graded(predicted_masks=half, frame=5).reason
    assert "predicted_masks[5] is None" in graded(predicted_tracks={"3": full}, frame=5).reason
    assert graded({"accuracy_iou": "video"}, predicted_tracks={"3": full}, predicted_masks=half).terms["iou"] == 1.0


def test_the_fault_of_one_answer_stays_with_it():
    client, service = segmenting()
    client.fault = lambda request: ServiceError(422, "cannot") if any(o.box[0] == 70 for h in request.hypotheses for o in h) else None
    scores = ask([item(c, video="a", frame=0) for c in COMPLETIONS[:3]], service, reward=MASK_IOU)
    assert [s.model_dump().get("invalid", False) for s in scores] == [False, False, True] and "422: cannot" in scores[2].reason and not scores[2].temporary
    assert len(client.requests) == 4, "together, then each alone"


def test_an_answer_of_the_segmentation_service_that_does_not_fit_stays_with_its_group():
    client, service = segmenting()
    client.fault = lambda request: RuntimeError("odd") if request.video == "a" else None
    frames = {"-1": {"boxes": [], "masks": []}}
    batch = [item(video="a", frame=0), item(video="b", frame=0), {**item(video="b", frame=0), "target": {**TARGETS[0], "frames": frames}}]
    scores = ask(batch, service, reward=MASK_IOU)
    assert "RuntimeError: odd" in scores[0].reason and scores[1].valid and scores[2].valid
    assert "ValidationError" in ask(batch[2:], service, reward={"accuracy_iou": "video"})[0].reason


@pytest.mark.parametrize("status", [429, 503])
def test_a_segmentation_service_that_is_full_is_a_temporary_failure(status):
    client, service = segmenting()
    client.fault = lambda request: ServiceError(status, "full") if request.video == "a" else None
    scores = ask([item(video="a", frame=0), item(video="b", frame=0), item(COMPLETIONS[3], video="a", frame=0)], service, reward=MASK_IOU)
    assert [getattr(s, "temporary", None) for s in scores] == [True, None, None] and "full" in scores[0].reason and len(client.requests) == 2


def test_a_segmentation_service_that_hangs_is_given_up_after_its_time():
    client, service = segmenting(segmentation_seconds=0.2)
    client.hangs = True
    batch = [item(video=video, frame=0) for video in "abcde"] + [item("no objects")]
    scores = ask(batch, service, reward=MASK_IOU)
    assert [getattr(s, "temporary", None) for s in scores] == [True] * 5 + [None] and "within 0.2 s" in scores[0].reason
    assert service.counts == {"requests": 1, "items": 6, "invalid": 5}
    assert ask(batch, service)[0].total == expected(item())[0], "what needs no masks goes on"


def test_a_segmentation_service_that_is_not_there():
    service = load(RewardServeConfig(segmentation="http://127.0.0.1:9", segmentation_seconds=0.3))
    (found,) = ask([item(video="a", frame=0)], service, reward=MASK_IOU)
    assert found.temporary and "no masks from the segmentation service" in found.reason


def test_a_local_client_may_be_called_where_an_event_loop_runs():
    client = LocalClient(RewardService(RewardServeConfig()))
    request = ScoreRequest(items=[item()])

    async def both():
        return client.score(request), await client.score_async(request)

    first, second = asyncio.run(both())
    assert first == second and first.scores[0].total == expected(item())[0] and client.stats()[0]["items"] == 2
    client.close()


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(replicas=0), "replicas must be at least 1"),
        (dict(max_items=5000), "max_items must be between"),
        (dict(segmentation="localhost:8000"), "is no URL"),
    ],
)
def test_settings_that_cannot_work(values, said):
    with pytest.raises(ValueError, match=said):
        load(RewardServeConfig(**values))


def test_the_examples_of_the_docs_run(capsys):
    doc = (ROOT / "docs/reward_service.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", doc, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == "2.0 of 7.0\n"
    request = ScoreRequest.model_validate_json(re.search(r"-d '\n(.*?)'\n```", doc, re.DOTALL)[1])
    assert asyncio.run(RewardService(RewardServeConfig()).score(request)).scores[0].total == 7.0
