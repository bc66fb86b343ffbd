"""The HTTP interface: scores, also by OpenRLHF's protocol. Whatever client it is given does the work."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from reward_service import openrlhf_protocol, serve_config
from reward_service.openrlhf_protocol import RemoteRewardRequest
from reward_service.score_request import ScoreRequest, ScoreResponse
from reward_service.serve_config import RewardServeConfig
from segmentation_service.http_app import errors, guarded_app


class Client(Protocol):
    """What answers requests: `client.LocalClient`, `client.HandleClient`, or anything like them."""

    async def score_async(self, request: ScoreRequest) -> ScoreResponse:
        """Raises ServiceError. Cancelled where nobody waits for the answer any more."""

    def stats(self) -> list[dict[str, float]]:
        """Counters of each replica."""


_ERRORS = errors({413: "over a limit: bytes, items", 422: "understood, but impossible: a wrong field of the batch, an unknown preset or setting"})


def make_app(client: Client, config: RewardServeConfig) -> FastAPI:
    """The application, guarded. Raises ValueError where the settings are wrong, or would let others in without a token."""
    serve_config.check(config)

    def stats() -> dict[str, Any]:
        return {"replicas": client.stats()}

    what = "Completions and what they are scored against in, rewards out."
    app = guarded_app(config, "VideoSeg-R1 reward service", what, stats)

    @app.post("/v1/score", responses=_ERRORS)
    async def score(request: ScoreRequest) -> ScoreResponse:
        """A score for each item, or why it has none. An item that cannot be scored changes nothing about the others."""
        return await client.score_async(request)

    @app.post("/get_reward", responses=_ERRORS)
    async def get_reward(request: RemoteRewardRequest) -> JSONResponse:
        """OpenRLHF's protocol, scored by the settings of the server. It cannot say that an item is invalid: one such item fails the request."""
        items = openrlhf_protocol.items_of(request.query, request.prompts, request.labels, config.end_tokens)
        return JSONResponse(openrlhf_protocol.reply(await client.score_async(ScoreRequest(items=items))))

    return app
