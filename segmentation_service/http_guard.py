"""What stands before the application: token, body and time limits, and how many requests may be in flight. Pure ASGI middleware."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

from .serve_config import TOKEN_VARIABLE
from .service_request import ServiceError

logger = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/healthz", "/openapi.json", "/docs")  # they say nothing that the source code does not
DRAIN_SECONDS = 1.0


class Limits(Protocol):
    """The settings that count here; with uploads also their `max_upload_bytes` and `upload_body_seconds`."""

    host: str
    token: str | None
    max_body_bytes: int
    body_seconds: float
    wait_seconds: float
    max_in_flight: int
    max_in_flight_per_client: int


class UnsafeServer(ValueError):
    """A server that would be open to others; the message says what to do."""


def bearer_token(config: Limits) -> str | None:
    """The token that requests must carry, of the settings or else of the environment.

    Raises UnsafeServer where it would be easily guessed, or where there is none although other machines can reach the server.
    """
    token = config.token or os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not is_loopback(config.host):
        raise UnsafeServer(f"host={config.host} lets other machines in, so a token is needed; set {TOKEN_VARIABLE} in the environment, or host=127.0.0.1")
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise UnsafeServer(f"the token must have at least 8 printable ASCII characters and no spaces; got {len(token)} characters")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`. Names other than localhost count as open."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses before it is read what may not or cannot be served, and gives up what is late or nobody waits for any more.

    Bodies are counted as they come, so a missing or wrong Content-Length changes nothing. A small body is read here, that of an upload
    goes on to the application piece by piece. Counts are this process's own: run one server a port.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        config: Limits,
        token: str | None,
        in_flight: Counter[str],
        answers: Counter[int],
        uploads: str | None = None,
    ) -> None:
        """in_flight by client and answers by status are kept up to date for the caller to read. uploads: where large bodies are posted."""
        self.app, self.config, self.token, self.uploads = app, config, token, uploads
        self.in_flight, self.answers = in_flight, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            raise ValueError(f"there is nothing here for {scope['type']}")
        is_upload = scope["method"] == "POST" and scope["path"] == self.uploads
        body = _Body(receive, self.config.max_upload_bytes if is_upload else self.config.max_body_bytes)
        answer = _Answer(send, body, self.answers)
        client, counted = (scope.get("client") or ("",))[0], scope["path"] not in OPEN_PATHS
        try:
            if counted:
                self._check_token(scope)
                self._check_in_flight(client)
            self.in_flight[client] += counted
            try:
                body.check_length(scope)
                await self._run(scope, body, answer, is_upload)
            finally:
                self.in_flight[client] -= counted
                if not self.in_flight[client]:
                    del self.in_flight[client]
        except ServiceError as error:
            await answer.refuse(error)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await answer.refuse(ServiceError(500, "a fault of the service; its log says more"))

    def _check_token(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.token is None:
            # Else a web page could reach the server under a name of its own that it lets lead to this machine, and read the answers.
            if not is_loopback(_host(headers.get(b"host", b""))):
                raise ServiceError(401, "a server without a token answers only under the names localhost and 127.0.0.1")
            return
        given = headers.get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self.token.encode()):
            raise ServiceError(401, "wrong token" if given else "this service needs the header `Authorization: Bearer TOKEN`")

    def _check_in_flight(self, client: str) -> None:
        if self.in_flight.total() >= self.config.max_in_flight:
            raise ServiceError(503, f"the service is full: {self.config.max_in_flight} requests are in flight", 1)
        if self.in_flight[client] >= self.config.max_in_flight_per_client:
            raise ServiceError(429, f"{self.config.max_in_flight_per_client} of your requests are in flight, which is the limit", 1)

    async def _run(self, scope: Scope, body: _Body, answer: _Answer, is_upload: bool) -> None:
        """The application against the clock and the client's patience."""
        if not is_upload:
            await body.read_within(self.config.body_seconds)
        seconds = self.config.upload_body_seconds if is_upload else self.config.wait_seconds
        app = asyncio.ensure_future(self.app(scope, body.receive, answer.send))
        gone = asyncio.ensure_future(body.client_left())
        try:
            await asyncio.wait({app, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if app.done():
                await app
            elif not body.complete.is_set():
                raise _slow(seconds)
            elif not gone.done():
                raise ServiceError(503, f"not done within {seconds:g} s; ask for less at a time, or try again when the service is less busy", 5)
        finally:
            for task in (app, gone):
                task.cancel()
            await asyncio.gather(app, gone, return_exceptions=True)


class _Body:
    """The request's body on its way in."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self.limit = receive, limit
        self.count, self.kept = 0, None
        self.complete = asyncio.Event()  # nothing is left to read

    def check_length(self, scope: Scope) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit():
            raise ServiceError(400, "Content-Length is not a number")
        if len(length) > 18 or int(length) > self.limit:
            raise ServiceError(413, f"the body has {length[:18].decode()} bytes; the limit is {self.limit}")

    async def receive(self) -> dict[str, Any]:
        """As ASGI's; raises ServiceError 413 as soon as more has come than is allowed."""
        if self.kept is not None:
            message, self.kept = {"type": "http.request", "body": self.kept, "more_body": False}, None
            return message
        message = await self._receive()
        self.count += len(message.get("body", b""))
        if self.count > self.limit:
            raise ServiceError(413, f"the body has more than {self.limit} bytes, which is the limit")
        if not message.get("more_body"):
            self.complete.set()
        return message

    async def read_within(self, seconds: float) -> None:
        """Read all of it; `receive` then gives it in one piece. Raises ServiceError 408 where it is late."""
        pieces = []
        try:
            async with asyncio.timeout(seconds):
                while not self.complete.is_set():
                    pieces.append((await self.receive()).get("body", b""))
        except TimeoutError as error:
            raise _slow(seconds) from error
        self.kept = b"".join(pieces)

    async def client_left(self) -> None:
        await self.complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def drain(self) -> None:
        """Read on for a moment, so that a client which is still sending comes to read the answer instead of meeting a closed connection."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while (await self._receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass


class _Answer:
    """The answer on its way out."""

    def __init__(self, send: Send, body: _Body, answers: Counter[int]) -> None:
        self._send, self._body, self._answers, self.begun = send, body, answers, False

    async def send(self, message: dict[str, Any]) -> None:
        """As ASGI's. The connection is closed behind an answer that came before the body's end: what is left would pass for the next request."""
        unread = not self._body.complete.is_set()
        if message["type"] == "http.response.start":
            self.begun = True
            self._answers[message["status"]] += 1
            if unread:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        elif unread and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._body.drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def refuse(self, error: ServiceError) -> None:
        if self.begun:  # too late to say so; the server closes a connection whose answer breaks off
            return
        text, headers = error_json(error)
        await self.send({"type": "http.response.start", "status": error.status, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]})
        await self.send({"type": "http.response.body", "body": text})


def error_json(error: ServiceError, **more: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an error's answer: {"error": message, ...}, with Retry-After where trying again makes sense."""
    text = json.dumps({"error": error.message, **more}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(text))}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return text, headers


def _host(header: bytes) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{header.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


def _slow(seconds: float) -> ServiceError:
    return ServiceError(408, f"the request's body did not come within {seconds:g} s")
