"""The HTTP interface: masks and uploads. Whatever client it is given does the work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from . import serve_config
from .http_app import errors, guarded_app
from .references import UPLOAD
from .serve_config import ServeConfig
from .service_request import SegmentRequest, SegmentResponse, ServiceError
from .uploads import UploadStore

logger = logging.getLogger(__name__)

UPLOADS = "/v1/videos"
SWEEP_SECONDS = 60.0
UPLOAD_TYPES = ("application/zip", "application/octet-stream", "image/jpeg", "image/png")


class Client(Protocol):
    """What answers requests: `client.LocalClient`, `client.HandleClient`, or anything like them."""

    async def segment_async(self, request: SegmentRequest) -> SegmentResponse:
        """Raises ServiceError. Cancelled where nobody waits for the answer any more."""

    def stats(self) -> list[dict[str, float]]:
        """Counters of each replica."""


class UploadAnswer(BaseModel):
    video: str = Field(description="names the video in requests: upload:ID")
    frames: int
    height: int
    width: int


_ERRORS = errors(
    {
        404: "no such video",
        413: "over a limit: bytes, frames, pixels, objects",
        422: "understood, but impossible: a wrong field, a frame that the video has not, a video that cannot be decoded",
    }
)


def make_app(client: Client, config: ServeConfig) -> FastAPI:
    """The application, guarded. Raises ValueError where the settings are wrong, or would let others in without a token."""
    serve_config.check(config)
    store = None
    if config.uploads is not None:
        store = UploadStore(
            config.uploads, config.max_upload_bytes, config.max_uploads_bytes, config.upload_seconds, config.max_frames, config.max_frame_pixels
        )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.ensure_future(_sweep(store)) if store else None
        yield
        if sweeping:
            sweeping.cancel()

    def stats() -> dict[str, Any]:
        return {"upload_bytes": store.bytes_used if store else 0, "replicas": client.stats()}

    what = "Boxes and points on one frame of a video in, masks of that frame or of all frames out."
    app = guarded_app(config, "VideoSeg-R1 segmentation service", what, stats, UPLOADS, lifespan)

    @app.post("/v1/segment", responses=_ERRORS)
    async def segment(request: SegmentRequest) -> SegmentResponse:
        """Masks for the objects of one or more hypotheses about one frame of a video."""
        if store is not None and request.video.startswith(UPLOAD):
            store.touch(request.video.removeprefix(UPLOAD))
        return await client.segment_async(request)

    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in UPLOAD_TYPES}

    @app.post(UPLOADS, status_code=201, responses=_ERRORS, openapi_extra={"requestBody": {"required": True, "content": content}})
    async def upload(request: Request) -> UploadAnswer:
        """Upload a video: a ZIP of JPEG or PNG frames of one size, in the order of their names; or one image."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in UPLOAD_TYPES:  # the types that a foreign web page can send unasked are not among them
            raise ServiceError(400, f"the Content-Type of an upload is one of {', '.join(UPLOAD_TYPES)}")
        try:
            kept = await _uploads(store).receive(request.stream())
        except ClientDisconnect as error:
            raise ServiceError(400, "the upload broke off") from error
        return UploadAnswer(video=UPLOAD + kept.name, frames=kept.frames, height=kept.height, width=kept.width)

    @app.delete(UPLOADS + "/{video}", status_code=204, responses=_ERRORS)
    async def delete(video: str) -> None:
        """Delete an upload, by its ID with or without `upload:` before it."""
        await asyncio.to_thread(_uploads(store).delete, video.removeprefix(UPLOAD))

    return app


async def _sweep(store: UploadStore) -> None:
    while True:
        await asyncio.sleep(min(SWEEP_SECONDS, store.lifetime_seconds))
        try:
            await asyncio.to_thread(store.sweep)
        except OSError:
            logger.exception("expired uploads could not be deleted")


def _uploads(store: UploadStore | None) -> UploadStore:
    if store is None:
        raise ServiceError(404, "this server takes no uploads; name a video below one of its roots")
    return store
