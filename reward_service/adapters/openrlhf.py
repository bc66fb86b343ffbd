"""OpenRLHF: a file with `reward_func = openrlhf_reward_func(preset="vision_reasoner")`, named by `--reward.remote_url`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reward_service.adapters.scorer import Scorer, ScoringFailed
from reward_service.openrlhf_protocol import items_of, reply
from reward_service.serve_config import RewardServeConfig
from segmentation_service.service_request import ServiceError


def openrlhf_reward_func(end_tokens: Sequence[str] | None = None, **settings: Any) -> Callable[..., dict[str, Any]]:
    """A reward function for OpenRLHF. settings: those of `Scorer`; end_tokens: see `RewardServeConfig.end_tokens`.

    labels are the JSON of targets (see docs/reward_service.md). Returns tensors as OpenRLHF's own example does. Its protocol has no
    reward that is none: the function raises ScoringFailed where a completion could not be scored.
    """
    scorer = Scorer(**settings)
    ends = RewardServeConfig().end_tokens if end_tokens is None else list(end_tokens)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> dict[str, Any]:
        import torch

        try:
            found = reply(scorer.score(items_of(queries, prompts, labels, ends)))
        except ServiceError as error:
            raise ScoringFailed(str(error)) from error
        logs = {name: torch.tensor(values) for name, values in found["extra_logs"].items()}
        return {"rewards": torch.tensor(found["rewards"]), "scores": torch.tensor(found["scores"]), "extra_logs": logs}

    return reward_func
