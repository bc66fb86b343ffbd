"""The numbers of a step: their names, how they come from single rollouts, and where they are written.

Names (a `*` stands for a term, stage, class or service):

    reward/mean reward/std reward/term/*                 iou/box iou/mask iou/video
    length/response length/response/{easy,medium,hard} length/reasoning length/truncated_fraction
    length/factor length/factor/{easy,medium,hard} length/penalised_fraction
    difficulty/mean difficulty/success_rate              length/uncertainty
    answers/invalid_fraction                             groups/zero_variance_fraction groups/used groups/dropped
    groups/dropped/{late,zero_variance}
    kl/reference                                         mismatch/{kl,logprob_diff,prob_error,largest}
    clip/low_fraction clip/high_fraction                 learner/grad_norm learner/loss learner/lr
    tokens/prompt tokens/response tokens/per_second      seconds/* seconds/step
    staleness/0 staleness/1 …                            failures/{scoring,too_long,video} failures/video/{unreadable,slow,crashed}
    sft/loss sft/answers/{iou_box,invalid_fraction}      eval/*

Fractions are 0..1, lengths are tokens, times are seconds, KLs are nats per token.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.checkpoints import replace_text
from cluster.errors import DataError
from cluster.ledger import Final
from cluster.sinks import Sink


@dataclass(frozen=True)
class ScoredCompletion:
    """What the metrics need to know of one completion.

    `scored` is False if scoring failed (its numbers then count nowhere but in `failures/*` and `groups/*`).
    `well_formed` is False if no answer could be parsed. IoUs are those of the answer with the ground truth, 0..1, None if
    not computed. `difficulty` and `success_rate` are the group's, None where unknown or not estimated. `staleness` counts the
    weight versions between generation and training.
    """

    group: int
    scored: bool
    reward: float = math.nan
    terms: Mapping[str, float] = field(default_factory=dict)
    well_formed: bool = True
    box_iou: float | None = None
    mask_iou: float | None = None
    prompt_tokens: int = 0
    response_tokens: int = 0
    reasoning_tokens: int = 0
    length_factor: float = 1.0
    difficulty_class: str | None = None
    truncated: bool = False
    staleness: int = 0
    used: bool = True
    video_iou: float | None = None
    difficulty: float | None = None
    success_rate: float | None = None
    uncertainty: float | None = None


def completion_metrics(completions: Sequence[ScoredCompletion]) -> dict[str, float]:
    """The metrics of one step that come from its completions. A mean over nothing is left out, never 0."""
    scored = [c for c in completions if c.scored]
    out: dict[str, float] = {}

    def mean(name: str, values: Sequence[float]) -> None:
        if len(values):
            out[name] = math.fsum(values) / len(values)

    mean("reward/mean", [c.reward for c in scored])
    if scored:
        out["reward/std"] = float(np.std([c.reward for c in scored]))
    for term in sorted({t for c in scored for t in c.terms}):
        mean(f"reward/term/{term}", [c.terms[term] for c in scored if term in c.terms])
    mean("iou/box", [c.box_iou for c in scored if c.box_iou is not None])
    mean("iou/mask", [c.mask_iou for c in scored if c.mask_iou is not None])
    mean("iou/video", [c.video_iou for c in scored if c.video_iou is not None])
    mean("length/response", [c.response_tokens for c in completions])
    mean("length/reasoning", [c.reasoning_tokens for c in scored])
    mean("length/truncated_fraction", [c.truncated for c in completions])
    mean("length/factor", [c.length_factor for c in scored])
    mean("length/penalised_fraction", [c.length_factor < 1 for c in scored])
    for difficulty in sorted({c.difficulty_class for c in scored if c.difficulty_class}):
        mean(f"length/factor/{difficulty}", [c.length_factor for c in scored if c.difficulty_class == difficulty])
        mean(f"length/response/{difficulty}", [c.response_tokens for c in scored if c.difficulty_class == difficulty])
    mean("difficulty/mean", [c.difficulty for c in scored if c.difficulty is not None])
    mean("difficulty/success_rate", [c.success_rate for c in scored if c.success_rate is not None])
    mean("length/uncertainty", [c.uncertainty for c in scored if c.uncertainty is not None])
    mean("answers/invalid_fraction", [not c.well_formed for c in scored])
    out |= group_metrics(completions)
    out["tokens/prompt"] = float(sum(c.prompt_tokens for c in completions))
    out["tokens/response"] = float(sum(c.response_tokens for c in completions))
    out["failures/scoring"] = float(len(completions) - len(scored))
    for staleness, count in sorted(Counter(c.staleness for c in scored).items()):
        out[f"staleness/{staleness}"] = float(count)
    return out


def group_metrics(completions: Sequence[ScoredCompletion]) -> dict[str, float]:
    """How many groups were used and dropped, and the share of the used ones whose rewards are all exactly equal."""
    rewards: dict[int, list[float]] = defaultdict(list)
    groups = {c.group for c in completions}
    for c in completions:
        if c.scored and c.used:
            rewards[c.group].append(c.reward)
    out = {"groups/used": float(len(rewards)), "groups/dropped": float(len(groups) - len(rewards))}
    if rewards:
        # Equality is decided by max and min: a standard deviation of equal floats need not come out as 0.
        out["groups/zero_variance_fraction"] = sum(max(r) == min(r) for r in rewards.values()) / len(rewards)
    return out


def left_out_metrics(kinds: Sequence[str]) -> dict[str, float]:
    """How many episodes were left out: for prompts, or answers to learn, that are too long; for their videos, all and by kind of fault."""
    counts = Counter(kinds)
    too_long = counts.pop("too_long", 0)
    by_kind = {f"failures/video/{kind}": float(count) for kind, count in sorted(counts.items())}
    return {"failures/too_long": float(too_long), "failures/video": float(counts.total())} | by_kind


def dropped_metrics(dropped: Sequence[Final]) -> dict[str, float]:
    """How many groups were begun and dropped before an update could get them, for each reason."""
    return {f"groups/dropped/{reason.replace(' ', '_')}": float(count) for reason, count in sorted(Counter(f.reason for f in dropped if ":" not in f.reason).items())}


def best_step(path: str | Path, name: str) -> int | None:
    """The step with the best value of this metric in a `metrics.jsonl`, of a loss the smallest, else the largest; the first of equal ones, step 0 left out;
    None where there is none."""
    records = [record for record in read_metrics(path) if record["step"] > 0 and record.get(name) is not None]
    sign = -1 if name.endswith("/loss") else 1
    return max(records, key=lambda record: sign * record[name])["step"] if records else None


class StageTimes:
    """Seconds spent in each stage of a step; a stage entered twice adds up. `now` tells which one is running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.now: str | None = None
        self._start = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer, self.now, start = self.now, name, time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            self.now = outer

    def metrics(self, response_tokens: float = 0.0) -> dict[str, float]:
        """`seconds/*`, and `tokens/per_second` over the whole step."""
        total = time.monotonic() - self._start
        out = {f"seconds/{name}": value for name, value in self.seconds.items()} | {"seconds/step": total}
        return out | ({"tokens/per_second": response_tokens / total} if response_tokens and total > 0 else {})


class MetricsWriter:
    """Writes `metrics.jsonl`, one object a step, and hands the finite numbers on to `sinks`.

    Each line is on disk when `write` returns. A value that is not finite is written as null (JSON has no NaN) and counted
    under `nonfinite_values`. With `resume_step`, lines of later steps are dropped first, as that step's successor is run again.
    """

    def __init__(self, run_folder: str | Path, resume_step: int | None = None, sinks: Sink | None = None) -> None:
        self.path = Path(run_folder) / "metrics.jsonl"
        if resume_step is not None and self.path.exists():
            drop_after(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")
        self._sinks = sinks

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Write one step; returns the object as written."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        record = {"step": step, "time": round(time.time(), 3)} | {name: finite.get(name) for name in numbers}
        if len(finite) < len(numbers):
            record["nonfinite_values"] = len(numbers) - len(finite)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._sinks is not None:
            self._sinks.write(step, finite)
        return record

    def close(self) -> None:
        self._file.close()
        if self._sinks is not None:
            self._sinks.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a `metrics.jsonl`; a last line that was cut short by a crash is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no newline after it
                break
            raise DataError(f"{path}:{number}: not a line of metrics ({error})", "remove the line") from error
    return records


def drop_after(path: str | Path, step: int) -> int:
    """Remove the lines of steps later than `step` and a line that was cut short; returns how many steps went."""
    path = Path(path)
    records = read_metrics(path)
    kept = [r for r in records if r["step"] <= step]
    replace_text(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in kept))
    return len(records) - len(kept)
