"""From the command to the first answers and the first update: `videoseg train debug` of one step, with empty caches and with those that the start before it filled, in turns. JSON, and a table on the screen.

    videoseg bench start_up --json OUT

A round is a first start, for which the caches of vLLM, PyTorch, Triton and whatever keeps one in ~/.cache are new folders, and a second one with the same folders. Python's compiled
modules are there in both, as pip leaves them. When what was done comes from the run's timeline (`cluster.timeline`), from vLLM's log, and from when processes began; each line of PATH
waits for the one before it, those of BESIDE for none. The first token comes between "weights synced" and "first group answered". CPU seconds, of each kind of process until its end,
change less when others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil

from side_by_side import machine, publish, spread
from cluster.timeline import FILE as TRACE
from cluster.timeline import spans
from rollout.toy_data import ToyDataConfig, write_toy_data

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")
KINDS = {
    "ray::RolloutEngine": "engine", "VLLM::EngineCore": "engine core", "models.registry": "model inspection", "ray::SegmenterActor": "segmenter", "ray::LearnerActor": "learner",
    "rollout.decoding": "decoders", "cluster.cli": "command", "gcs_server": "Ray", "raylet": "Ray", "--gcs-address": "Ray", "ray::": "Ray",
}  # fmt: skip
"""What in a process's command line says what it is; the first that is there counts. An empty cache makes vLLM ask a process what the model can do, unless the engine has told it."""
LINES = {
    "vLLM imported": "Resolved architecture", "pictures warmed up": "Multi-modal warmup completed", "engine core imported": "Initializing a V1 LLM engine",
    "model loaded": "KV cache size", "warmed up": "init engine (profile",
}  # fmt: skip
"""Of vLLM's log, which say when that is done."""
PATH = (
    "policy and data checked", "Ray begun", "actors asked for", "vLLM imported", "engine core begun", "engine core imported", "model loaded", "warmed up", "engine ready",
    "weights synced", "first group answered", "first group scored", "first update",
)  # fmt: skip
BESIDE = ("pictures warmed up", "segmenter ready", "learner ready")


def start(asked: list[str], caches: Path, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds from the command to what is in PATH and BESIDE, CPU seconds of each kind of process). Raises RuntimeError where the run fails."""
    settings, log, out = (folder.with_suffix(suffix) for suffix in (".json", ".log", ".out"))
    to_file = {"class": "logging.FileHandler", "filename": str(log), "formatter": "timed"}
    settings.write_text(json.dumps({"version": 1, "formatters": {"timed": {"format": "%(created).3f %(message)s"}}, "handlers": {"file": to_file}, "loggers": {"vllm": {"level": "INFO", "handlers": ["file"]}}}))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "PYTHONWARNINGS": "ignore", "VLLM_LOGGING_CONFIG_PATH": str(settings), **{name: str(caches / name) for name in CACHES}}
    command = [sys.executable, "-m", "cluster.cli", "train", "debug", *asked, f"run.dir={folder.parent}", f"run.name={folder.name}"]
    with open(out, "w") as file:
        began = time.time()
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
    births, cpu = watch(process)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {out.read_text()[-3000:]}")
    lines = [line.split(" ", 1) for line in log.read_text().splitlines() if line[:1].isdigit()]
    done = {name: next(float(when) for when, line in lines if sign in line) for name, sign in LINES.items()}
    done |= {"policy and data checked": births["decoders"], "Ray begun": births["Ray"], "engine core begun": births["engine core"]}
    ends = defaultdict(list)
    for span in sorted(spans(folder / TRACE), key=lambda span: span.end):
        ends[span.track.split()[0], span.name].append(span)
    done |= {f"{role} ready": ends[role, "start"][-1].end for role in ("engine", "segmenter", "learner")}
    first = {"weights synced": ("loop", "sync"), "first group answered": ("engine", "generate"), "first group scored": ("segmenter", "segment_group"), "first update": ("loop", "train")}
    done |= {name: ends[key][0].end for name, key in first.items()} | {"actors asked for": ends["engine", "start"][0].begin}
    return {name: done[name] - began for name in (*PATH, *BESIDE)}, cpu


def watch(process: subprocess.Popen) -> tuple[dict[str, float], dict[str, float]]:
    """Until it ends: (when the first process of each kind began, CPU seconds of all of a kind)."""
    root, seen = psutil.Process(process.pid), {}
    while process.poll() is None:
        with suppress(psutil.Error):
            for one in (root, *root.children(recursive=True)):
                with suppress(psutil.Error):
                    line, times = " ".join(one.cmdline()), one.cpu_times()
                    kind = next((kind for sign, kind in KINDS.items() if sign in line), seen.get(one, ["others"])[0])
                    seen[one] = kind, one.create_time(), times.user + times.system
        time.sleep(0.3)
    births, cpu = {}, defaultdict(float)
    for kind, born, seconds in seen.values():
        births[kind] = min(born, births.get(kind, born))
        cpu[kind] += seconds
    return births, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=3, help="of a first and a second start (default 3)")
    parser.add_argument("--starts", nargs="*", choices=("first", "second"), default=["first", "second"], help="of a round (default: both)")
    args = parser.parse_args()
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "toy"
        write_toy_data(data, ToyDataConfig(train=32, valid_u=8, valid=1), progress=lambda line: None)
        asked = ["loop.steps=1", "rollout.prompts_per_step=2", "eval.ends=false", f"data.train={data / 'train'}", f"data.evaluation={data / 'valid_u'}", "data.generate=null"]
        for n in range(args.rounds):
            for name in args.starts:
                found[name].append(start(asked, Path(folder) / f"caches-{n}", Path(folder) / f"{name}-{n}"))
            print(f"  round {n + 1}/{args.rounds}", file=sys.stderr, flush=True)
    record = {"machine": machine(1), "rounds": args.rounds}
    for name, runs in found.items():
        at = {event: spread([times[event] for times, _ in runs], 2) for event in (*PATH, *BESIDE)}
        steps = [(event, [times[event] - (times[before] if before else 0.0) for times, _ in runs]) for before, event in zip((None, *PATH), PATH)]
        record[name] = {"at": at, "took": {event: spread(seconds, 2) for event, seconds in steps}, "cpu_seconds": {kind: spread([cpu.get(kind, 0.0) for _, cpu in runs], 2) for kind in runs[0][1]}}
    publish(record, args.json)
    for event in (*PATH, *BESIDE):
        print(f"{event:24}" + "".join(f"  {name}: {record[name]['at'][event]['median']:6.1f} s {record[name]['took'].get(event, {}).get('median', ''):>6}" for name in found), file=sys.stderr)


if __name__ == "__main__":
    main()
