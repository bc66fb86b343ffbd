"""Every benchmark that this machine can run, one after the other, at sizes such that two cores need less than an hour for all. JSON.

    videoseg bench all --json OUT        (docs/bench-all.json is what docs/performance.md has its figures from)

OUT is written after each one, and the same command goes on with what is missing in it, also what failed, while the code is of the same git commit; `--fresh` starts over. One
that fails, or takes several times its usual time, does not stop the others; the exit status is 1 then. OUT has of each {"command", "seconds", and "record", "failed" or "left_out"} by name.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from side_by_side import machine, publish
from cluster.run_folder import git_stamp

HERE = Path(__file__).resolve().parent


class Benchmark(NamedTuple):
    """minutes: what it usually takes on two cores. prints: its JSON comes on the screen, for it has no `--json`."""

    name: str
    command: str
    minutes: float
    prints: bool = False


BENCHMARKS = [
    Benchmark("measures", "measures.py", 0.2),
    Benchmark("reward_growth", "reward_growth.py --rounds 2 --largest 262144", 0.8),
    Benchmark("reward_throughput", "reward_throughput.py --batch 1 64 --seconds 3", 1.3, prints=True),
    Benchmark("video_reward", "video_reward.py --rounds 5", 0.2, prints=True),
    Benchmark("openmp_waiting", "openmp_waiting.py --rounds 9", 1),
    Benchmark("learning", "learning.py --rounds 1", 2),
    Benchmark("decoding", "decoding.py --rounds 2 --reads 300", 1.9),
    Benchmark("evaluation", "evaluation.py --rounds 1 --videos 4 --frames 50", 2.6),
    Benchmark("pipeline", "pipeline.py --rounds 1", 2.2),
    Benchmark("simulator", "simulator.py --rounds 1", 1.7),
    Benchmark("serve_kill", "serve_kill.py --requests 200 --clients 100", 1, prints=True),
    Benchmark("segmentation", "segmentation.py --rounds 1 --only xmem hypotheses sam2 length --threads 2", 10),
    Benchmark("scaling", "scaling.py --rounds 1", 2),
    Benchmark("generation", "generation.py --rounds 6", 2.6),
    Benchmark("generation_small", "generation.py --size small --prompts 2 --rounds 4", 3.8),
    Benchmark("weight_sync", "weight_sync.py --rounds 3", 1),
    Benchmark("weight_sync_small", "weight_sync.py --size small --rounds 2", 1.4),
    Benchmark("start_up", "start_up.py --rounds 1", 1.8),
    Benchmark("limits", "limits.py --steps 4", 3.5),
    Benchmark("one_gpu", "gpu/one_gpu.py --device cpu --size toy --steps 8 --minutes 4", 2.4),
    Benchmark("whole_loop", "whole_loop.py --rounds 1 --steps 10 --warm-up 5", 5),
    Benchmark("whole_loop_small", "whole_loop.py --size small --rounds 1 --steps 2 --warm-up 1 --ours ours", 4.8),
    Benchmark("time_to_reward", "time_to_reward.py --prompts 8 --steps 20 --every 5 --episodes 64 --reward 5.9 --ours ours", 4.5),
    Benchmark("fuzz_rewards", "fuzz_rewards.py --seconds 45", 0.8),
    Benchmark("reader", "reader.py --rounds 1 --peer-python PEER", 1.5),
]
"""Short ones first. At their default arguments `segmentation` alone takes 20 minutes, `whole_loop` as long, `fuzz_rewards` 10."""
SLOW, LEAST = 4, 10
"""A benchmark is ended after so many times its minutes, and not before these minutes."""


def left_out(benchmark: Benchmark, peer: str | None) -> str | None:
    """Why a benchmark cannot be run here; None: it can."""
    if benchmark.name == "reader" and peer is None:
        return "it compares with Hugging Face's datasets: give --peer-python, the Python of an environment that has them, pyarrow and psutil"
    if benchmark.name == "fuzz_rewards" and importlib.util.find_spec("atheris") is None:
        return "it needs atheris, which is not among the project's packages: pip install atheris"
    return None


def commit() -> str | None:
    """Of the checkout; None where it is none."""
    return (git_stamp(HERE.parent) or {}).get("commit")


def run(command: list[str], seconds: float, prints: bool) -> dict:
    """{"record"} of a benchmark, or {"failed": reason}, what it prints on standard error shown and its last lines in the reason."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))), "RAY_ADDRESS": "local"}
    last: collections.deque[str] = collections.deque(maxlen=15)
    with tempfile.TemporaryDirectory() as folder:
        file, printed = Path(folder) / "record.json", Path(folder) / "printed"
        with printed.open("w") as out:
            asked = command if prints else [*command, "--json", str(file)]
            process = subprocess.Popen(asked, cwd=HERE.parent, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0)
            reader = threading.Thread(target=_show, args=(process, last), daemon=True)
            reader.start()
            try:
                failure = f"it ended with status {status}" if (status := process.wait(seconds)) else None
            except subprocess.TimeoutExpired:
                failure = f"it was not done after {seconds / 60:.0f} minutes"
            finally:
                if process.poll() is None:
                    _end(process)
                reader.join(5)
        if failure:
            return {"failed": f"{failure}; its last lines:\n{''.join(last)}"}
        try:
            text = (printed if prints else file).read_text()
            return {"record": json.JSONDecoder().raw_decode(text, text.find("\n{") + 1)[0]}  # Ray may have its say before, a sentence may follow
        except (OSError, ValueError) as error:
            return {"failed": f"it has left no JSON: {error}"}


def _show(process: subprocess.Popen, last: collections.deque[str]) -> None:
    for line in process.stderr:
        last.append(line)
        sys.stderr.write(line)


def _end(process: subprocess.Popen) -> None:
    """It and its children, at first politely."""
    for ask in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
            break


def say(text: str) -> None:
    print(f"=== {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write, or to go on with")
    parser.add_argument("--fresh", action="store_true", help="start over, whatever the file has")
    parser.add_argument("--peer-python", metavar="PEER", help="Python of an environment with datasets, for `reader`")
    args = parser.parse_args(arguments)
    code, found = commit(), {}
    if args.json.exists() and not args.fresh:
        before = json.loads(args.json.read_text())
        if before.get("commit") == code:
            found = {name: result for name, result in before["benchmarks"].items() if "record" in result}
            say(f"{len(found)} benchmarks are in {args.json} already")
        else:
            say(f"{args.json} is of commit {before.get('commit')}, and the code of {code}: starting over")
    record = {"machine": machine(os.cpu_count() or 1), "commit": code, "benchmarks": found}
    todo, start = [b for b in BENCHMARKS if b.name not in found], time.monotonic()
    for n, benchmark in enumerate(todo):
        result = {"command": f"python benchmarks/{benchmark.command}"}
        if reason := left_out(benchmark, args.peer_python):
            result["left_out"] = reason
            say(f"{benchmark.name} is left out: {reason}")
        else:
            rest = sum(b.minutes for b in todo[n:] if not left_out(b, args.peer_python))
            say(f"{n + 1} of {len(todo)}: {benchmark.name}, about {benchmark.minutes:g} minutes; {(time.monotonic() - start) / 60:.1f} minutes so far, about {rest:.0f} left")
            began, words = time.monotonic(), [args.peer_python if word == "PEER" else word for word in benchmark.command.split()]
            result |= run([sys.executable, str(HERE / words[0]), *words[1:]], 60 * max(LEAST, SLOW * benchmark.minutes), benchmark.prints)
            result["seconds"] = round(time.monotonic() - began, 1)
            say(f"{benchmark.name}: {result['seconds']} s" + (f"; {result['failed']}" if "failed" in result else ""))
        found[benchmark.name] = result
        publish(record, args.json)
    failed = [name for name, result in found.items() if "failed" in result]
    say(f"{(time.monotonic() - start) / 60:.1f} minutes; " + (f"failed: {', '.join(failed)}" if failed else "none failed"))
    return int(bool(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    sys.exit(main())
