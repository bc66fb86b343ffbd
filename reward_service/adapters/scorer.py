"""What all adapters do: score items in this process, or through a server."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from reward_service.client import HttpClient, LocalClient, load
from reward_service.score_request import InvalidItem, MalformedItem, ScoreRequest, ScoreResponse
from reward_service.serve_config import RewardServeConfig
from reward_service.tags import think_text
from segmentation_service.serve_config import TOKEN_VARIABLE

logger = logging.getLogger(__name__)


class ScoringFailed(RuntimeError):
    """A completion has no reward because its scoring failed, and the RL stack has no way to go on without."""


class Scorer:
    """Settings of an adapter; the client is made at first use, so that it can travel to other processes.

    url: of a reward service (`videoseg serve reward`); None: score in this process. preset, reward: see `ScoreRequest`. token: of
    the server, or where it scores here of the segmentation service; None: that of VIDEOSEG_TOKEN. segmentation: URL of a
    segmentation service, where it scores here and a term needs masks. tokenizer: counts the tokens of the reasoning for the length
    penalty (a Hugging Face tokenizer, or its name or folder); whole_response: those of all of the completion instead.
    """

    def __init__(
        self,
        url: str | None = None,
        preset: str | None = None,
        reward: Mapping[str, Any] | None = None,
        token: str | None = None,
        segmentation: str | None = None,
        tokenizer: Any = None,
        whole_response: bool = False,
    ) -> None:
        if url is not None and segmentation is not None:
            raise ValueError("segmentation is a setting of the server where url is given; start that with segmentation=URL")
        self.url, self.preset, self.reward = url, preset, None if reward is None else dict(reward)
        self.token, self.segmentation, self.tokenizer, self.whole_response = token, segmentation, tokenizer, whole_response
        self._client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def score(self, items: Sequence[dict[str, Any] | MalformedItem]) -> ScoreResponse:
        """Raises ServiceError where the request as a whole fails."""
        return _logged(self._started().score(self.request(items)))

    async def score_async(self, items: Sequence[dict[str, Any] | MalformedItem]) -> ScoreResponse:
        return _logged(await self._started().score_async(self.request(items)))

    def request(self, items: Sequence[dict[str, Any] | MalformedItem]) -> ScoreRequest:
        """The items with their lengths, where there is a tokenizer and they have none."""
        if self.tokenizer is not None:
            items = [i if isinstance(i, MalformedItem) or "length" in i else {**i, "length": self._tokens(i["completion"])} for i in items]
        return ScoreRequest(items=items, preset=self.preset, reward=self.reward)

    def _tokens(self, completion: str) -> int:
        if isinstance(self.tokenizer, (str, os.PathLike)):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        return len(self.tokenizer.encode(completion if self.whole_response else think_text(completion), add_special_tokens=False))

    def _started(self) -> Any:
        if self._client is None:
            if self.url is not None:
                self._client = HttpClient(self.url, self.token or os.environ.get(TOKEN_VARIABLE) or None)
            else:
                self._client = LocalClient(load(RewardServeConfig(segmentation=self.segmentation, segmentation_token=self.token)))
        return self._client


def _logged(response: ScoreResponse) -> ScoreResponse:
    invalid = [s for s in response.scores if isinstance(s, InvalidItem)]
    if invalid:
        logger.warning("%d of %d completions could not be scored, the first because: %s", len(invalid), len(response.scores), invalid[0].reason)
    return response
