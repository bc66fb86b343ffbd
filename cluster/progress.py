"""What a person sees during a run: a live display on a terminal, one plain line a step elsewhere, and a last line."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_MEASURES = 4  # of those shown, what a run is for
_SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("box IoU", "iou/box", "{:.3f}"),
    ("mask IoU", "iou/mask", "{:.3f}"),
    ("loss", "sft/loss", "{:.4f}"),
    ("length", "length/response", "{:.0f}"),
    ("tokens/s", "tokens/per_second", "{:.0f}"),
)


class Progress:
    """Shows steps as they finish, the running stage and the time left.

    `first_step` is the number of steps done before (a resumed run). On a terminal the display is redrawn in place and
    prints of this process appear above it; elsewhere `step` prints one line. Use it as a context manager.
    """

    def __init__(self, steps: int, first_step: int = 0, stream: TextIO | None = None, live: bool | None = None) -> None:
        self.steps, self.done = steps, first_step
        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._live_wanted = self.console.is_terminal if live is None else live
        self._live: Live | None = None
        self._stage, self._stage_start = "starting", time.monotonic()
        self._values: Mapping[str, float] = {}
        self._durations: deque[float] = deque(maxlen=10)
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if self._live_wanted:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, name: str) -> None:
        """What is running now: `generate`, `score`, `train`, `sync`, `evaluate`, `checkpoint`."""
        self._stage, self._stage_start = name, time.monotonic()

    def restart_clock(self) -> None:
        """Call it when the first step begins and after an evaluation, so that they do not count as a step's time."""
        self._last = time.monotonic()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Step number `step` (counted from 1) is finished, with these metrics."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last, self.done, self._values = now, step, values
        if self._live is None:
            self.note(plain_line(step, self.steps, values, self.seconds_left()))

    def note(self, text: str) -> None:
        """Print a line; above the display if there is one."""
        self.console.print(Text(text))

    def seconds_left(self) -> float | None:
        """From the median of the last ten steps; None before the first."""
        return median(self._durations) * max(0, self.steps - self.done) if self._durations else None

    def _render(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        left = self.seconds_left()
        grid.add_row(
            Text(f"step {self.done}/{self.steps}", style="bold"),
            ProgressBar(total=max(1, self.steps), completed=self.done, width=30),
            Text(f"{duration(left)} left" if left is not None else "", style="cyan"),
            Text(f"{self._stage} {duration(time.monotonic() - self._stage_start)}", style="dim"),
        )
        outer = Table.grid()
        outer.add_row(grid)
        outer.add_row(Text("   ".join(_pairs(self._values))))
        return outer


def plain_line(step: int, steps: int, values: Mapping[str, float], seconds_left: float | None) -> str:
    """One step as one line of text."""
    left = "" if seconds_left is None else f"  {duration(seconds_left)} left"
    return "  ".join([f"step {step}/{steps}", *_pairs(values)]) + left


def _pairs(values: Mapping[str, float]) -> list[str]:
    return [f"{label} {form.format(values[name])}" for label, name, form in _SHOWN if values.get(name) is not None]


def duration(seconds: float) -> str:
    """`12 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def summary_line(
    run_folder: str | Path,
    steps: int,
    seconds: float,
    before: Mapping[str, float],
    after: Mapping[str, float],
    what: str = "held-out",
    stopped: str = "",
) -> str:
    """The last line of a run: where it is, how reward and IoU (or loss) moved, how to look further.

    `before` and `after` hold `reward/mean`, `iou/box`, `iou/mask`, `sft/loss` (any of them) of the evaluations, or of `first_and_last`
    steps with `what="training"`. `stopped` says why the run ended before its last step.
    """
    moved = [
        f"{label} {form.format(before[name])} -> {form.format(after[name])}"
        for label, name, form in _SHOWN[:_MEASURES]
        if None not in (before.get(name), after.get(name))
    ]
    end = f" (stopped: {stopped})" if stopped else ""
    parts = [f"{run_folder}: {steps} steps in {duration(seconds)}{end}"]
    if moved:
        parts.append(f"{what} {', '.join(moved)}")
    parts.append(f"look further: tensorboard --logdir {run_folder}/tensorboard, or {run_folder}/metrics.jsonl and rollouts/")
    return "; ".join(parts)


def first_and_last(records: Sequence[Mapping[str, float]], window: int = 5) -> tuple[dict[str, float], dict[str, float]]:
    """Means of reward and IoUs, or of the loss, over the first and the last `window` steps of `metrics.jsonl`."""
    window = max(1, min(window, len(records) // 2))

    def means(part: Sequence[Mapping[str, float]]) -> dict[str, float]:
        columns = {name: [r[name] for r in part if r.get(name) is not None] for _, name, _ in _SHOWN[:_MEASURES]}
        return {name: sum(values) / len(values) for name, values in columns.items() if values}

    return means(records[:window]), means(records[-window:])
