"""Every benchmark that this machine can run, one after the other, at sizes such that two cores need less than an hour for all. JSON.

    videoseg bench all --json OUT [--records docs]

OUT is written after each one, and the same command goes on with what is missing in it, also what failed, while the code is of the same git commit; `--fresh` starts over. One
that fails, or takes several times its usual time, does not stop the others; the exit status is 1 then. With `--records` each record also goes to the file of that folder from
which docs/performance.md has its figures. OUT has of each {"command", "seconds", and "record", "failed" or "left_out"} by name.
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
    """minutes: what it usually takes on two cores. file: where docs/performance.md has its figures from. prints: its JSON comes on the screen, for it has no `--json`."""

    name: str
    command: str
    minutes: float
    file: str | None = None
    prints: bool = False


BENCHMARKS = [
    Benchmark("measures", "measures.py", 0.2, "measures-benchmark.json"),
    Benchmark("reward_growth", "reward_growth.py --rounds 2 --largest 262144", 0.8, "reward-growth.json"),
    Benchmark("reward_throughput", "reward_throughput.py --batch 1 64 --seconds 3", 1.5, prints=True),
    Benchmark("video_reward", "video_reward.py --rounds 5", 0.4, prints=True),
    Benchmark("openmp_waiting", "openmp_waiting.py --rounds 9", 0.4, "openmp-waiting.json"),
    Benchmark("learning", "learning.py --rounds 2", 2, "learner-benchmark.json"),
    Benchmark("decoding", "decoding.py --rounds 2 --reads 500", 2, "decoding-benchmark.json"),
    Benchmark("evaluation", "evaluation.py --rounds 1 --videos 6", 4, "evaluation-benchmark.json"),
    Benchmark("pipeline", "pipeline.py --rounds 1", 2, "pipeline-benchmark.json"),
    Benchmark("simulator", "simulator.py --rounds 1", 2, "simulator-benchmark.json"),
    Benchmark("serve_kill", "serve_kill.py --requests 300 --clients 100", 1, prints=True),
    Benchmark("segmentation", "segmentation.py --rounds 2 --only xmem hypotheses sam2 length --threads 2", 9, "segmentation-benchmark.json"),
    Benchmark("scaling", "scaling.py --rounds 2", 3, "scaling-benchmark.json"),
    Benchmark("generation", "generation.py --rounds 2", 1.5, "generation-benchmark.json"),
    Benchmark("generation_small", "generation.py --size small --prompts 2 --rounds 2", 3, "generation-small-benchmark.json"),
    Benchmark("weight_sync", "weight_sync.py --rounds 3", 1, "weight-sync-benchmark.json"),
    Benchmark("weight_sync_small", "weight_sync.py --size small --rounds 3", 1.5, "weight-sync-small-benchmark.json"),
    Benchmark("start_up", "start_up.py --rounds 2", 3, "start-up.json"),
    Benchmark("limits", "limits.py --steps 5", 4, "limits-benchmark.json"),
    Benchmark("one_gpu", "gpu/one_gpu.py --device cpu --size toy --steps 8 --minutes 4", 3),
    Benchmark("whole_loop", "whole_loop.py --rounds 1 --steps 15 --warm-up 5", 3.5, "whole-loop-benchmark.json"),
    Benchmark("whole_loop_small", "whole_loop.py --size small --rounds 1 --steps 3 --warm-up 1 --ours ours", 6, "whole-loop-small-benchmark.json"),
    Benchmark("time_to_reward", "time_to_reward.py --prompts 8 --steps 40 --every 10 --episodes 128 --reward 5.9 --ours ours", 5, "time-to-reward.json"),
    Benchmark("fuzz_rewards", "fuzz_rewards.py --seconds 45", 0.9),
    Benchmark("reader", "reader.py --rounds 2 --peer-python PEER", 10, "reader-benchmark.json"),
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


def lacking(record: dict, file: str) -> list[str]:
    """The figures that docs/performance.md takes from this file and that the record has not: a peer may not be installed."""
    sys.path.insert(0, str(HERE.parent / "docs/hooks"))
    import pages

    missing = []
    for what, place, _ in pages.RECORDS.get(file, []):
        try:
            pages._found(record, place)
        except (LookupError, TypeError):
            missing.append(what)
    return missing


def write_record(record: dict, file: Path) -> None:
    if missing := lacking(record, file.name):
        say(f"{file} stays as it is: the new record lacks {', '.join(missing)}")
    else:
        publish(record, file)


def say(text: str) -> None:
    print(f"=== {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write, or to go on with")
    parser.add_argument("--fresh", action="store_true", help="start over, whatever the file has")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="also write each record to the file that docs/performance.md has its figures from, in this folder")
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
    for benchmark in BENCHMARKS if args.records else ():
        if benchmark.file and "record" in found[benchmark.name]:
            write_record(found[benchmark.name]["record"], args.records / benchmark.file)
    failed = [name for name, result in found.items() if "failed" in result]
    say(f"{(time.monotonic() - start) / 60:.1f} minutes; " + (f"failed: {', '.join(failed)}" if failed else "none failed"))
    return int(bool(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    sys.exit(main())
