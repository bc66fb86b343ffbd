"""The HTTP server: uvicorn on one port, strict about slow connections, stopped by Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .http_guard import error_json
from .service_request import ServiceError

HEADER_SECONDS = 10
STOP_SECONDS = 5
MAX_CONNECTIONS = 1000


class PortInUse(ValueError):
    """The port asked for cannot be had; the message says what to do."""


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection on which no whole request line and headers come within the keep-alive time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP at all: the error in JSON, like all others."""
        text, headers = error_json(ServiceError(400, msg))
        answer = h11.Response(status_code=400, headers=[*headers.items(), ("connection", "close")])
        self.transport.write(b"".join(self.conn.send(event) for event in (answer, h11.Data(data=text), h11.EndOfMessage())))
        self.transport.close()

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # the headers are there
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = None
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken early so that nothing is started in vain. Raises PortInUse."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
        listening.listen(MAX_CONNECTIONS)
        return listening
    except (OSError, OverflowError) as error:
        reason = {errno.EADDRINUSE: "another program listens there", errno.EACCES: "it needs more rights"}.get(getattr(error, "errno", None), str(error))
        raise PortInUse(f"cannot listen at {host}, port {port}: {reason}; choose another with port=N (0: any free one)") from error


def address(listening: socket.socket) -> str:
    """The URL of a server at the socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: Any, log_level: str = "warning") -> uvicorn.Server:
    """Serves after `run(sockets=[listening])`, until its `should_exit` is set or a signal comes.

    X-Forwarded-For is not believed. Connections past MAX_CONNECTIONS are answered with 503. Requests at work have STOP_SECONDS to end.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app, http=ImpatientProtocol, ws="none", loop="asyncio", lifespan="on", log_level=log_level, proxy_headers=False, server_header=False,
            limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=HEADER_SECONDS, timeout_graceful_shutdown=STOP_SECONDS,
        )
    )  # fmt: skip
