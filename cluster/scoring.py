"""Scoring a group where it arrives: parse the answers, ask for masks (and tracks) once per group, compute the rewards.

A completion that cannot be parsed earns what the terms give it. A group whose scoring fails (segmenter dead, time-out) is
tried again with back-off and then marked invalid: it is never a reward of 0. A video that breaks in tracking is not tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

import reward_service
from reward_service import Answer, RewardConfig, Score, Target, parse_answer
from reward_service.difficulty import OnlineDifficulty, success_rate, uncertainty
from reward_service.length import difficulty_class
from reward_service.matching import assign, box_iou_matrix
from reward_service.measures import jaccard, jaccard_and_f
from rollout.completion import Completion
from rollout.episodes import Episode
from segmentation_service.masks import decode_rle
from segmentation_service.segmenter import ObjectPrompt
from segmentation_service.video import Video, VideoError

from cluster.draws import BrokenEpisode, Draw
from cluster.errors import PartLost

SegmentGroup = Callable[[np.ndarray, list[list[ObjectPrompt]]], Awaitable[list[list[dict]]]]
PropagateGroup = Callable[[Video, int, list[list[dict]], list[int]], Awaitable[list[dict[int, list[dict]]]]]


@dataclass(frozen=True)
class ScoredGroup:
    """G completions of one draw, their answers in pixels of the original frame, their masks (RLEs, one an object) and
    scores.

    `difficulty` is the one that set the length budget (None: unknown), `success_rate` the group's share of successes where
    difficulty is estimated online; `uncertainties` are there if a budget depends on them. `failure` says why the group could
    not be scored; then `masks` and `scores` are None. `broken` is the episode where its video is the cause.
    """

    draw: Draw
    completions: tuple[Completion, ...]
    answers: tuple[Answer, ...]
    reasoning_tokens: tuple[int, ...]
    difficulty: float | None
    difficulty_class: str
    masks: tuple[list[dict], ...] | None = None
    scores: tuple[Score, ...] | None = None
    box_ious: tuple[float, ...] = ()
    mask_ious: tuple[float, ...] = ()
    video_ious: tuple[float, ...] = ()
    video_fs: tuple[float, ...] = ()
    success_rate: float | None = None
    uncertainties: tuple[float, ...] = ()
    failure: str | None = None
    broken: BrokenEpisode | None = None

    @property
    def rewards(self) -> np.ndarray:
        """float64 (G,)."""
        return np.array([s.total for s in self.scores], np.float64)


async def score_group(
    draw: Draw,
    completions: Sequence[Completion],
    reasoning_tokens: Sequence[int],
    config: RewardConfig,
    segment: SegmentGroup | None,
    propagate: PropagateGroup | None = None,
    tries: int = 3,
    online: OnlineDifficulty | None = None,
    boundaries: bool = False,
) -> ScoredGroup:
    """The group with its scores. `segment` may be None where no active term needs masks, `propagate` where none needs them on
    the annotated frames of the video; it is given the masks of `segment`, and with `boundaries` F is measured besides J. With `online` the difficulty is what it makes of the
    episode's rating and this group's success."""
    prompt = draw.prompt
    answers = tuple(parse_answer(c.text).to_frame(prompt.units, prompt.policy_hw, prompt.frame_hw) for c in completions)
    difficulty = draw.episode.difficulty
    group = ScoredGroup(draw, tuple(completions), answers, tuple(reasoning_tokens), difficulty, _level(difficulty, config))
    masks = tracks = None
    annotated = sorted(draw.episode.annotated_frames)
    try:
        if segment is not None:
            masks = await _retried(lambda: segment(draw.frame, [object_prompts(a) for a in answers]), tries)
        if propagate is not None:
            tracks = await _retried(lambda: propagate(draw.video, prompt.target_frame, masks, annotated), tries)
    except VideoError as error:
        return replace(group, failure=str(error), broken=BrokenEpisode.of(draw.episode, error))
    except PartLost as error:  # it was tried again already, at the cost of a segmenter each time
        return replace(group, failure=str(error))
    except Exception as error:  # whatever the service raised is the cause that the run reports
        return replace(group, failure=f"segmentation failed {tries} times, last: {type(error).__name__}: {error}")
    decoded = predicted = None if masks is None else [_decode(m, draw.target.image_size) for m in masks]
    if tracks is not None:
        predicted = [track | {prompt.target_frame: on_target_frame} for track, on_target_frame in zip(tracks, decoded)]
    truth = None if draw.target.masks is None else np.asarray(draw.target.masks, bool).any(0)
    box_ious = tuple(mean_box_iou(a, draw.target) for a in answers)
    ignored = draw.target.ignored_HW()
    mask_ious = () if decoded is None or truth is None else tuple(jaccard(m.any(0), truth, ignored) for m in decoded)
    success = None
    if online is not None:
        success = success_rate(mask_ious if online.config.success == "mask_iou" else box_ious, online.config.success_above)
        difficulty = online.difficulty(draw.episode.episode_id, difficulty, success)
    measured = () if tracks is None or truth is None else video_measures(tracks, draw.episode, boundaries)
    uncertainties = tuple(uncertainty(c.top_logprobs) for c in completions) if config.needs_uncertainty else ()
    scores = reward_service.score_group(
        answers,
        draw.target,
        config,
        difficulty=difficulty,
        uncertainties=uncertainties or None,
        lengths=_lengths(completions, reasoning_tokens, config.length.unit),
        predicted_masks=predicted,
    )
    return replace(
        group,
        difficulty=difficulty,
        difficulty_class=_level(difficulty, config),
        success_rate=success,
        masks=None if masks is None else tuple(masks),
        scores=tuple(scores),
        box_ious=box_ious,
        mask_ious=mask_ious,
        video_ious=tuple(j for j, _ in measured),
        video_fs=tuple(f for _, f in measured) if boundaries else (),
        uncertainties=uncertainties,
    )


async def _retried(call: Callable[[], Awaitable], tries: int):
    for attempt in range(tries):
        try:
            return await call()
        except (VideoError, PartLost):
            raise
        except Exception:
            if attempt == tries - 1:
                raise
            await asyncio.sleep(0.5 * 2**attempt)


def _lengths(completions: Sequence[Completion], reasoning_tokens: Sequence[int], unit: str) -> list[int] | None:
    """What the length penalty counts; None for words, which the reward service counts itself."""
    if unit == "think_tokens":
        return list(reasoning_tokens)
    return [len(c.token_ids) for c in completions] if unit == "response_tokens" else None


def _level(difficulty: float | None, config: RewardConfig) -> str:
    return difficulty_class(config.length.default_difficulty if difficulty is None else difficulty, config.length)


def object_prompts(answer: Answer) -> list[ObjectPrompt]:
    """What the segmenter is asked about an answer: one prompt per object, positive points before negative ones."""
    return [
        ObjectPrompt(
            box=o.box,
            points=(*o.points, *o.negative_points),
            labels=(1,) * len(o.points) + (0,) * len(o.negative_points),
        )
        for o in answer.objects
    ]


def mean_box_iou(answer: Answer, target: Target) -> float:
    """IoU of matched boxes, summed and divided by the larger number of objects; 1 where both are empty."""
    truth = target.boxes_N4()
    boxes = np.array([o.box if o.box else (np.nan,) * 4 for o in answer.objects], np.float64).reshape(-1, 4)
    if not len(boxes) and not len(truth):
        return 1.0
    iou = box_iou_matrix(boxes, truth)
    return float(iou[assign(iou)].sum() / max(len(boxes), len(truth)))


def video_measures(tracks: Sequence[dict[int, list[dict]]], episode: Episode, boundaries: bool = False) -> list[tuple[float, float]]:
    """For each answer the means over the annotated frames of J and, with `boundaries`, F (else 0): the union of its masks against that of all the
    query's targets. Pixels that the episode ignores are left out."""
    size, totals = (episode.height, episode.width), np.zeros((len(tracks), 2))
    for t in episode.annotated_frames:
        truth, ignored = episode.masks(t).any(0), episode.ignored(t)
        for n, track in enumerate(tracks):
            predicted = _decode(track[t], size).any(0)
            totals[n] += jaccard_and_f(predicted, truth, ignored) if boundaries else (jaccard(predicted, truth, ignored), 0.0)
    return [tuple(row) for row in (totals / len(episode.annotated_frames)).tolist()]


def _decode(rles: Sequence[dict], hw: tuple[int, int]) -> np.ndarray:
    return np.stack([decode_rle(r) for r in rles]) if rles else np.zeros((0, *hw), bool)

