"""OpenRLHF's remote-reward protocol: {"query", "prompts", "labels"} in, {"rewards", "scores", "extra_logs"} out.

As sent by `request_api_wrapper` (openrlhf/utils/remote_rm_utils.py) and `SingleTurnAgentExecutor` (openrlhf/utils/agent.py), as
answered by openrlhf/cli/serve_rm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from pydantic import BaseModel, Field

from reward_service.labels import labelled
from reward_service.score_request import MAX_ITEMS, InvalidItem, MalformedItem, ScoreResponse
from segmentation_service.service_request import ServiceError, Several

TAIL = 32
"""Characters of the prompt's end by which it is found in the query: an image's placeholders may have been repeated before it."""


class RemoteRewardRequest(BaseModel):
    """One entry a completion. Other keys are ignored, as OpenRLHF's own server does."""

    query: Several[str] = Field(description="prompt and completion, special tokens included")
    prompts: Optional[Several[str]] = Field(default=None, description="what the queries begin with; none: queries are completions")
    labels: Several[Any] = Field(description='of each the JSON of a target, or of an item without its completion: {"target": ..., "difficulty": ...}')


def items_of(query: Sequence[str], prompts: Sequence[str] | None, labels: Sequence[Any], end_tokens: Sequence[str]) -> list[dict[str, Any] | MalformedItem]:
    """The items of a `ScoreRequest`. Raises ServiceError 422 where there are not as many prompts and labels as queries."""
    prompts = [""] * len(query) if prompts is None else prompts
    if not len(query) == len(prompts) == len(labels):
        raise ServiceError(422, f"{len(query)} queries, {len(prompts)} prompts and {len(labels)} labels: each query has one of each")
    if len(query) > MAX_ITEMS:
        raise ServiceError(413, f"{len(query)} queries are more than the {MAX_ITEMS} that are taken")
    completions = [completion_of(text, prompt, end_tokens) for text, prompt in zip(query, prompts)]
    wrong = MalformedItem(reason="the query does not contain the end of its prompt")
    return [wrong if completion is None else labelled(completion, label) for completion, label in zip(completions, labels)]


def completion_of(query: str, prompt: str, end_tokens: Sequence[str]) -> str | None:
    """What follows the prompt, without the tokens that end a text; None where the prompt's end is not in the query."""
    start = 0
    if prompt:
        tail = prompt[-TAIL:]
        for _ in range(prompt.count(tail)):  # what the policy wrote may hold it too
            at = query.find(tail, start)
            if at < 0:
                return None
            start = at + len(tail)
    end = len(query)
    while (token := next((t for t in end_tokens if t and query.endswith(t, start, end)), None)) is not None:
        end -= len(token)
    return query[start:end]


def reply(response: ScoreResponse) -> dict[str, Any]:
    """rewards: totals; scores: totals as a part of the greatest one, for dynamic filtering; extra_logs: each term.

    Raises ServiceError where an item is invalid: 503 where it is worth trying again, else 422. A reward in its place would be a lie.
    """
    invalid = [s for s in response.scores if isinstance(s, InvalidItem)]
    if invalid:
        temporary = all(s.temporary for s in invalid)
        message = f"{len(invalid)} of {len(response.scores)} items could not be scored, the first because: {invalid[0].reason}"
        raise ServiceError(503 if temporary else 422, message, retry_after=5.0 if temporary else None)
    terms = [name for name in (response.scores[0].terms if response.scores else ()) if not name.startswith("weighted_")]
    return {
        "rewards": [s.total for s in response.scores],
        "scores": [s.total / response.maximum if response.maximum > 0 else 0.0 for s in response.scores],
        "extra_logs": {name: [s.terms[name] for s in response.scores] for name in terms},
    }
