"""What the reward service is asked and what it answers: the JSON that HTTP, the Ray handle and the in-process client share."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator, model_validator

from segmentation_service.service_request import Coordinate, Rle, Several

MAX_ITEMS = 4096
"""Most items of a request: past it the request is refused before any of them is looked at."""
MAX_FRAMES = 4096
"""Most frames of a target, and of predicted tracks."""


def _few(limit: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, (list, tuple, dict)) and len(value) > limit:
            raise ValueError(f"{len(value)} entries are more than the {limit} that are taken")
        return value

    return BeforeValidator(check)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        """One error for all unknown keys: pydantic's own, one a key, can be gigabytes for a body of megabytes."""
        unknown = next((key for key in data if key not in cls.model_fields), None) if isinstance(data, dict) else None
        if unknown is not None:
            raise ValueError(f"unknown key {str(unknown)[:80]!r}; {nearest(str(unknown)[:80], cls.model_fields)}")
        return data


def nearest(key: str, known: Any) -> str:
    """What to do about an unknown key: the key that it most resembles, or all of them."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


Size = tuple[Annotated[int, Field(ge=1, le=2**20)], Annotated[int, Field(ge=1, le=2**20)]]
Box = tuple[Coordinate, Coordinate, Coordinate, Coordinate]
Point = tuple[Coordinate, Coordinate]
Masks = Several[Optional[Rle]]


class FrameRequest(_Strict):
    """Truth on one shown frame."""

    boxes: Several[Optional[Box]] = Field(default=(), description="x1, y1, x2, y2 of each object, null where it is absent")
    masks: Optional[Masks] = Field(default=None, description="one an object, null where it is absent")
    ignore: Optional[Rle] = Field(default=None, description="pixels that count in no overlap of masks on this frame, for terms over the video")


class TargetRequest(_Strict):
    """Truth of one query on its target frame; pixels of the original frame, corners inclusive."""

    image_size: Size = Field(description="height, width")
    boxes: Several[Box] = Field(default=(), description="x1, y1, x2, y2 of each object; none: there is nothing to find")
    points: Optional[Several[Several[Point]]] = Field(default=None, description="x, y of points of each object, the first inside its mask")
    masks: Optional[Masks] = Field(default=None, description="one an object")
    frames: Annotated[Optional[dict[int, FrameRequest]], _few(MAX_FRAMES)] = Field(default=None, description="by frame id, in the order shown")
    frame: Optional[int] = Field(default=None, description="id of the target frame; null: the `frame` of the item")
    ignore: Optional[Rle] = Field(default=None, description="pixels that count in no overlap of masks on the target frame")


class ScoreItem(_Strict):
    """One completion and what it is scored against."""

    completion: str = Field(description="what the policy wrote, from <think> to </answer>, without special tokens")
    target: TargetRequest
    difficulty: Optional[Coordinate] = Field(default=None, description="1..10; null: the configured default")
    uncertainty: Optional[Coordinate] = Field(default=None, description="0..1, for budgets that widen with it")
    length: Optional[Annotated[float, Field(ge=0, le=1e9)]] = Field(default=None, description="tokens used, as length.unit counts; words are counted here")
    units: Literal["pixels", "relative_1000"] = Field(default="pixels", description="of the answer's coordinates")
    policy_size: Optional[Size] = Field(default=None, description="height, width of the image that the policy saw; null: that of the target")
    predicted_masks: Optional[Masks] = Field(default=None, description="SAM2's masks of the answer's objects on the target frame")
    predicted_tracks: Annotated[Optional[dict[int, Masks]], _few(MAX_FRAMES)] = Field(default=None, description="the same on each frame of the target, by frame id")
    video: Optional[str] = Field(default=None, min_length=1, max_length=4096, description="what the segmentation service calls the video, where masks are asked for here")
    frame: Optional[Annotated[int, Field(ge=0)]] = Field(default=None, description="the target frame there; null: that of the target")


class MalformedItem(BaseModel):
    """An item that could not be read: it is invalid, the others are not."""

    model_config = ConfigDict(frozen=True)
    reason: str


def _item_or_reason(value: Any, read: Any) -> ScoreItem | MalformedItem:
    if isinstance(value, MalformedItem):
        return value
    try:
        return read(value)
    except ValidationError as error:
        return MalformedItem(reason=first_problem(error))


def first_problem(error: ValidationError) -> str:
    """Where and what, of the innermost first error."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[:20]
    inner = {q["loc"][:n] for q in found for n in range(len(q["loc"]))}
    first = next(p for p in found if p["loc"] not in inner)
    where = ".".join(str(part) for part in first["loc"])[:200]
    return f"{where or 'the item'}: {first['msg'].removeprefix('Value error, ')}"


class ScoreRequest(_Strict):
    """A batch: completions, and how they are to be scored."""

    items: Annotated[Several[Annotated[ScoreItem, WrapValidator(_item_or_reason)]], _few(MAX_ITEMS)] = Field(description="scored each by itself")
    preset: Optional[str] = Field(default=None, max_length=80, description="videoseg_r1, vision_reasoner, ...; null: the settings of the server")
    reward: Optional[dict[str, Any]] = Field(default=None, description="settings that differ from the preset, such as {weights: {iou: 2}}")


class AnsweredObject(BaseModel):
    """One object of the answer, in pixels of the original frame."""

    box: Optional[Box]
    points: tuple[Point, ...]
    negative_points: tuple[Point, ...]


class ParsedAnswer(BaseModel):
    """What was read from a completion."""

    think_format: bool
    strict: bool = Field(description="the answer block is exactly one JSON list; only such an answer earns accuracy")
    objects: tuple[AnsweredObject, ...]
    keyframe: Optional[float] = None


class ItemScore(BaseModel):
    """What a completion earned."""

    total: float
    terms: dict[str, float] = Field(description="each term, also times its weight; original is their sum, length_penalty its factor")
    valid: Literal[True] = True
    answer: ParsedAnswer


class InvalidItem(BaseModel):
    """An item whose scoring failed. It has no reward, which is not a reward of 0."""

    invalid: Literal[True] = True
    reason: str
    temporary: bool = Field(default=False, description="the same item may be scored another time: masks could not be had")


class ScoreResponse(BaseModel):
    """One score or reason an item, in their order."""

    scores: tuple[ItemScore | InvalidItem, ...]
    maximum: float = Field(description="the greatest total that these settings can give")
