"""How a run is doing, told from its folder alone: no Ray, and nothing that is slow to import.

A folder cannot tell whether a process lives; it tells when something was last written, and how long a step takes. What is said of life is
drawn from these two, and put so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from cluster import checkpoints
from cluster.errors import CheckpointError, DataError
from cluster.run_folder import RunFolder

LAST = 10
"""Steps that the time left and the warnings are drawn from."""
TAIL_BYTES = 4 * 2**20  # of metrics.jsonl: some hundred steps
_SHOWN = (
    ("reward", "reward/mean"), ("box IoU", "iou/box"), ("mask IoU", "iou/mask"), ("loss", "sft/loss"), ("length", "length/response"), ("KL", "kl/reference"),
    ("tokens/s", "tokens/per_second"),
)


def look(folder: RunFolder, now: float) -> dict[str, Any]:
    """What the folder tells at the time `now` (seconds since 1970), as JSON values; times are seconds, `None` is unknown.

    `state` is `finished`; `alive` where something was written within three of its longest steps (at least two minutes; before the first step,
    within `cluster.start_seconds`); else `silent`. Raises DataError for a folder whose files cannot be read.
    """
    try:
        config = yaml.load(folder.config.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        total, loop, evaluation = int(config["loop"]["steps"]), config["loop"], config["eval"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder.config} cannot be read ({type(error).__name__}: {error})", "it is written when a run begins: restore it") from error
    records = list(_last_records(folder.metrics))
    steps = [r for r in records if "seconds/step" in r]
    evaluations = [r for r in records if any(name.startswith("eval/") for name in r)]
    step = steps[-1]["step"] if steps else 0
    recent = steps[-LAST:]
    durations = [r["seconds/step"] for r in recent if r.get("seconds/step")]
    try:
        checkpoint, rejected = checkpoints.latest(folder.checkpoints, hashes=False)
    except CheckpointError:
        checkpoint, rejected = None, []
    written = _last_written(folder)
    silent = max(0.0, now - written)
    patience = max(120.0, 3 * max(durations)) if durations else float(config["cluster"]["start_seconds"])
    done = step >= total and checkpoint is not None and checkpoint.step >= total and (not evaluation["ends"] or any(r["step"] >= total for r in evaluations))
    state = "finished" if done else "alive" if silent <= patience else "silent"
    return {
        "run": str(folder.path),
        "state": state,
        "step": step,
        "steps": total,
        "last_written": _iso(written),
        "seconds_since_written": round(silent, 1),
        "seconds_patience": round(patience, 1),
        "seconds_per_step": round(median(durations), 3) if durations else None,
        "seconds_left": round(median(durations) * (total - step), 1) if durations and state == "alive" else None,
        "resumes": _lines_of(folder.path / "resumes.jsonl"),
        "metrics": steps[-1] if steps else None,
        "evaluation": evaluations[-1] if evaluations else None,
        "checkpoint": None
        if checkpoint is None
        else {"step": checkpoint.step, "path": str(checkpoint.path), "bytes": sum(f["bytes"] for f in checkpoint.manifest["files"]), "made_at": checkpoint.manifest["made_at"]},
        "warnings": _warnings(folder, recent, loop, checkpoint, rejected),
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `look` found, for a person."""
    ago, checkpoint, left = _time(found["seconds_since_written"]), found["checkpoint"], found["seconds_left"]
    takes = f"a step takes {found['seconds_per_step']:.3g} s" if found["seconds_per_step"] else "no step is done yet"
    how = {
        "finished": f"finished, {ago} ago",
        "alive": f"seems alive: written {ago} ago, {takes}" + (f", about {_time(left)} left" if left else ""),
        "silent": f"silent: nothing written for {ago}, {takes}. It was stopped, has died, or hangs: its folder cannot tell which",
    }[found["state"]]
    resumed = f" (resumes: {found['resumes']})" if found["resumes"] else ""
    out = [f"{found['run']}: step {found['step']} of {found['steps']}{resumed}; {how}"]
    for title, record, prefix in (("training, step", found["metrics"], ""), ("held-out, after step", found["evaluation"], "eval/")):
        if record:
            values = [f"{label} {record[prefix + name]:.4g}" for label, name in _SHOWN if record.get(prefix + name) is not None]
            out.append(f"  {title} {record['step']}: {'  '.join(values)}")
    if checkpoint:
        as_stopped = ", that of its last step, as after a stop" if found["state"] == "silent" and checkpoint["step"] == found["step"] else ""
        out.append(f"  newest whole checkpoint: step {checkpoint['step']}, {checkpoint['bytes'] / 2**20:.4g} MiB{as_stopped}")
    else:
        out.append("  no whole checkpoint yet")
    out += [f"  warning: {w}" for w in found["warnings"]]
    if found["state"] == "silent" and checkpoint:
        out.append(f"  go on, if it no longer runs: videoseg resume {found['run']}")
    out.append(f"  look further: tensorboard --logdir {found['run']}/tensorboard, or {found['run']}/metrics.jsonl and rollouts/")
    return out


def _last_records(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines in the last megabytes of a `metrics.jsonl`; none if there is no file yet."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
        file.seek(start)
        text = file.read()
    whole = text.split(b"\n")[1 if start else 0 : -1]  # not a line's end, nor a beginning that is being written
    for number, line in enumerate(whole):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number + 1} of the last {len(whole)} is not a line of metrics ({error})", "remove the line") from error


def _last_written(folder: RunFolder) -> float:
    """When a file of the run was last made, renamed or appended to. A folder's own time tells of the files in it."""
    unfinished = [Path(root) / name for temporary in folder.checkpoints.glob(".step_*") for root, folders, files in os.walk(temporary) for name in [*folders, *files]]
    times = []
    for path in [*folder.path.iterdir(), *(folder.tensorboard.iterdir() if folder.tensorboard.is_dir() else ()), *unfinished]:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:
            pass  # a temporary file, renamed meanwhile
    return max(times)


def _warnings(folder: RunFolder, recent: list[dict], loop: Mapping[str, Any], checkpoint: Any, rejected: list[CheckpointError]) -> list[str]:
    """What looks wrong: in the last steps' numbers, in checkpoints, on the disk."""
    span = f"in the last {len(recent)} steps"
    counted = sorted({name for r in recent for name in r if name.startswith(("failures/", "groups/dropped", "nonfinite_values")) and name.count("/") < 2})
    out = [f"{name} {count:g} {span}" for name in counted if (count := sum(r.get(name) or 0 for r in recent))]
    mismatch = max((r.get("mismatch/kl") or 0 for r in recent), default=0)
    if mismatch > float(loop["mismatch_warn"]):
        out.append(f"mismatch/kl reached {mismatch:.3g} {span}, above loop.mismatch_warn = {loop['mismatch_warn']}")
    if recent and recent[-1].get("learner/skipped_in_a_row"):
        out.append(f"updates were left out in the last {recent[-1]['learner/skipped_in_a_row']:g} steps (loss or gradient not finite, or too large)")
    out += [str(error) for error in rejected]
    free = shutil.disk_usage(folder.path).free
    need = 0 if checkpoint is None else sum(f["bytes"] for f in checkpoint.manifest["files"])
    if free < 2 * need:
        out.append(f"{free / 2**30:.3g} GiB are free, less than two checkpoints of {need / 2**30:.3g} GiB need")
    return out


def _lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _time(seconds: float) -> str:
    """`0:12:40`, or with days."""
    return str(timedelta(seconds=round(seconds)))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
