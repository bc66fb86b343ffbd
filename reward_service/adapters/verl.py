"""verl: a file with `compute_score = verl_compute_score(preset="vision_reasoner")`, named by `reward.custom_reward_function.path`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reward_service.adapters.scorer import Scorer, ScoringFailed
from reward_service.labels import labelled
from reward_service.score_request import InvalidItem, ScoreItem

_FIELDS = [name for name in ScoreItem.model_fields if name not in ("completion", "target")]


def verl_compute_score(**settings: Any) -> Callable[..., dict[str, float]]:
    """A reward function for verl. settings: those of `Scorer`.

    `ground_truth` is the JSON of a target (see docs/reward_service.md); other fields of an item may stand in it or in `extra_info`.
    Returns {"score": total, and each term}, which verl logs. verl has no reward that is none: the function raises ScoringFailed.
    """
    scorer = Scorer(**settings)

    def compute_score(data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> dict[str, float]:
        more = {name: extra_info[name] for name in _FIELDS if name in extra_info} if extra_info else {}
        (found,) = scorer.score([labelled(solution_str, ground_truth, **more)]).scores
        if isinstance(found, InvalidItem):
            raise ScoringFailed(f"a completion could not be scored: {found.reason}")
        return {"score": found.total, **{name: value for name, value in found.terms.items() if not name.startswith("weighted_")}}

    return compute_score
