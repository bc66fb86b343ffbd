"""Rewards of propagated masks in the loop: a group is tracked once, by the real actor, and scored on the annotated frames."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cluster import config, config_files
from cluster.draws import BrokenEpisode, Draws
from cluster.errors import RunFailed
from cluster.errors import PartLost
from cluster.evaluation import held_out_metrics
from cluster.expression_scores import score_video
from cluster.metrics import completion_metrics
from cluster.rollout_rows import scored_completions
from cluster.run import Run
from cluster.scoring import score_group
from cluster.trainer import scored
from reward_service import RewardConfig
from reward_service.measures import j_and_f
from rollout.completion import Completion
from segmentation_service.masks import decode_rle, mask_iou
from segmentation_service.video import VideoError, VideoReference
from tests.cluster.test_loop import settings

EVERY_MASK_TERM = [
    "reward.accuracy_iou=video",
    *(f"reward.weights.{term}=1" for term in ("mask_iou", "video_quality", "temporal_consistency")),
    *(f"reward.{term}_grading=graded" for term in ("mask_iou", "video_quality")),
]


@pytest.fixture(scope="module")
def located(toy_data):
    return config_files.locate(config.load("debug", settings(toy_data, *EVERY_MASK_TERM)))


@pytest.fixture(scope="module")
def draws(located):
    return Draws.of_run(located)[1]


def completion(prompt, objects):
    """Boxes and points given in pixels of the frame, said in those of the policy's image."""
    (height, width), (frame_height, frame_width) = prompt.policy_hw, prompt.frame_hw
    scale = np.array([width / frame_width, height / frame_height])
    items = [{"bbox_2d": np.rint(np.reshape(box, (2, 2)) * scale).ravel().tolist(), "point_2d": np.rint(point * scale).tolist()} for box, point in objects]
    text = f"<think>It is here.</think><answer>{json.dumps(items)}</answer>"
    return Completion(np.zeros(3, np.int32), np.zeros(3, np.float32), text, "stop", (("0", 3),), 0)


def right_and_wrong(draw):
    """Completions that name the targets, a corner of the frame, and nothing."""
    right = [(box, np.array(points[0])) for box, points in zip(draw.target.boxes, draw.target.points)]
    return [completion(draw.prompt, objects) for objects in (right, [([0, 0, 3, 3], np.array([1, 1]))], [])]


def test_a_group_is_tracked_once_and_earns_the_mean_j_of_its_masks(ray_session, located, draws, tmp_path):
    import ray

    from cluster.replicas import Replicas
    from cluster.timeline import Timeline
    from segmentation_service.actor import SegmenterActor

    actor = SegmenterActor.options(num_cpus=0).remote(located.segmentation)
    run = SimpleNamespace(config=located, draws=draws, segmenters=Replicas("segmenter", [actor], ray.kill, None, None, 120.0, 0, print, Timeline("unused")))
    draw = max((d for d in draws.held_out(6)[0] if len(d.target) == 1), key=lambda d: d.target.masks.sum())

    async def scored():
        return await Run.score(run, draw, right_and_wrong(draw), masks=False, online=None, propagated=True)

    try:
        ray.get(actor.ready.remote(), timeout=120)
        group = asyncio.run(scored())
        tracked = ray.get(actor.stats.remote())["frames_propagated"]
        expected = ray.get(actor.propagate_group.remote(draw.video, draw.prompt.target_frame, [group.masks[0]]))[0]
    finally:
        ray.kill(actor)
    assert group.failure is None and tracked == draw.episode.num_frames - 1
    (target,) = draw.episode.objects
    truth = {a.frame: decode_rle({"size": list(draw.target.image_size), "counts": a.counts}) for a in target.annotations}
    nowhere = np.zeros(draw.target.image_size, bool)
    found_THW = np.stack([decode_rle(expected[t][0]) for t in range(draw.episode.num_frames)])
    true_THW = np.stack([truth.get(t, nowhere) for t in range(draw.episode.num_frames)])
    j = np.mean([mask_iou(p, g) for p, g in zip(found_THW, true_THW)])
    drift = np.mean([abs(mask_iou(*found_THW[t : t + 2]) - mask_iou(*true_THW[t : t + 2])) for t in range(len(found_THW) - 1)])
    assert j > 0.8  # a large shape, which the toy SAM2 and XMem find
    assert group.scores[0].terms["iou"] == pytest.approx(j) and group.video_ious[0] == pytest.approx(j)
    assert group.scores[2].terms["iou"] == 0 and group.scores[1].terms["iou"] < 0.5 * j
    assert group.scores[0].terms["mask_iou"] == pytest.approx(mask_iou(decode_rle(group.masks[0][0]), draw.target.masks[0]))
    assert group.scores[0].terms["video_quality"] == pytest.approx(j_and_f(found_THW, true_THW).j_and_f)
    assert group.scores[0].terms["temporal_consistency"] == pytest.approx(j * (1 - drift))
    assert [group.scores[2].terms[term] for term in ("mask_iou", "video_quality", "temporal_consistency")] == [0, 0, 0]
    metrics = completion_metrics(scored_completions([group], version=0))
    assert metrics["reward/term/video_quality"] == pytest.approx(np.mean([s.terms["video_quality"] for s in group.scores]))
    held_out = held_out_metrics([group])
    assert held_out["iou/video"] == pytest.approx(j) and held_out["j_and_f"] == pytest.approx(j_and_f(found_THW, true_THW).j_and_f)
    for t, mask in enumerate(found_THW):  # as `videoseg eval` leaves them
        file = tmp_path / draw.episode.video_id / draw.episode.expression_id / f"{t:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(file)
    (evaluated,) = score_video([draw.episode], tmp_path)
    assert (held_out["iou/video"], held_out["f/video"]) == pytest.approx((evaluated.j, evaluated.f), abs=1e-12)


def test_grey_videos_are_tracked_grey(located, draws):
    assert isinstance(draws.held_out(1)[0][0].video, VideoReference)
    draws = Draws(located.data.evaluation, draws.builder, located.data.__class__(control="blank_frames"), seed=0)
    draw = draws.held_out(1)[0][0]
    assert len(draw.video) == draw.episode.num_frames and all((draw.video.frame(t) == 127).all() for t in range(len(draw.video)))


@pytest.mark.parametrize("failures, scored", [(1, True), (3, False)])
def test_a_failing_tracker_is_asked_again_and_never_a_reward_of_zero(located, draws, failures, scored, monkeypatch):
    draw, asked = draws.held_out(1)[0][0], []
    masks = [[dict(size=[96, 128], counts=a.counts) for a in draw.episode.visible(draw.prompt.target_frame)], [], []]

    async def segment(frame, hypotheses):
        return masks

    async def propagate(video, target_frame, hypotheses, frames):
        asked.append(hypotheses)
        if len(asked) <= failures:
            raise RuntimeError("lost")
        return [{t: rles for t in frames} for rles in hypotheses]

    async def no_pause(seconds):
        pass

    monkeypatch.setattr("cluster.scoring.asyncio.sleep", no_pause)
    right, _, nothing = right_and_wrong(draw)
    group = asyncio.run(score_group(draw, [right, nothing, nothing], [3] * 3, located.reward, segment, propagate, tries=3))
    assert len(asked) == min(3, failures + 1) and asked[0] == masks
    if scored:
        assert group.failure is None and group.scores[0].terms["iou"] > 0 == group.scores[1].terms["iou"]
    else:
        assert group.scores is None and group.failure == "segmentation failed 3 times, last: RuntimeError: lost"


def test_a_video_that_breaks_in_tracking_is_asked_once_and_counts_as_broken(located, draws):
    draw, asked = draws.held_out(1)[0][0], []

    async def segment(frame, hypotheses):
        return [[] for _ in hypotheses]

    async def propagate(*arguments):
        asked.append(arguments)
        raise VideoError("frame 7 is not a readable image")

    group = asyncio.run(score_group(draw, right_and_wrong(draw), [3] * 3, located.reward, segment, propagate, tries=3))
    assert len(asked) == 1 and group.scores is None
    assert group.broken == BrokenEpisode(draw.episode.episode_id, "unreadable", "frame 7 is not a readable image")
    good = asyncio.run(score_group(draw, right_and_wrong(draw), [3] * 3, RewardConfig(), None))
    assert scored([group, good], max_failure_rate=0.0, step=1) == [good]
    assert held_out_metrics([group, good]) == held_out_metrics([good])
    with pytest.raises(RunFailed, match="1 of 1 groups could not be scored; last cause: lost"):
        scored([group, replace(good, failure="lost")], max_failure_rate=0.5, step=1)


def test_a_group_that_costs_segmenters_is_given_up_at_once(located, draws):
    draw, asked = draws.held_out(1)[0][0], []

    async def segment(frame, hypotheses):
        asked.append(hypotheses)
        raise PartLost("segment_group lost 2 segmenters one after another, last: no answer within 10 s")

    group = asyncio.run(score_group(draw, right_and_wrong(draw), [3] * 3, located.reward, segment, None, tries=3))
    assert len(asked) == 1 and group.scores is None and group.failure.startswith("segment_group lost 2 segmenters") and group.broken is None
