"""The same call in this process, through a Ray Serve handle and by HTTP: a request in, a response or a ServiceError out."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pydantic import ValidationError

from reward_service.score_request import InvalidItem, ScoreItem, ScoreRequest, ScoreResponse
from reward_service.serve_config import RewardServeConfig, check
from reward_service.service import RewardService
from segmentation_service.client import Replicas
from segmentation_service.http_client import HttpClient as SegmentationClient
from segmentation_service.http_client import JsonClient
from segmentation_service.serve_config import TOKEN_VARIABLE
from segmentation_service.service_request import ServiceError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


def load(config: RewardServeConfig) -> RewardService:
    """The service in this process, with its client of the segmentation service. Raises ValueError where the settings cannot work."""
    check(config)
    segmentation = None
    if config.segmentation is not None:
        token = config.segmentation_token or os.environ.get(TOKEN_VARIABLE) or None
        segmentation = SegmentationClient(config.segmentation, token, config.segmentation_seconds, config.segmentation_seconds)
    return RewardService(config, segmentation)


class LocalClient:
    """Calls a service in this process. Threads may share it."""

    def __init__(self, service: RewardService) -> None:
        self._service = service
        self._threads = ThreadPoolExecutor(1, "reward-client")

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """In a thread of its own, so that it can also be called where an event loop runs."""
        return self._threads.submit(asyncio.run, self._service.score(request)).result()

    async def score_async(self, request: ScoreRequest) -> ScoreResponse:
        return await self._service.score(request)

    def stats(self) -> list[dict[str, float]]:
        return [dict(self._service.counts)]

    def close(self) -> None:
        self._threads.shutdown()


class HandleClient(Replicas):
    """Calls the replicas that `serve.start` started."""

    def __init__(self, handle: DeploymentHandle, wait_seconds: float = 300.0) -> None:
        super().__init__(handle, "score", wait_seconds)

    def score(self, request: ScoreRequest) -> ScoreResponse:
        return self.ask(request)

    async def score_async(self, request: ScoreRequest) -> ScoreResponse:
        return await self.ask_async(request)


class HttpClient(JsonClient):
    """Calls a server. Items that are malformed are not sent; they are invalid, as the server would say."""

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """Raises ServiceError as `post`."""
        return _scores(request, self.post("/v1/score", _body(request)).content)

    async def score_async(self, request: ScoreRequest) -> ScoreResponse:
        """As `score`. Cancelling it cancels the request."""
        return _scores(request, (await self.post_async("/v1/score", _body(request))).content)


def _body(request: ScoreRequest) -> str:
    items = tuple(item for item in request.items if isinstance(item, ScoreItem))
    return request.model_copy(update={"items": items}).model_dump_json(exclude_unset=True)


def _scores(request: ScoreRequest, body: bytes) -> ScoreResponse:
    """The server's scores, and in their places the malformed items."""
    try:
        response = ScoreResponse.model_validate_json(body)
        rest = iter(response.scores)
        scores = tuple(next(rest) if isinstance(item, ScoreItem) else InvalidItem(reason=item.reason) for item in request.items)
    except (ValidationError, RuntimeError, StopIteration) as error:
        raise ServiceError(500, "this is no reward service: its answer is not what was asked for") from error
    return response.model_copy(update={"scores": scores})
