"""When what was done: the stages of the loop and every call to an engine or segmenter, as a trace that Perfetto and chrome://tracing show.

`trace.json` is in the Trace Event Format, as an array that is never closed, which the format allows: a run may end at any time, and a resumed run goes on in the file.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "trace.json"


class Timeline:
    """Collects spans, and writes them when asked. Times are wall-clock, in microseconds."""

    def __init__(self, path: str | Path) -> None:
        self.path, self._events, self._ids = Path(path), [], itertools.count()

    @contextmanager
    def span(self, track: str, name: str, **details: Any) -> Iterator[None]:
        """Spans of a track may overlap."""
        start, mark = time.time(), {"cat": track, "id": f"{track}/{next(self._ids)}", "pid": track, "tid": track}
        try:
            yield
        finally:
            self._events.append({"name": name, "ph": "b", "ts": round(start * 1e6), "args": details, **mark})
            self._events.append({"name": name, "ph": "e", "ts": round(time.time() * 1e6), **mark})

    def write(self) -> None:
        new = not self.path.exists()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("[\n" * new + "".join(json.dumps(event) + ",\n" for event in self._events))
        self._events.clear()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The events of a trace, as far as it goes."""
    return json.loads(Path(path).read_text(encoding="utf-8").rstrip().rstrip(",") + "]")


@dataclass(frozen=True)
class Span:
    """begin, end: seconds of the wall clock."""

    begin: float
    end: float
    track: str
    name: str
    details: dict[str, Any]


def busy_seconds(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of them was going on."""
    total, until = 0.0, 0.0
    for span in sorted(spans, key=lambda s: s.begin):
        total, until = total + max(0.0, span.end - max(span.begin, until)), max(span.end, until)
    return total


def spans(path: str | Path) -> list[Span]:
    """Those of a trace that ended, in the order in which they did; none where there is no trace."""
    begun, ended = {}, []
    for event in read(path) if Path(path).exists() else []:
        if event["ph"] == "b":
            begun[event["id"]] = event
        elif first := begun.pop(event["id"], None):
            ended.append(Span(first["ts"] / 1e6, event["ts"] / 1e6, first["cat"], first["name"], first.get("args", {})))
    return ended
