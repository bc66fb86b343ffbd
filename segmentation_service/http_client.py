"""The client for HTTP: the same calls as `client.LocalClient` and `client.HandleClient`, and uploads."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from .service_request import SegmentRequest, SegmentResponse, ServiceError
from .video import ImageFolder

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
CONNECT_SECONDS = 10.0
_JSON = {"content-type": "application/json"}
_TYPES = {".zip": "application/zip", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


class JsonClient:
    """Posts JSON to a server, from any thread. One that is busy (429, 503) or cannot be reached is asked again, after the pause that it names
    or a growing one, until `patience_seconds` have passed; then its last error is raised. Other errors are raised at once.

    url: such as http://127.0.0.1:8000; token: what the server asks for, if it does; answer_seconds: longest wait for one answer.
    """

    def __init__(self, url: str, token: str | None = None, patience_seconds: float = 120.0, answer_seconds: float = 1000.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the url of a server begins with http:// or https://; got {url!r}")
        self.patience_seconds = patience_seconds
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": {"authorization": f"Bearer {token}"} if token else {},
            "timeout": httpx.Timeout(answer_seconds, connect=CONNECT_SECONDS),
            "verify": httpx.create_ssl_context(),
        }
        self._client = httpx.Client(**self._options)

    def post(self, path: str, body: str) -> httpx.Response:
        """Raises ServiceError with the server's status and message; 503 where it cannot be reached."""
        patience = _Patience(self.patience_seconds)
        while True:
            try:
                with _network_errors():
                    return _checked(self._client.post(path, content=body, headers=_JSON))
            except ServiceError as error:
                time.sleep(patience.pause(error))

    async def post_async(self, path: str, body: str) -> httpx.Response:
        """As `post`. Cancelling it cancels the request."""
        patience = _Patience(self.patience_seconds)
        async with httpx.AsyncClient(**self._options) as client:
            while True:
                try:
                    with _network_errors():
                        return _checked(await client.post(path, content=body, headers=_JSON))
                except ServiceError as error:
                    await asyncio.sleep(patience.pause(error))

    def stats(self) -> list[dict[str, float]]:
        """Counters of each replica."""
        with _network_errors():
            return _checked(self._client.get("/v1/stats")).json()["replicas"]

    def close(self) -> None:
        self._client.close()


class HttpClient(JsonClient):
    """The client of the segmentation service."""

    def segment(self, request: SegmentRequest) -> SegmentResponse:
        """Raises ServiceError as `post`."""
        return _segmented(self.post("/v1/segment", request.model_dump_json()))

    async def segment_async(self, request: SegmentRequest) -> SegmentResponse:
        """As `segment`. Cancelling it cancels the request."""
        return _segmented(await self.post_async("/v1/segment", request.model_dump_json()))

    def upload(self, path: str | Path) -> str:
        """Send a folder of frames, a ZIP of them, or one image; returns what requests call the video, `upload:ID`.

        Raises VideoError where the folder is none or holds no frames, else as `segment`.
        """
        path = Path(path)
        with tempfile.TemporaryFile() if path.is_dir() else open(path, "rb") as body:
            if path.is_dir():
                _zip_frames(ImageFolder(path), body)
            kind = _TYPES.get(path.suffix.lower(), "application/octet-stream")
            patience = _Patience(self.patience_seconds)
            while True:
                body.seek(0)
                try:
                    with _network_errors():
                        return _checked(self._client.post("/v1/videos", content=body, headers={"content-type": kind})).json()["video"]
                except ServiceError as error:
                    time.sleep(patience.pause(error))

    def delete(self, video: str) -> None:
        """Delete an upload. Raises ServiceError 404 where there is none."""
        with _network_errors():
            _checked(self._client.delete(f"/v1/videos/{video}"))


class _Patience:
    """How long to wait before the next try."""

    def __init__(self, seconds: float) -> None:
        self.end, self.tries = time.monotonic() + seconds, 0

    def pause(self, error: ServiceError) -> float:
        """Seconds until the next try. Raises the error where another makes no sense, or would come too late."""
        growing = FIRST_PAUSE * 2**self.tries * random.uniform(0.5, 1.5)
        seconds = min(LONGEST_PAUSE, max(growing, error.retry_after or 0.0))
        self.tries += 1
        if error.status not in (429, 503) or time.monotonic() + seconds > self.end:
            raise error
        return seconds


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise ServiceError(503, f"no answer from the server ({type(error).__name__}: {error})") from error


def _checked(answer: httpx.Response) -> httpx.Response:
    """Raises ServiceError where the answer is one."""
    if answer.is_success:
        return answer
    try:
        message = answer.json()["error"]
    except (ValueError, KeyError, TypeError):  # of something between us and the server
        message = answer.text[:200] or answer.reason_phrase
    pause = answer.headers.get("retry-after", "")
    raise ServiceError(answer.status_code, message, float(pause) if pause.isdigit() else None)


def _segmented(answer: httpx.Response) -> SegmentResponse:
    try:
        return SegmentResponse.model_validate_json(answer.content)
    except ValidationError as error:
        raise ServiceError(500, f"{answer.url} is no segmentation service: its answer is not what was asked for") from error


def _zip_frames(video: ImageFolder, file: Any) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # stored: the images are compressed already
        for name in video.names:
            archive.write(video.folder / name, name)
