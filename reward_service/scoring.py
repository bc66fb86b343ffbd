"""score: one completion against its target; score_group: all completions of one prompt, which shares the work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Sequence, Union

from reward_service import length as lengths_of
from reward_service.answer import Answer
from reward_service.config import RewardConfig
from reward_service.parsing import parse_answer
from reward_service.presets import pixelthink, revseg, seg_zero, veason_r1, videoseg_r1, vision_reasoner
from reward_service.target import MissingInput, Target

_FORMULAS = {
    "videoseg_r1": videoseg_r1,
    "seg_zero": seg_zero,
    "vision_reasoner": vision_reasoner,
    "pixelthink": pixelthink,
    "veason_r1": veason_r1,
    "revseg": revseg,
}


@dataclass(frozen=True)
class Score:
    """What a completion earned.

    total: original x length_penalty. terms: every active term as computed (its name) and as weighted
    ("weighted_<name>"), "original" (the sum of the weighted terms) and "length_penalty". answer: the parsed completion.
    valid: False only where scoring itself failed (never because of what the policy wrote); such a total is NaN.
    diagnostics: numbers for logs that earn nothing: length, difficulty, budget, n_predicted, n_true, box_iou, mask_iou.
    """

    total: float
    terms: dict[str, float]
    answer: Answer
    valid: bool = True
    diagnostics: dict = field(default_factory=dict)


def score(
    completion: Union[str, Answer],
    target: Target,
    config: Optional[RewardConfig] = None,
    difficulty: Optional[float] = None,
    uncertainty: Optional[float] = None,
    length: Optional[float] = None,
    predicted_masks=None,
) -> Score:
    """Reward of one completion.

    completion: text whose coordinates are those of the target, or the Answer of `parse_answer(text)`, converted with
        `.to_frame(units, policy_hw, frame_hw)` where the policy answered in other units.
    config: default `RewardConfig()`, the preset videoseg_r1. difficulty: 1..10 or None for the configured default.
    uncertainty: 0..1, used by presets that widen the budget with it. length: tokens used, counted as `config.length.unit`
        says (see `think_span`); units of words are counted here when it is None.
    predicted_masks: masks of `answer.objects`, in order, on the target frame: (N, H, W) bool, or N masks or RLE dicts
        (None for an object that could not be prompted). Where a term is about the video: {frame id: such masks} with each of
        target.frames, and with target.frame if another term is about the target frame.

    Raises MissingInput (a ValueError) when an active term lacks an input, ValueError when inputs do not fit each other.
    No completion, however malformed, raises. Sources of all terms: docs/rewards.md.
    """
    masks = None if predicted_masks is None else [predicted_masks]
    return score_group([completion], target, config, difficulty, [uncertainty], [length], masks)[0]


def score_group(
    completions: Sequence[Union[str, Answer]],
    target: Target,
    config: Optional[RewardConfig] = None,
    difficulty: Optional[float] = None,
    uncertainties: Optional[Sequence[Optional[float]]] = None,
    lengths: Optional[Sequence[Optional[float]]] = None,
    predicted_masks: Optional[Sequence] = None,
) -> list[Score]:
    """Rewards of the completions of one prompt, equal to calling `score` on each, faster.

    uncertainties, lengths, predicted_masks: one entry a completion; an entry of predicted_masks may be None where the
    answer has no objects. Raises as `score` does.
    """
    config = RewardConfig() if config is None else config
    n = len(completions)
    for name, given in (("uncertainties", uncertainties), ("lengths", lengths), ("predicted_masks", predicted_masks)):
        if given is not None and len(given) != n:
            raise ValueError(f"{len(given)} {name} for {n} completions: give one each")
    if predicted_masks is None and (active := config.mask_terms + config.video_terms):
        raise MissingInput(f"an active term ({', '.join(active)}) needs SAM2's masks: pass predicted_masks, or switch it off")
    if n == 0:
        return []
    answers = [c if isinstance(c, Answer) else parse_answer(c) for c in completions]
    formula = _FORMULAS[config.formula]
    rows = formula.group_terms(answers, target, config, predicted_masks)
    weights = [(name, f"weighted_{name}", getattr(config.weights, name)) for name in formula.MAXIMA]
    weights = [entry for entry in weights if entry[2]]
    uncertainties, lengths = ([None] * n if given is None else given for given in (uncertainties, lengths))
    penalties = _length_penalties(answers, config.length, difficulty, uncertainties, lengths)
    out = []
    for answer, (row, diagnostics), (s, of_length) in zip(answers, rows, penalties):
        diagnostics |= of_length
        terms, original = {}, 0.0
        for name, weighted_name, weight in weights:
            terms[name] = row[name]
            terms[weighted_name] = weight * row[name]
            original += terms[weighted_name]
        for own in config.own_terms:
            terms[own.name] = own(answer, target)
            terms[f"weighted_{own.name}"] = own.weight * terms[own.name]
            original += terms[f"weighted_{own.name}"]
        terms["original"] = original
        terms["length_penalty"] = s
        out.append(Score(original * s, terms, answer, True, diagnostics))
    return out


def _length_penalties(answers, config, difficulty, uncertainties, lengths) -> list[tuple[float, dict]]:
    """The factor of each answer, and what its diagnostics say of its length."""
    if not config.penalty:
        return [(1.0, {} if length is None else {"length": float(length)}) for length in lengths]
    difficulty = config.default_difficulty if difficulty is None else difficulty
    if config.uncertainty_scale:
        budgets = [lengths_of.budget(difficulty, uncertainty, config) for uncertainty in uncertainties]
    else:
        budgets = [lengths_of.budget(difficulty, None, config)] * len(answers)
    out = []
    for answer, allowed, length in zip(answers, budgets, lengths):
        used = lengths_of.used_length(answer.text, length, config)
        out.append((lengths_of.penalty(used, allowed, config), {"length": used, "budget": allowed, "difficulty": difficulty}))
    return out


def maximum(config: Optional[RewardConfig] = None) -> float:
    """The largest total a configuration can give."""
    config = RewardConfig() if config is None else config
    own = sum(term.weight for term in config.own_terms)
    return own + sum(getattr(config.weights, name) * most for name, most in _FORMULAS[config.formula].MAXIMA.items())
