"""What the stages of a run cost, from its timeline, metrics and rollouts: the numbers that `cluster.simulate` needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from cluster import timeline
from cluster.config import RunConfig, load
from cluster.errors import UserError
from cluster.metrics import read_metrics
from cluster.rollout_log import read_columns, rollout_files
from cluster.run_folder import RunFolder
from cluster.sections import LoopConfig
from cluster.simulate import Costs, Forecast, Sizes, simulate

WARM_UP = 1  # first steps that are left out
FEWEST = 5  # steps to fit costs to
MODES = (0, 1, 3)  # of loop.max_staleness, beside the configured one


@dataclass(frozen=True)
class Measured:
    """Costs of a run's stages, the sizes that it had, and how long its steps took, the first left out."""

    costs: Costs
    sizes: Sizes
    steps: int
    step_seconds: float

    def lines(self) -> list[str]:
        """The costs, and whether the simulator finds the run's own step time with them."""
        c, s = self.costs, self.sizes
        own = simulate(c, s, LoopConfig(steps=12)).step_seconds
        return [
            f"engine: {1e3 * c.step_seconds:.2f} ms a decoding step and {1e3 * c.sequence_seconds:.3f} ms a sequence in it, {1e3 * c.prompt_seconds:.1f} ms a group's prompt; "
            f"segmenter: {1e3 * c.score_seconds:.1f} ms a group; update: {c.learn_seconds:.2f} s and {1e3 * c.token_seconds:.3f} ms a token and rank; sync: {c.sync_seconds:.2f} s",
            f"its own steps, {s.groups} groups of {s.completions}: {self.step_seconds:.2f} s measured (median of {self.steps}), {own:.2f} s simulated ({own / self.step_seconds - 1:+.0%})",
        ]


def sizes_of(config: RunConfig) -> Sizes:
    """What the simulator counts of a configuration."""
    rollout = config.rollout
    return Sizes(rollout.engines, config.segmentation.replicas, config.learner.ranks, rollout.max_sequences or Sizes.sequences, rollout.prompts_per_step, rollout.group_size)


def measure(folder: RunFolder) -> Measured:
    """From a synchronous run, in which the stages of a step do not overlap.

    A step's generation takes about prompt_seconds x groups + step_seconds x decoding steps + sequence_seconds x tokens, an update learn_seconds + token_seconds x
    tokens / ranks; both are fitted over the steps by least squares, no cost below 0. Raises UserError where the run was asynchronous, deterministic or short.
    """
    config = load(folder.config)
    if config.loop.max_staleness or config.loop.wait_for < 1 or config.loop.deterministic or config.loop.learn_on_arrival:
        raise UserError(f"{folder.path} is no synchronous run: its stages overlap, or its engines work in order", "name a run with loop.max_staleness=0, loop.wait_for=1, loop.deterministic=false and loop.learn_on_arrival=false")
    sizes, calls = sizes_of(config), _calls(folder)
    records = {r["step"]: r for r in read_metrics(folder.metrics) if "seconds/step" in r}
    lengths = {step: _lengths(file) for step, file in rollout_files(folder.rollouts) if step in records and step in calls and step != config.loop.profile_step}
    if len(lengths) < WARM_UP + FEWEST:
        raise UserError(f"{folder.path} has {len(lengths)} steps with metrics, rollouts and timeline, too few to fit costs to", f"name a run of at least {WARM_UP + FEWEST} steps")
    steps = sorted(lengths)[WARM_UP:]
    engine = [row for step in steps for row in _engine_rows(calls[step], lengths[step], sizes)]
    prompt, decoding, sequence = _fit([row[:3] for row in engine], [row[3] for row in engine])
    seconds = {name: np.array([records[step].get(f"seconds/{name}", 0.0) for step in steps]) for name in ("step", "rollout", "sync")}
    tokens = [sum(map(sum, lengths[step].values())) / sizes.ranks for step in steps]
    learn, token = _fit([(1.0, count) for count in tokens], seconds["step"] - seconds["rollout"] - seconds["sync"])
    scoring = [busy for step in steps if (busy := _busy_seconds([c for c in calls[step] if c.track.startswith("segmenter")]))]
    costs = Costs(
        lengths=[length for step in steps for group in lengths[step].values() for length in group],
        step_seconds=decoding,
        sequence_seconds=sequence,
        prompt_seconds=prompt,
        score_seconds=float(np.median(scoring)) if scoring else 0.0,
        learn_seconds=learn,
        token_seconds=token,
        sync_seconds=float(np.median(seconds["sync"])),
    )
    return Measured(costs, sizes, len(steps), float(np.median(seconds["step"])))


def forecasts(measured: Measured, config: RunConfig) -> list[tuple[int, Forecast]]:
    """(loop.max_staleness, what the simulator says) of a configuration and of the other modes, synchronous first."""
    sizes, stalenesses = sizes_of(config), sorted({*MODES, config.loop.max_staleness})
    return [(n, simulate(measured.costs, sizes, replace(config.loop, steps=15, max_staleness=n))) for n in stalenesses]


def table(found: Sequence[tuple[int, Forecast]], configured: int) -> list[str]:
    lines = [f"{'loop.max_staleness':<20} {'s a step':>9} {'engines busy':>13} {'segmenters':>11} {'learner':>8} {'mean staleness':>15}"]
    for n, f in found:
        name = f"{n}{' (configured)' if n == configured else ''}"
        lines.append(f"{name:<20} {f.step_seconds:>9.2f} {f.engines_busy:>13.0%} {f.segmenters_busy:>11.0%} {f.learner_busy:>8.0%} {f.mean_staleness:>15.2f}")
    return lines


def _calls(folder: RunFolder) -> dict[int, list[timeline.Span]]:
    """The calls to engines and segmenters that began in each step's rollout stage, by step."""
    spans = timeline.spans(folder.path / timeline.FILE)
    stages = [(s.begin, s.end, s.details["version"] + 1) for s in spans if (s.track, s.name) == ("loop", "rollout")]
    calls = [s for s in spans if s.name in ("generate", "segment_group", "propagate_group")]
    return {step: [c for c in calls if begin <= c.begin <= end] for begin, end, step in stages}


def _lengths(file: Path) -> dict[int, list[int]]:
    """Tokens of the responses of each group of a step."""
    columns, groups = read_columns(file, ["group", "response_token_ids"]), {}
    for group, tokens in zip(columns["group"], columns["response_token_ids"]):
        groups.setdefault(group, []).append(len(tokens))
    return groups


def _engine_rows(calls: Sequence[timeline.Span], lengths: dict[int, list[int]], sizes: Sizes) -> list[tuple[float, float, float, float]]:
    """(groups, decoding steps, tokens, seconds) of each engine in a step; nothing where some group was asked for again."""
    asked = sorted((c for c in calls if c.name == "generate"), key=lambda c: c.details["number"])
    if len(asked) != len(lengths):
        return []
    groups, rows = [lengths[group] for group in sorted(lengths)], []
    for engine in sorted({c.track for c in asked}):
        mine = [(call, group) for call, group in zip(asked, groups) if call.track == engine]
        tokens, longest = sum(sum(group) for _, group in mine), max(max(group) for _, group in mine)
        seconds = max(call.end for call, _ in mine) - min(call.begin for call, _ in mine)
        rows.append((float(len(mine)), max(float(longest), tokens / sizes.sequences), float(tokens), seconds))
    return rows


def _busy_seconds(calls: Sequence[timeline.Span]) -> float:
    """Seconds of a segmenter for a group: the time in which it had calls, over the groups that it was called for; they wait for one another."""
    busy = sum(timeline.busy_seconds(c for c in calls if c.track == track) for track in {call.track for call in calls})
    groups = len({call.details["number"] for call in calls})
    return busy / groups if groups else 0.0


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Least squares without negative costs; columns are scaled, since tokens are many and seconds few."""
    matrix = np.asarray(rows, float)
    scale = np.abs(matrix).max(0).clip(1e-12)
    return (nnls(matrix / scale, np.asarray(seconds, float))[0] / scale).tolist()
