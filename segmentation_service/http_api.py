"""The HTTP interface: addresses, errors as JSON, uploads. Whatever client it is given does the work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from . import serve_config
from .http_guard import UPLOADS, Guard, bearer_token, error_json
from .http_page import page
from .references import UPLOAD
from .serve_config import ServeConfig
from .service_request import SegmentRequest, SegmentResponse, ServiceError
from .uploads import UploadStore

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
UPLOAD_TYPES = ("application/zip", "application/octet-stream", "image/jpeg", "image/png")


class Client(Protocol):
    """What answers requests: `client.LocalClient`, `client.HandleClient`, or anything like them."""

    async def segment_async(self, request: SegmentRequest) -> SegmentResponse:
        """Raises ServiceError. Cancelled where nobody waits for the answer any more."""

    def stats(self) -> list[dict[str, float]]:
        """Counters of each replica."""


class ErrorAnswer(BaseModel):
    error: str = Field(description="what is wrong, and what to do")
    fields: list[str] = Field(default=[], description="where in the request, such as hypotheses.0.1.box")


class UploadAnswer(BaseModel):
    video: str = Field(description="names the video in requests: upload:ID")
    frames: int
    height: int
    width: int


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "not JSON, or no JSON by its Content-Type"},
    401: {"description": "no token, or a wrong one"},
    404: {"description": "no such video"},
    408: {"description": "the body came too slowly"},
    413: {"description": "over a limit: bytes, frames, pixels, objects"},
    422: {"description": "understood, but impossible: a wrong field, a frame that the video has not, a video that cannot be decoded"},
    429: {"description": "too many requests of this client at a time; Retry-After says when to come again"},
    503: {"description": "the service is full, or too slow; Retry-After says when to come again"},
}
_ERRORS = {status: {**answer, "model": ErrorAnswer} for status, answer in _ERRORS.items()}


def make_app(client: Client, config: ServeConfig) -> FastAPI:
    """The application, guarded. Raises ValueError where the settings are wrong, or would let others in without a token."""
    serve_config.check(config)
    token = bearer_token(config)
    store = None
    if config.uploads is not None:
        store = UploadStore(
            config.uploads, config.max_upload_bytes, config.max_uploads_bytes, config.upload_seconds, config.max_frames, config.max_frame_pixels
        )
    in_flight: Counter[str] = Counter()
    answers: Counter[int] = Counter()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.ensure_future(_sweep(store)) if store else None
        yield
        if sweeping:
            sweeping.cancel()

    app = FastAPI(
        title="VideoSeg-R1 segmentation service",
        description="Boxes and points on one frame of a video in, masks of that frame or of all frames out.",
        docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan,
    )  # fmt: skip
    app.add_middleware(Guard, config=config, token=token, in_flight=in_flight, answers=answers)
    app.add_exception_handler(ServiceError, lambda _, error: _answer(error))
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)

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

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server answers; needs no token."""
        return {"status": "ok"}

    @app.get("/v1/stats", responses={401: _ERRORS[401]})
    async def stats() -> dict[str, Any]:
        """Counts since the start."""
        return {
            "in_flight": in_flight.total(),
            "answers": {str(status): count for status, count in sorted(answers.items())},
            "upload_bytes": store.bytes_used if store else 0,
            "replicas": await asyncio.to_thread(client.stats),
        }

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"})

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


def _answer(error: ServiceError, **more: Any) -> Response:
    text, headers = error_json(error, **more)
    return Response(text, error.status, headers)


def _validation_error(request: Request, error: RequestValidationError) -> Response:
    found = error.errors()[:20]
    inner = {q["loc"][:n] for q in found for n in range(len(q["loc"]))}
    problems = [p for p in found if p["loc"] not in inner]  # a list with a wrong item also counts as too short
    first = problems[0]
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if first["type"] == "json_invalid":
        return _answer(ServiceError(400, f"not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}"))
    if first["loc"] == ("body",) and (first["type"] == "missing" or not kind.endswith("json")):
        return _answer(ServiceError(400, "send a JSON object, with the header `Content-Type: application/json`"))
    fields = [".".join(str(part) for part in p["loc"][1:])[:200] for p in problems]
    return _answer(ServiceError(422, f"{fields[0] or 'the request'}: {first['msg'].removeprefix('Value error, ')}"), fields=fields)


def _http_error(request: Request, error: HTTPException) -> Response:
    """Errors of the framework: no such address, a method that it does not have, a body that cannot be read as JSON."""
    known = {400: "the body cannot be read as JSON", 404: "no such address; GET /docs lists them", 405: f"{request.method} is not possible here"}
    response = _answer(ServiceError(error.status_code, known.get(error.status_code, str(error.detail))))
    response.headers.update(error.headers or {})
    return response
