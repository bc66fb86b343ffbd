"""From scored groups to what is kept of them: rows of the rollout log, metrics, and the learner's samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from learner.batch import Sample

from cluster.metrics import ScoredCompletion
from cluster.rollout_log import RolloutRow
from cluster.scoring import ScoredGroup


def samples_of(group: ScoredGroup) -> list[Sample]:
    """One sample per completion, without an advantage yet; they share the prompt's arrays."""
    prompt = group.draw.prompt
    return [
        Sample(
            prompt_ids=prompt.token_ids,
            response_ids=c.token_ids,
            rollout_logprobs=c.logprobs,
            images=prompt.images,
            grid_thw=prompt.grid_thw,
            group=group.draw.position,
            fingerprint=prompt.fingerprint,
            truncated=c.finish_reason == "length",
        )
        for c in group.completions
    ]


def scored_completions(groups: Sequence[ScoredGroup], version: int) -> list[ScoredCompletion]:
    """What `metrics.completion_metrics` needs; `version` is that of the weights when training begins."""
    return [
        ScoredCompletion(
            group=g.draw.position,
            scored=g.failure is None,
            reward=g.scores[i].total if g.scores else float("nan"),
            terms=g.scores[i].terms if g.scores else {},
            well_formed=g.answers[i].well_formed,
            box_iou=g.box_ious[i] if g.box_ious else None,
            mask_iou=g.mask_ious[i] if g.mask_ious else None,
            video_iou=g.video_ious[i] if g.video_ious else None,
            prompt_tokens=len(g.draw.prompt.token_ids),
            response_tokens=len(c.token_ids),
            reasoning_tokens=g.reasoning_tokens[i],
            length_factor=g.scores[i].terms.get("length_penalty", 1.0) if g.scores else 1.0,
            difficulty=g.difficulty,
            difficulty_class=g.difficulty_class,
            success_rate=g.success_rate,
            uncertainty=g.uncertainties[i] if g.uncertainties else None,
            truncated=c.finish_reason == "length",
            staleness=version - min(int(v) for v, _ in c.weight_versions),
            used=g.failure is None,
        )
        for g in groups
        for i, c in enumerate(g.completions)
    ]


def rollout_rows(step: int, groups: Sequence[ScoredGroup], advantages: Mapping[int, Sequence[float | np.ndarray]], processor: str) -> list[RolloutRow]:
    """One row per completion. `advantages` are keyed by the draw's position; `processor` is the engines' fingerprint."""
    return [_row(step, g, i, advantages.get(g.draw.position), processor) for g in groups for i in range(len(g.completions))]


def _row(step: int, group: ScoredGroup, i: int, advantages: Sequence[float | np.ndarray] | None, processor: str) -> RolloutRow:
    draw, c, answer = group.draw, group.completions[i], group.answers[i]
    prompt, score = draw.prompt, group.scores[i] if group.scores else None
    objects = [{"box": o.box, "points": o.points, "negative_points": o.negative_points} for o in answer.objects]
    return RolloutRow(
        step=step,
        group=draw.position,
        index=i,
        episode_id=draw.episode.episode_id,
        query=draw.episode.query,
        difficulty=group.difficulty,
        difficulty_class=group.difficulty_class,
        video=str(draw.episode.video_path),
        frame_ids=list(prompt.frame_ids),
        target_frame=prompt.target_frame,
        frame_hw=list(prompt.frame_hw),
        policy_hw=list(prompt.policy_hw),
        grid_thw=prompt.grid_thw.tolist(),
        units=prompt.units,
        prompt_text=prompt.text,
        prompt_token_ids=prompt.token_ids,
        prompt_fingerprint=prompt.fingerprint,
        processor_fingerprint=processor,
        response_text=c.text,
        response_token_ids=c.token_ids,
        rollout_logprobs=c.logprobs,
        weight_versions=list(c.weight_versions),
        seed=c.seed,
        finish_reason=c.finish_reason,
        valid=score is not None,
        failure=group.failure,
        answer_json=json.dumps(objects) if objects or answer.strict else None,
        reward=score.total if score else None,
        reward_terms=dict(score.terms) if score else {},
        length_factor=score.terms.get("length_penalty") if score else None,
        box_iou=group.box_ious[i] if group.box_ious else None,
        mask_iou=group.mask_ious[i] if group.mask_ious else None,
        advantage=float(np.mean(advantages[i])) if advantages is not None else None,
        masks=list(group.masks[i]) if group.masks is not None else None,
    )


def learner_metrics(learned: Mapping[str, float]) -> dict[str, float]:
    """The learner's numbers under the names that `metrics` lists."""
    names = {
        "kl": "kl/reference",
        "mismatch_kl": "mismatch/kl",
        "mismatch_abs": "mismatch/logprob_diff",
        "multiplicative_error": "mismatch/prob_error",
        "max_mismatch": "mismatch/largest",
        "clip_low_fraction": "clip/low_fraction",
        "clip_high_fraction": "clip/high_fraction",
    }
    return {names.get(name, f"learner/{name}"): value for name, value in learned.items()}
