"""The reward service without its shells: a batch of items in, for each a score or the reason why it alone has none."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from reward_service.answer import Answer
from reward_service.config import RewardConfig
from reward_service.config_values import reward_config
from reward_service.parsing import parse_answer
from reward_service.prompting import AT_A_TIME, Place, Segmenting, masks_of
from reward_service.score_request import (
    AnsweredObject,
    InvalidItem,
    ItemScore,
    MalformedItem,
    ParsedAnswer,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    TargetRequest,
)
from reward_service.scoring import Score, maximum, score_group
from reward_service.serve_config import RewardServeConfig
from reward_service.target import FrameTarget, Target
from segmentation_service.service_request import ServiceError

logger = logging.getLogger(__name__)


@dataclass
class _Work:
    item: ScoreItem
    target: Target
    answer: Answer
    masks: Any = None
    """What `score` takes as `predicted_masks`."""


class RewardService:
    """Scores within the limits of `config`. `segmentation` answers requests for masks; None: items must bring them."""

    def __init__(self, config: RewardServeConfig, segmentation: Segmenting | None = None) -> None:
        self.config, self.segmentation = config, segmentation
        self.counts = {"requests": 0, "items": 0, "invalid": 0}

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Raises ServiceError 413 or 422 where the request as a whole cannot be scored; what is wrong with an item is told in its place."""
        if len(request.items) > self.config.max_items:
            raise ServiceError(413, f"{len(request.items)} items are more than the {self.config.max_items} that this service takes")
        try:
            config = reward_config(request.preset, request.reward, self.config.reward)
        except ValueError as error:
            raise ServiceError(422, str(error)) from error
        works = await asyncio.to_thread(self._prepare, request.items)
        if config.needs_predicted_masks or config.needs_video_masks:
            works = await self._with_masks(works, config)
        scores = await asyncio.to_thread(lambda: tuple(chain.from_iterable(_scores(list(group), config) for _, group in groupby(works, _prompt))))
        self.counts["requests"] += 1
        self.counts["items"] += len(scores)
        self.counts["invalid"] += sum(isinstance(s, InvalidItem) for s in scores)
        return ScoreResponse(scores=scores, maximum=maximum(config))

    def _prepare(self, items: Sequence[ScoreItem | MalformedItem]) -> list[_Work | InvalidItem]:
        """Parsed answers and checked targets. Completions of one prompt that follow each other share their target."""
        works: list[_Work | InvalidItem] = []
        last: _Work | None = None
        for item in items:
            if isinstance(item, MalformedItem):
                works.append(InvalidItem(reason=item.reason))
                continue
            try:
                self._check(item)
                shared = last is not None and (last.item.target, last.item.frame) == (item.target, item.frame)
                target = last.target if shared else _target(item.target, item.frame)
                answer = parse_answer(item.completion)
                if item.policy_size is not None or item.units != "pixels":
                    answer = answer.to_frame(item.units, item.policy_size or target.image_size, target.image_size)
                last = _Work(item, target, answer)
                works.append(last)
            except Exception as error:
                works.append(_invalid(error))
        return works

    def _check(self, item: ScoreItem) -> None:
        if item.frame is not None and item.target.frame not in (None, item.frame):
            raise ValueError(f"frame={item.frame} and target.frame={item.target.frame} are both the target frame: give one, or the same")
        objects = max([len(item.target.boxes), *(len(f.boxes) for f in (item.target.frames or {}).values())])
        if objects > self.config.max_objects:
            raise ValueError(f"{objects} objects are more than the {self.config.max_objects} that this service takes")
        shown = [item.target, *(item.target.frames or {}).values()]
        truth = [*(f.masks for f in shown), [f.ignore for f in shown]]
        predicted = [item.predicted_masks, *(item.predicted_tracks or {}).values()]
        sizes = [item.target.image_size, *(mask.size for masks in (*truth, *predicted) for mask in masks or () if mask is not None)]
        pixels = sum(max(height, 0) * max(width, 0) for height, width in sizes)
        if pixels > self.config.max_mask_pixels:
            raise ValueError(f"{pixels} pixels of masks and frame are more than the {self.config.max_mask_pixels} that this service takes")

    async def _with_masks(self, works: list[_Work | InvalidItem], config: RewardConfig) -> list[_Work | InvalidItem]:
        """The items with the masks that they brought, else with those of the segmentation service, asked once a video and frame.

        For terms over the video these are the masks on all frames of the target and on the target frame; for `video_iou` they start
        on the frame that the answer names, if it is one of these.
        """
        video, named = config.needs_video_masks, config.weights.video_iou > 0
        works, groups = list(works), defaultdict[Place, list[int]](list)
        for i, work in enumerate(works):
            if isinstance(work, InvalidItem):
                continue
            item, work.masks = work.item, _brought(work, config)
            if work.masks is not None:
                continue
            place = _place(work, video, named)
            if not work.answer.objects or (named and place is None):  # an answer that names no frame has no masks
                work.masks = {} if video else []
            elif self.segmentation is None:
                field = "predicted_tracks" if video else "predicted_masks"
                works[i] = InvalidItem(reason=f"an active term needs SAM2's masks: send {field}, or start the service with segmentation=URL")
            elif item.video is None or place is None:
                works[i] = InvalidItem(reason="an active term needs SAM2's masks: say of which `video` and `frame`, or send them")
            else:
                groups[place].append(i)
        free = asyncio.Semaphore(AT_A_TIME)

        async def ask(place: Place, members: list[int]) -> None:
            async with free:
                found = await masks_of([works[i].answer for i in members], place, self.segmentation, self.config.segmentation_seconds)
            for i, masks in zip(members, found):
                if isinstance(masks, InvalidItem):
                    works[i] = masks
                else:
                    works[i].masks = masks

        await asyncio.gather(*(ask(place, members) for place, members in groups.items()))
        return works


def _brought(work: _Work, config: RewardConfig) -> Any:
    """The masks that came with the item; None where those that are needed did not."""
    masks = None if work.item.predicted_masks is None else _rles(work.item.predicted_masks)
    if not config.needs_video_masks:
        return masks
    if work.item.predicted_tracks is None:
        return None
    tracks = {t: _rles(found) for t, found in work.item.predicted_tracks.items()}
    beside = config.needs_predicted_masks and masks is not None and work.target.frame is not None
    return tracks | {work.target.frame: masks} if beside else tracks


def _place(work: _Work, video: bool, named: bool) -> Place | None:
    """Where masks of the answer start."""
    frames, frame = tuple(work.target.frames or ()) if video else None, work.target.frame
    if named and work.answer.keyframe is not None and int(work.answer.keyframe) in frames:
        frame = int(work.answer.keyframe)
    return None if frame is None else (work.item.video or "", frame, frames)


def _target(given: TargetRequest, frame: int | None) -> Target:
    frames = None
    if given.frames is not None:
        frames = {t: FrameTarget(f.boxes, None if f.masks is None else _rles(f.masks), _rle(f.ignore)) for t, f in given.frames.items()}
    masks = None if given.masks is None else _rles(given.masks)
    return Target(given.image_size, given.boxes, given.points, masks, frames, given.frame if frame is None else frame, _rle(given.ignore))


def _rles(masks: Sequence[Any]) -> list[dict | None]:
    return [_rle(mask) for mask in masks]


def _rle(mask: Any) -> dict | None:
    return None if mask is None else mask.model_dump()


def _prompt(work: _Work | InvalidItem) -> Any:
    """What completions have in common that can be scored as one group."""
    if isinstance(work, InvalidItem):
        return None
    return id(work.target), work.item.difficulty, work.answer.units_hw, work.answer.policy_hw


def _scores(works: list[_Work | InvalidItem], config: RewardConfig) -> list[ItemScore | InvalidItem]:
    """Scores of completions of one prompt, together; where that fails one by one, as only some of them may be at fault."""
    if isinstance(works[0], InvalidItem):
        return works
    items, masks = [work.item for work in works], [work.masks for work in works]
    masks = masks if any(m is not None for m in masks) else None
    uncertainties, lengths = [item.uncertainty for item in items], [item.length for item in items]
    try:
        found = score_group([work.answer for work in works], works[0].target, config, items[0].difficulty, uncertainties, lengths, masks)
    except Exception as error:
        return [_invalid(error)] if len(works) == 1 else [one for work in works for one in _scores([work], config)]
    return [_item_score(one) for one in found]


def _item_score(found: Score) -> ItemScore | InvalidItem:
    if not math.isfinite(found.total):
        return InvalidItem(reason=f"the total is {found.total}; the weights or the length are too large")
    answer = found.answer
    objects = tuple(AnsweredObject(box=o.box, points=o.points, negative_points=o.negative_points) for o in answer.objects)
    return ItemScore(
        total=found.total,
        terms=found.terms,
        answer=ParsedAnswer(think_format=answer.think_format, strict=answer.strict, objects=objects, keyframe=answer.keyframe),
    )


def _invalid(error: Exception) -> InvalidItem:
    if isinstance(error, ValueError):  # MissingInput too: what was sent does not fit together
        return InvalidItem(reason=str(error)[:1000])
    logger.error("an item could not be scored", exc_info=error)
    return InvalidItem(reason=f"a fault of the service ({type(error).__name__}); its log says more")
