"""The ledger: which draws a run has begun, and the one final state of each: trained at a step, or dropped for a reason.

`ledger.jsonl` in the run folder has a line for every group that is finished:

    {"group": 17, "episode": "toy/3/easy", "step": 5, "state": "trained"}
    {"group": 18, "episode": "toy/9/mid", "step": 5, "state": "dropped", "reason": "zero variance"}

A group is known by its position in the stream of draws. What a resumed run does again, the lines of steps after its checkpoint, stays in the file
with `"rolled_back": true`. The groups that are begun and not finished are in the checkpoint; a resumed run begins them first.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoints import replace_text
from cluster.errors import DataError

FILE = "ledger.jsonl"


@dataclass(frozen=True)
class Final:
    """The final state of a group: trained, or dropped where there is a `reason`."""

    group: int
    episode: str
    reason: str = ""

    def line(self, step: int) -> dict[str, Any]:
        state = {"state": "dropped", "reason": self.reason} if self.reason else {"state": "trained"}
        return {"group": self.group, "episode": self.episode, "step": step} | state


class Ledger:
    """`next`: the position of the next draw that nothing was begun of. `unfinished`: those begun and not finished, in order."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.next = Path(path), 0
        self.unfinished: list[int] = []
        self._given_back: list[int] = []

    def begin(self, count: int) -> list[int]:
        """The positions of the next `count` groups, which are unfinished from now on."""
        positions = self.upcoming(count)
        del self._given_back[:count]
        self.next = max(self.next, positions[-1] + 1)
        self.unfinished = sorted({*self.unfinished, *positions})
        return positions

    def upcoming(self, count: int) -> list[int]:
        """The positions that `begin` would give: first those that were given back."""
        known = self._given_back[:count]
        return known + list(range(self.next, self.next + count - len(known)))

    def close(self, step: int, finished: Iterable[Final]) -> None:
        """Writes final states, of `step`. On disk when this returns."""
        finished = list(finished)
        groups = {f.group for f in finished}
        if groups - set(self.unfinished) or len(groups) < len(finished):
            raise ValueError(f"groups {sorted(f.group for f in finished)} get a final state, but unfinished are {self.unfinished}")
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(f.line(step)) + "\n" for f in finished)
            file.flush()
            os.fsync(file.fileno())
        self.unfinished = [p for p in self.unfinished if p not in groups]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return {"position": self.next, "unfinished": list(self.unfinished)}

    def roll_back(self, step: int, state: Mapping[str, Any]) -> None:
        """The state of the checkpoint of `step`: later lines are marked as rolled back, unfinished groups are given back."""
        lines = read(self.path)
        for line in lines:
            if line["step"] > step:
                line["rolled_back"] = True
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.next, self._given_back = state["position"], list(state.get("unfinished", ()))
        self.unfinished = list(self._given_back)


def read(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a ledger, a last one that was cut short left out; none where there is no file."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def surviving(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What has not been rolled back."""
    return [line for line in lines if not line.get("rolled_back")]


def check(path: str | Path, begun: int, unfinished: Collection[int] = ()) -> Counter:
    """How many groups were trained, and dropped for each reason. Raises DataError unless each of the first `begun` groups is exactly once in
    the ledger, or unfinished."""
    lines = surviving(read(path))
    times = Counter(line["group"] for line in lines) + Counter(unfinished)
    wrong = [f"group {group} {times[group]} times" for group in sorted({*times, *range(begun)}) if times[group] != 1 or group >= begun]
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}, where each of {begun} groups begun is there once", "report this: it is a defect")
    return Counter(line.get("reason", "trained") for line in lines)
