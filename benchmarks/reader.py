"""The episode reader on 10 million rows: peak memory, and episodes a second beside Hugging Face's `datasets`. JSON, and a table on the screen.

    python benchmarks/reader.py --peer-python PEER/bin/python --json OUT      (PEER: an environment with datasets, pyarrow and psutil)

One generated shard of 100,000 episodes with 20 masks each is listed 100 times. Every candidate runs in a process of its own, in
turns with the others. Questions, all by default (`--only NAME ...`):

    rates          episodes a second: all columns and two columns in order, all columns shuffled, and the first episode at a far position of
                   the shuffled order; of this reader (rows as dicts, as the peer gives them; in order as `Episode`s too), of the peer's
                   streams (`streaming=True`, shuffled by a buffer of as many rows as this reader's window has), and of its memory maps
    ten_million    peak memory of this reader at 1, 10, 50 and 100% of a pass over two columns, then over 2,000 draws spread over the epoch

CPU seconds are of all threads of the process; they change less than wall time where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS, TIMES = 100_000, 100
WINDOW_ROWS = 64 * 256
COLUMNS = ["episode_id", "query"]


def write_shard(file: Path) -> None:
    """100,000 episodes in row groups of 256: 1,000 random ones, again and again under other names."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rollout.episodes import SCHEMA

    rng = np.random.default_rng(0)

    def annotation(t: int) -> dict:
        counts = rng.integers(48, 112, int(rng.integers(40, 200)), dtype=np.uint8).tobytes().decode()
        return {"frame": t, "counts": counts, "area": int(rng.integers(900, 90_000)), "box": rng.integers(0, 480, 4).tolist(), "point": rng.integers(0, 480, 2).tolist()}

    def episode(i: int) -> dict:
        objects = [{"object_id": str(n), "annotations": [annotation(t) for t in range(0, 50, 5)]} for n in range(2)]
        video = {"video_id": f"v{i // 4}", "video": f"JPEGImages/v{i // 4}", "height": 480, "width": 854, "num_frames": 50, "fps": 6.0}
        about = {"source": "generated", "split": "train", "query": f"number {i}, the one that moves to the left", "difficulty": 4.0}
        return {name: None for name in SCHEMA.names} | video | about | {"annotated_frames": list(range(0, 50, 5)), "objects": objects, "ignore": []}

    base = pa.Table.from_pylist([episode(i) for i in range(1000)], SCHEMA)
    partial = file.with_suffix(".partial")
    with pq.ParquetWriter(partial, SCHEMA) as writer:
        for start in range(0, ROWS, 256):
            rows = np.arange(start, min(start + 256, ROWS))
            names = pa.array([f"e{i}" for i in rows])
            writer.write_table(base.take(rows % 1000).set_column(SCHEMA.names.index("episode_id"), "episode_id", names))
    os.replace(partial, file)


def ours(files: list[Path], what: str) -> Iterator:
    from rollout.dataset import EpisodeDataset
    from rollout.order import ShuffledOrder

    dataset = EpisodeDataset(files, min_share=0.001)
    order = ShuffledOrder(dataset.group_rows, seed=0)
    yield from {
        "all": dataset.rows,
        "episodes": lambda: iter(dataset),
        "two": dataset.project(*COLUMNS).rows,
        "shuffled": lambda: (dataset.row(order[p]) for p in range(len(dataset))),
        "far": lambda: (dataset.row(order[p]) for p in range(FAR, len(dataset))),
    }[what]()


def stream(files: list[Path], what: str) -> Iterator:
    from datasets import load_dataset

    columns = {"columns": COLUMNS} if what == "two" else {}
    dataset = load_dataset("parquet", data_files=[str(f) for f in files], split="train", streaming=True, **columns)
    if what in ("shuffled", "far"):
        dataset = dataset.shuffle(seed=0, buffer_size=WINDOW_ROWS)
    yield from dataset.skip(FAR) if what == "far" else dataset


def mapped(files: list[Path], what: str) -> Iterator:
    """One listing of the shard only: the peer first copies all rows to Arrow files on disk."""
    from datasets import load_dataset

    with tempfile.TemporaryDirectory(dir=files[0].parent) as copies:
        dataset = load_dataset("parquet", data_files=str(files[0]), split="train", cache_dir=copies)
        yield from dataset.shuffle(seed=0) if what == "shuffled" else dataset


FAR = 20_000
READERS: dict[str, Callable[[list[Path], str], Iterable]] = {"ours": ours, "datasets_stream": stream, "datasets_mapped": mapped}
CANDIDATES = {
    "all": ("ours", "datasets_stream"),
    "episodes": ("ours",),
    "two": ("ours", "datasets_stream"),
    "shuffled": ("ours", "datasets_stream", "datasets_mapped"),
    "far": ("ours", "datasets_stream"),
}
COUNTS = {"two": 200_000, "shuffled": WINDOW_ROWS, "far": 1}


def timed(reader: str, shard: Path, what: str, count: int) -> dict:
    """The child of `rates`: until the first episode, and from there the given number of episodes."""
    began, cpu = time.perf_counter(), time.process_time()
    rows = iter(READERS[reader]([shard] * TIMES, what))
    next(rows)
    first, first_cpu = time.perf_counter(), time.process_time()
    seen = sum(1 for _ in islice(rows, count))
    seconds, cpu_seconds = time.perf_counter() - first, time.process_time() - first_cpu
    result = {"first_seconds": first - began, "first_cpu_seconds": first_cpu - cpu, "peak_mb": _peak_mb()}
    return result | ({"per_second": seen / seconds, "per_cpu_second": seen / cpu_seconds} if seen > 1 else {})


def rates(shard: Path, peer_python: str, rounds: int) -> dict:
    each: dict[str, list[dict]] = {}
    for round_ in range(rounds):
        for what, readers in CANDIDATES.items():
            for reader in readers:
                print(f"  round {round_ + 1}/{rounds}: {what}, {reader}", file=sys.stderr, flush=True)
                python = sys.executable if reader == "ours" else peer_python
                done = _child(python, shard, "--child", reader, what, str(COUNTS.get(what, 10_000)))
                each.setdefault(f"{what} {reader}", []).append(done)
    return {name: {key: _spread([done[key] for done in runs]) for key in runs[0]} for name, runs in each.items()}


def ten_million(shard: Path, peer_python: str, rounds: int) -> dict:
    return _child(sys.executable, shard, "--full")


def full_pass(shard: Path) -> dict:
    """The child of `ten_million`."""
    from rollout.dataset import EpisodeDataset
    from rollout.order import ShuffledOrder

    result, began, cpu = {"start_mb": _peak_mb()}, time.perf_counter(), time.process_time()
    dataset = EpisodeDataset([shard] * TIMES, min_share=0.001)
    result |= {"rows": len(dataset), "open_seconds": time.perf_counter() - began, "open_cpu_seconds": time.process_time() - cpu, "open_mb": _peak_mb()}
    began, cpu, marks = time.perf_counter(), time.process_time(), {len(dataset) * percent // 100: percent for percent in (1, 10, 50, 100)}
    for number, _ in enumerate(dataset.project(*COLUMNS).rows(), 1):
        if number in marks:
            result[f"after_{marks[number]}_percent_mb"] = _peak_mb()
        if number % 500_000 == 0:
            print(f"  {number} rows, {_peak_mb():.0f} MB", file=sys.stderr, flush=True)
    result |= {"pass_per_second": number / (time.perf_counter() - began), "pass_per_cpu_second": number / (time.process_time() - cpu)}
    order = ShuffledOrder(dataset.group_rows, seed=0)
    for draw, position in enumerate(range(0, len(dataset), len(dataset) // 2000), 1):
        dataset[order[position]]
        if draw in (100, 1000, 2000):
            result[f"after_{draw}_draws_mb"] = _peak_mb()
    return {name: round(value, 2) for name, value in result.items()}


def _child(python: str, shard: Path, *arguments: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([python, __file__, "--shard", str(shard), *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def _peak_mb() -> float:
    """Largest resident size of this process so far (Linux); `getrusage` would count the parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _spread(values: list[float]) -> dict:
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


QUESTIONS = {"rates": rates, "ten_million": ten_million}


def table(record: dict) -> str:
    lines = [f"{'rates':12} {name:34} {key:18} {value['median']:>12,} ({value['min']:,} to {value['max']:,})" for name, values in record.get("rates", {}).get("results", {}).items() for key, value in values.items()]
    return "\n".join(lines + [f"{'ten_million':12} {name:34} {value:>12,}" for name, value in record.get("ten_million", {}).get("results", {}).items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write or complete; without it the JSON goes to the screen")
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), help="these questions only")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of `rates` (default 3)")
    parser.add_argument("--peer-python", help="Python of an environment with datasets")
    parser.add_argument("--shard", type=Path, default=Path(tempfile.gettempdir()) / "videoseg-reader" / "shard.parquet", help="where the generated shard is kept")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child or args.full:
        print(json.dumps(full_pass(args.shard) if args.full else timed(args.child[0], args.shard, args.child[1], int(args.child[2]))), flush=True)
        os._exit(0)  # a stream of the peer's that is not read to its end can hang where Python ends
    if args.peer_python is None and "rates" in (args.only or QUESTIONS):
        parser.error("rates compares with a peer: give --peer-python, or --only ten_million")
    from side_by_side import machine, publish

    if not args.shard.exists():
        args.shard.parent.mkdir(parents=True, exist_ok=True)
        write_shard(args.shard)
    record = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.only or QUESTIONS:
        if name in record:
            continue
        print(f"--- {name}", file=sys.stderr, flush=True)
        about = {"machine": machine(1), "shard_mb": round(args.shard.stat().st_size / 2**20, 1), "shard_rows": ROWS, "listed": TIMES}
        if args.peer_python:
            about["peer"] = subprocess.run([args.peer_python, "-c", "import datasets; print('datasets', datasets.__version__)"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        record[name] = {**about, "results": QUESTIONS[name](args.shard, args.peer_python, args.rounds)}
        if args.json:
            publish(record, args.json)
    if not args.json:
        publish(record, None)
    print(table(record), file=sys.stderr)


if __name__ == "__main__":
    main()
