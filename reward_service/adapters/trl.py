"""TRL: `GRPOTrainer(reward_funcs=trl_reward(preset="vision_reasoner"))`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reward_service.adapters.scorer import Scorer, ScoringFailed
from reward_service.labels import labelled
from reward_service.score_request import InvalidItem, ItemScore, ScoreItem, ScoreResponse

_COLUMNS = [name for name in ScoreItem.model_fields if name not in ("completion", "target")]


def trl_reward(asynchronous: bool = False, **settings: Any) -> Callable[..., Any]:
    """A reward function for TRL. settings: those of `Scorer`; asynchronous: a coroutine function, which TRL runs beside others.

    The data set needs the column `target`: the JSON of a target (see docs/reward_service.md). Columns named as other fields of an
    item (difficulty, video, frame, units, ...) are passed on. Completions that could not be scored get None, which TRL leaves out of the
    group; the function raises ScoringFailed where none could. The means of the terms go to TRL's metrics.
    """
    scorer = Scorer(**settings)

    if asynchronous:

        async def videoseg_reward(prompts: Any, completions: Sequence[Any], target: Sequence[Any], **columns: Any) -> list[float | None]:
            return _rewards(await scorer.score_async(_items(completions, target, columns)), columns.get("log_metric"))

    else:

        def videoseg_reward(prompts: Any, completions: Sequence[Any], target: Sequence[Any], **columns: Any) -> list[float | None]:
            return _rewards(scorer.score(_items(completions, target, columns)), columns.get("log_metric"))

    return videoseg_reward


def _items(completions: Sequence[Any], targets: Sequence[Any], columns: dict[str, Any]) -> list[Any]:
    more = {name: columns[name] for name in _COLUMNS if name in columns}
    return [labelled(_text(c), t, **{name: column[i] for name, column in more.items()}) for i, (c, t) in enumerate(zip(completions, targets, strict=True))]


def _text(completion: Any) -> str:
    """A completion is a text, or the messages that a conversational data set gets; their content a text or a list of parts."""
    if isinstance(completion, str):
        return completion
    contents = [message["content"] for message in completion if message.get("role") == "assistant"]
    return "".join(c if isinstance(c, str) else "".join(part.get("text", "") for part in c) for c in contents)


def _rewards(response: ScoreResponse, log_metric: Callable[[str, float], None] | None) -> list[float | None]:
    scored = [s for s in response.scores if isinstance(s, ItemScore)]
    if response.scores and not scored:
        raise ScoringFailed(f"none of {len(response.scores)} completions could be scored, the first because: {response.scores[0].reason}")
    if log_metric is not None:
        log_metric("videoseg/invalid", 1.0 - len(scored) / max(1, len(response.scores)))
        for name in scored[0].terms if scored else ():
            if not name.startswith("weighted_"):
                log_metric(f"videoseg/{name}", sum(s.terms[name] for s in scored) / len(scored))
    return [None if isinstance(s, InvalidItem) else s.total for s in response.scores]
