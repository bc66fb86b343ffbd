"""A step under the profiler: what every process did, operator by operator, as one trace on the clock of the timeline.

`loop.profile_step` (`videoseg train --profile`) names the step. Learners and segmenters record themselves with torch.profiler, vLLM's workers with vLLM's use of it;
the loop's own spans come from `cluster.timeline`. `profile-STEP.json.gz` opens in https://ui.perfetto.dev; `profile-STEP.txt` says how long each process was at
work, and with what. Recording slows a step down: shares mean more than seconds.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from cluster import timeline
from cluster.checkpoints import replace_text
from cluster.placement import gather

if TYPE_CHECKING:
    from cluster.run import Run

PASSES = 256  # of an engine's model that are recorded, at most: a trace of thousands helps nobody
SHOWN = 6  # operators of a process in the summary
WORK = ("cpu_op", "kernel", "gpu_memcpy", "gpu_memset")  # categories of events that are work


@asynccontextmanager
async def profiled(run: Run) -> AsyncIterator[None]:
    """Around a step: records it, if it is the one that is asked for. A part that is lost meanwhile is missing from the trace."""
    step = run.step + 1
    if step != run.config.loop.profile_step:
        yield
        return
    engines, others = _named("engine", run.engines.up), {**_named("segmenter", run.segmenters.up), **_named("learner", run.actors.learners)}
    await gather([*(engine.start_profile.remote(PASSES) for engine in engines.values()), *(part.__ray_call__.remote(_begin) for part in others.values())])
    began = time.time()
    yield
    if run.step != step:  # it was abandoned, and the run ends
        return
    ended = time.time()
    calls = {name: engine.stop_profile.remote() for name, engine in engines.items()} | {name: part.__ray_call__.remote(_end) for name, part in others.items()}
    traces = await asyncio.gather(*calls.values(), return_exceptions=True)
    found = {}
    for name, result in zip(calls, traces):
        if isinstance(result, RayError):
            run.progress.note(f"warning: {name} is not in the profile of step {step}: {result}")
        elif isinstance(result, BaseException):
            raise result
        else:
            found[name] = result
    lines = await asyncio.to_thread(write, run.folder.path, step, began, ended, found)
    run.progress.note("\n".join(lines))


def write(folder: Path, step: int, began: float, ended: float, traces: dict[str, list[bytes]]) -> list[str]:
    """Both files from the gzipped traces of each part's processes -> the summary. `began`, `ended`: seconds of the wall clock."""
    parts = {name: events_of(name, own) for name, own in traces.items()}
    loop = [event for event in timeline.read(folder / timeline.FILE) if began <= event["ts"] / 1e6 <= ended]
    trace, text = folder / f"profile-{step}.json.gz", folder / f"profile-{step}.txt"
    partial = trace.with_suffix(".partial")
    partial.write_bytes(gzip.compress(json.dumps({"traceEvents": [*loop, *(event for own in parts.values() for event in own)]}).encode(), 5))
    os.replace(partial, trace)
    lines = [f"profile of step {step}, {ended - began:.2f} s with the profiler at work: {trace}"]
    lines += [f"  {name:13}" + _described(own, ended - began) for name, own in parts.items()]
    replace_text(text, "\n".join(lines) + "\n")
    return lines


def events_of(part: str, traces: Sequence[bytes]) -> list[dict[str, Any]]:
    """Events of a part's processes, with its name before theirs; times in microseconds of the wall clock, as in the timeline."""
    found = []
    for number, packed in enumerate(traces):
        trace = json.loads(gzip.decompress(packed))
        base, name = trace.get("baseTimeNanoseconds", 0) / 1e3, part if len(traces) == 1 else f"{part} worker {number}"
        for event in trace["traceEvents"]:
            mark = {"pid": f"{name} {event['pid']}"}
            if event["ph"] == "M" and event["name"] == "process_name":
                mark["args"] = {"name": f"{name} {event['args']['name']}"}
            found.append(event | mark | ({"ts": event["ts"] + base} if event["ph"] != "M" else {"ts": 0}))
    return found


def self_seconds(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Seconds of each operator without those that it called: {name: seconds}, of complete events that are work, thread by thread."""
    threads: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event.get("cat") in WORK:
            threads[event["pid"], event["tid"]].append(event)
    found: Counter[str] = Counter()
    for own in threads.values():
        callers: list[dict[str, Any]] = []
        for event in sorted(own, key=lambda e: (e["ts"], -e["dur"])):
            while callers and event["ts"] >= callers[-1]["ts"] + callers[-1]["dur"]:
                callers.pop()
            if callers:
                found[callers[-1]["name"]] -= event["dur"] / 1e6
            found[event["name"]] += event["dur"] / 1e6
            callers.append(event)
    return found


def _described(events: list[dict[str, Any]], seconds: float) -> str:
    operators = self_seconds(events)
    work = operators.total()
    named = ", ".join(f"{name.removeprefix('aten::')} {spent:.2f} s" for name, spent in operators.most_common(SHOWN))
    return f"{work:6.2f} s in operators ({work / seconds:.0%} of the step): {named}" if operators else "  nothing recorded"


def _named(role: str, parts: Sequence[Any]) -> dict[str, Any]:
    return {f"{role} {number}": part for number, part in enumerate(parts)}


def _begin(actor: Any) -> None:
    """In the process of a learner or segmenter."""
    from torch.profiler import profile

    actor.profile = profile()
    actor.profile.start()


def _end(actor: Any) -> list[bytes]:
    actor.profile.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        actor.profile.export_chrome_trace(str(path))
        del actor.profile
        return [path.read_bytes()]
