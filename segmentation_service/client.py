"""The same call in this process and through a Ray Serve handle: a request in, a response or a ServiceError out."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from .service_request import SegmentRequest, SegmentResponse, ServiceError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from .service import SegmentationService

MAX_DEATHS = 4
"""A request during which this many replicas died is given up: it may be what kills them."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0


class LocalClient:
    """Calls a service in this process, one request at a time. Threads may share it."""

    def __init__(self, service: SegmentationService) -> None:
        self._service, self._lock = service, threading.Lock()

    def segment(self, request: SegmentRequest) -> SegmentResponse:
        with self._lock:
            return _raised(self._service.segment_batch([request])[0])

    async def segment_async(self, request: SegmentRequest) -> SegmentResponse:
        return await asyncio.to_thread(self.segment, request)

    def stats(self) -> list[dict[str, float]]:
        return [self._service.stats()]


class Replicas:
    """Calls one method of the replicas behind a handle, from any thread or event loop: `method(request, alone=...)`, whose errors are returned.

    A request whose replica dies is sent again, after a growing pause: first in a batch of its own, from the second death on also
    one request at a time, so that one that kills its replica does not take the same others with it time and again. A full
    queue, no answer within `wait_seconds`, or no replica is a ServiceError 503; MAX_DEATHS dead replicas are a 500.
    """

    def __init__(self, handle: DeploymentHandle, method: str, wait_seconds: float = 900.0) -> None:
        self._handle, self._method, self.wait_seconds = handle, method, wait_seconds
        self.retries = 0
        self._suspects = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=f"{method}-client", daemon=True).start()

    def ask(self, request: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(self._ask(request), self._loop).result()

    async def ask_async(self, request: Any) -> Any:
        """Cancelling it cancels the request, if no replica is at work on it yet."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._ask(request), self._loop))

    def stats(self) -> list[dict[str, float]]:
        """Counters of every replica."""
        return self._handle.broadcast("stats").results(timeout_s=60)

    def close(self) -> None:
        """Ends the client's thread. Nothing may be under way."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _ask(self, request: Any) -> Any:
        try:
            async with asyncio.timeout(self.wait_seconds):
                return _raised(await self._until_answered(request))
        except TimeoutError:
            raise ServiceError(503, f"no answer within {self.wait_seconds:g} s", retry_after=10.0) from None

    async def _until_answered(self, request: Any) -> Any:
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError

        deaths = pauses = 0
        while True:
            try:
                async with self._suspects if deaths > 1 else nullcontext():
                    return await self._once(request, alone=deaths > 0)
            except (RayActorError, ReplicaUnavailableError) as error:
                deaths += 1
                if deaths == MAX_DEATHS:
                    raise ServiceError(500, f"{deaths} replicas died, one after another, while they had this request") from error
            except BackPressureError as error:
                if not deaths:  # once taken on, a request is not dropped for a full queue
                    raise ServiceError(503, f"the service is full: {error}", retry_after=1.0) from error
            except RayServeException as error:
                raise ServiceError(503, f"the service is not there: {error}", retry_after=10.0) from error
            except RayError as error:
                raise ServiceError(500, f"the request failed by a fault of the service ({type(error).__name__})") from error
            self.retries += 1
            await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**pauses) * random.uniform(0.5, 1.5))
            pauses += 1

    async def _once(self, request: Any, alone: bool) -> Any:
        response = getattr(self._handle, self._method).remote(request, alone=alone)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


class HandleClient(Replicas):
    """Calls the replicas that `serve.start` started."""

    def __init__(self, handle: DeploymentHandle, wait_seconds: float = 900.0) -> None:
        super().__init__(handle, "segment", wait_seconds)

    def segment(self, request: SegmentRequest) -> SegmentResponse:
        return self.ask(request)

    async def segment_async(self, request: SegmentRequest) -> SegmentResponse:
        return await self.ask_async(request)


def _raised(answer: Any) -> Any:
    if isinstance(answer, ServiceError):
        raise answer
    return answer
