"""What the service is asked and what it answers: the JSON that HTTP, the Ray handle and the in-process client share."""

from __future__ import annotations

from typing import Annotated, Literal, Optional, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .prompts import ObjectPrompt

Coordinate = Annotated[float, Field(allow_inf_nan=False)]
T = TypeVar("T")
Several = Annotated[tuple[T, ...], Field(fail_fast=True)]  # else a million wrong items are a million errors, gigabytes and minutes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptRequest(_Strict):
    """One object on the target frame; pixels of the original frame, corners inclusive."""

    box: Optional[tuple[Coordinate, Coordinate, Coordinate, Coordinate]] = Field(default=None, description="x1, y1, x2, y2")
    points: Several[tuple[Coordinate, Coordinate]] = Field(default=(), description="x, y of each point")
    labels: Several[Literal[0, 1]] = Field(default=(), description="1 for a point on the object, 0 for one off it; as many as points")

    @model_validator(mode="after")
    def _something_to_segment(self) -> PromptRequest:
        if len(self.points) != len(self.labels):
            raise ValueError(f"each point needs a label; got {len(self.points)} points and {len(self.labels)} labels")
        if self.box is None and 1 not in self.labels:
            raise ValueError("an object needs a box or a point with label 1")
        return self

    def prompt(self) -> ObjectPrompt:
        return ObjectPrompt(self.box, self.points, self.labels)


class SegmentRequest(_Strict):
    """One group: hypotheses about one frame of one video."""

    video: str = Field(min_length=1, max_length=4096, description="a path under one of the service's roots, or upload:ID as the upload returned it")
    frame: int = Field(ge=0, description="the target frame, counted from 0")
    hypotheses: Several[Several[PromptRequest]] = Field(min_length=1, description="the objects of each answer")
    propagate: bool | Several[Annotated[int, Field(ge=0)]] = Field(
        default=False, description="true: masks on all frames of the video; a list: on these frames; false: on the target frame only"
    )

    def prompts(self) -> list[list[ObjectPrompt]]:
        return [[o.prompt() for o in hypothesis] for hypothesis in self.hypotheses]


class Rle(_Strict):
    """A mask as COCO RLE; `segmentation_service.masks.decode_rle` reads it, pycocotools its `model_dump()`."""

    size: tuple[int, int] = Field(description="height, width")
    counts: str


class SegmentResponse(_Strict):
    """Masks in the order of the request's hypotheses and objects."""

    masks: tuple[tuple[Rle, ...], ...] = Field(description="on the target frame: one a hypothesis and object")
    tracks: Optional[tuple[dict[int, tuple[Rle, ...]], ...]] = Field(default=None, description="for each hypothesis, by frame: one an object")


class ServiceError(Exception):
    """A request that was refused or failed, with the HTTP status that says whose fault it is.

    400 malformed, 401 no or wrong token, 404 no such video or upload, 408 a body that comes too slowly, 413 over a limit, 422 understood
    but impossible (wrong frame, video that cannot be decoded), 429 this client asks too much, 503 the service is full or has no
    replica; 500 a fault of ours.
    Only 429 and 503 are worth trying again, after `retry_after` seconds.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(status, message, retry_after)  # all of them, so that it survives pickling
        self.status, self.message, self.retry_after = status, message, retry_after

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"
