"""SAM2's masks of answers, from the segmentation service: asked for once a group, with a time limit, no fault shared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from reward_service.answer import Answer, AnswerObject
from reward_service.score_request import InvalidItem
from segmentation_service.service_request import PromptRequest, SegmentRequest, SegmentResponse, ServiceError

MAX_HYPOTHESES, MAX_OBJECTS, MAX_POINTS = 64, 256, 64
"""What a segmentation service takes in one request unless told otherwise. Points past the limit are left out: an answer with many must not fail."""
AT_A_TIME = 16

Place = tuple[str, int, tuple[int, ...] | None]
"""Video, target frame, and the frames to propagate to (None: masks on the target frame)."""


class Segmenting(Protocol):
    """The part of a segmentation client that is used here, such as `segmentation_service.http_client.HttpClient`."""

    async def segment_async(self, request: SegmentRequest) -> SegmentResponse:
        """Raises ServiceError."""


async def masks_of(answers: Sequence[Answer], place: Place, client: Segmenting, seconds: float) -> list[Any]:
    """For each answer what `score` takes as `predicted_masks`, or why there is none; by frame id where they are propagated, with the target frame.

    Masks are RLE dicts, one an object, None for an object that names nothing to segment. After `seconds` all answers without
    masks are given up; an error that comes at once is told at once.
    """
    found: dict[int, Any] = {}
    prompts = [[_prompt(one) for one in answer.objects] for answer in answers]

    async def ask(members: list[int]) -> None:
        hypotheses = [[p for p in prompts[i] if p is not None] for i in members]
        video, frame, frames = place
        try:
            response = await client.segment_async(SegmentRequest(video=video, frame=frame, hypotheses=hypotheses, propagate=frames or False))
            for n, i in enumerate(members):
                found[i] = _placed(response.masks[n], prompts[i])
                if frames:
                    found[i] = {t: _placed(masks, prompts[i]) for t, masks in response.tracks[n].items()} | {frame: found[i]}
        except Exception as error:  # also an answer that does not fit the request: whatever it is, it stays with this group
            temporary = isinstance(error, ServiceError) and error.status in (429, 503)
            if len(members) > 1 and not temporary:  # the fault may be one's
                for i in members:
                    await ask([i])
                return
            reason = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {str(error)[:500]}"
            failed = InvalidItem(reason=f"no masks from the segmentation service: {reason}", temporary=temporary)
            found.update(dict.fromkeys(members, failed))

    try:
        async with asyncio.timeout(seconds):
            for members in _parts(prompts):
                await ask(members)
    except TimeoutError:
        pass
    late = InvalidItem(reason=f"no masks from the segmentation service within {seconds:g} s", temporary=True)
    return [found.get(i, late) for i in range(len(answers))]


def _prompt(one: AnswerObject) -> PromptRequest | None:
    """Positive points before negative ones; None where there is neither a box nor a positive point."""
    points = (*one.points, *one.negative_points)[:MAX_POINTS]
    labels = ((1,) * len(one.points) + (0,) * len(one.negative_points))[:MAX_POINTS]
    return PromptRequest(box=one.box, points=points, labels=labels) if one.box or one.points else None


def _placed(masks: Sequence[Any], prompts: list[PromptRequest | None]) -> list[dict | None]:
    if len(masks) != sum(p is not None for p in prompts):
        raise ValueError(f"{len(masks)} masks came for {sum(p is not None for p in prompts)} objects")
    rest = iter(masks)
    return [None if p is None else next(rest).model_dump() for p in prompts]


def _parts(prompts: list[list]) -> Iterator[list[int]]:
    """Answers that fit in one request; those without objects are among them, and cost nothing."""
    part, objects = [], 0
    for i, mine in enumerate(prompts):
        if part and (len(part) == MAX_HYPOTHESES or objects + len(mine) > MAX_OBJECTS):
            yield part
            part, objects = [], 0
        part.append(i)
        objects += len(mine)
    yield part
