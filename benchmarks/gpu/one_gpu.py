"""What only a GPU can show, on a single one and without a network: models of published sizes with random weights. JSON, and a table on the screen.

    python benchmarks/gpu/one_gpu.py --json OUT        (PYTHONPATH: the checkout, or the project installed)

Pieces, each in a process of its own and within a share of `--minutes`; one that fails, takes too long or lacks a package is recorded as such, and the others run:

    segmenter_numerics   SAM2 (mask logits) and XMem (probabilities) in float32 and bfloat16 there, against float32 on the CPU; IoU of their masks
    sam2_speed           frames encoded, and groups of eight prompts decoded, a second
    xmem_speed           frames a second of one object, three, and eight hypotheses
    policy_numerics      log-probs of the learner against those of vLLM, same tokens; sleep and wake-up of the engine
    loop                 `videoseg train` with engine, learner and segmenter on the one GPU (full.yaml): a step by stage, MFU, tokens a second, sync, memory

OUT is written after every piece, and completed where it exists: pieces that it holds for the same models are not run again, failed ones are. Without a GPU, or with `--size toy`, the toys
of examples/toy/models take the place of the large models, and the loop is the debug recipe's (toy.yaml).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

from side_by_side import machine, publish

SHARES = {"segmenter_numerics": 1.2, "sam2_speed": 0.5, "xmem_speed": 0.6, "policy_numerics": 3.3, "loop": 4.4}
"""Of the time, among the pieces that are still to run."""


def figures(piece: str, args: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """Of one piece, as they are found."""
    import torch

    torch.set_num_threads(threads(args.size))
    if piece in ("policy_numerics", "loop"):
        import colocated_loop
        import policy_numerics
        import random_models

        start = time.monotonic()
        policy = random_models.policy(args.size, args.policy, args.folder, args.device)
        if piece == "policy_numerics":
            yield from policy_numerics.numerics(args.size, args.device, policy)
        else:
            yield from colocated_loop.loop(args.size, args.device, policy, args.folder, args.steps, args.seconds - (time.monotonic() - start))
    else:
        import segmenters

        ask = {"segmenter_numerics": segmenters.numerics, "sam2_speed": segmenters.sam2_speed, "xmem_speed": segmenters.xmem_speed}[piece]
        yield from ask(args.size, args.device)


def threads(size: str) -> int:
    """torch's own number, but one for the toys: small matrices gain nothing from a second, and lose much where the cores are busy."""
    import torch

    return 1 if size == "toy" else torch.get_num_threads()


def child(args: argparse.Namespace) -> None:
    """One piece in this process: what it finds goes to its file at once, and at the end why there is no more."""
    found: dict = {}
    try:
        for name, value in figures(args.piece, args):
            found[name] = value
            publish(found, args.folder / f"{args.piece}.json")
    except ModuleNotFoundError as error:
        found["missing"] = error.name
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    publish(found, args.folder / f"{args.piece}.json")


def run_piece(piece: str, args: argparse.Namespace, folder: Path, seconds: float) -> dict:
    """The record of a piece that has so many seconds."""
    file, log = folder / f"{piece}.json", folder / f"{piece}.log"
    given = dict(piece=piece, folder=folder, seconds=seconds, device=args.device, size=args.size, policy=args.policy, steps=args.steps)
    paths = filter(None, (str(ROOT), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    start, failure = time.monotonic(), None
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, __file__, *(f"--{name}={value}" for name, value in given.items())], stdout=out, stderr=out, env=environment)
    try:
        if process.wait(seconds):
            failure = f"ended with status {process.returncode}: {log.read_text()[-1000:]}"
    except subprocess.TimeoutExpired:
        failure = f"not done within {seconds:.0f} s"
    finally:
        kill(process)
    found = json.loads(file.read_text()) if file.exists() else {}
    return found | ({"failed": failure} if failure else {}) | {"seconds": round(time.monotonic() - start, 1)}


def kill(process: subprocess.Popen) -> None:
    """It and all that it started, if it is still there."""
    if process.poll() is None:
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                one.kill()
        process.kill()
        process.wait()


def table(record: dict, indent: str = "") -> Iterator[str]:
    """One figure a line; what it was made from stays in the JSON."""
    for name, value in record.items():
        if isinstance(value, dict) and name not in ("machine", "times"):
            yield f"{indent}{name}"
            yield from table(value, indent + "    ")
        elif not isinstance(value, (dict, list)):
            yield f"{indent}{name:{50 - len(indent)}} {value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write or complete; without it the JSON goes to the screen")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), help="these pieces only, again if they are there")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all pieces together (default 10)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--size", choices=("toy", "full"), help="of the models (default: full on cuda, toy on cpu)")
    parser.add_argument("--policy", choices=("3b", "7b"), default="3b", help="Qwen2.5-VL of this size (default 3b)")
    parser.add_argument("--steps", type=int, default=20, help="of the loop, fewer if its time is over before (default 20)")
    for name, kind in (("piece", str), ("folder", Path), ("seconds", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    if args.piece:
        return child(args)
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.size = args.size or ("full" if args.device == "cuda" else "toy")
    record = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    asked = {"device": args.device, "size": args.size, "policy": args.policy if args.size == "full" else "toy"}
    answered = lambda found: asked.items() <= found.items() and not {"missing", "failed"} & set(found)
    left = [piece for piece in SHARES if (piece in args.only if args.only else not answered(record.get(piece, {})))]
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        while left:
            seconds = max(1.0, end - time.monotonic()) * SHARES[left[0]] / sum(SHARES[piece] for piece in left)
            print(f"--- {left[0]}, {seconds:.0f} s", file=sys.stderr, flush=True)
            record[left[0]] = {"machine": machine(threads(args.size))} | asked | run_piece(left[0], args, Path(folder), seconds)
            left.pop(0)
            if args.json:
                publish(record, args.json)
    if not args.json:
        publish(record, None)
    print("\n".join(table(record)), file=sys.stderr)


if __name__ == "__main__":
    main()
