"""The whole loop against TRL's `GRPOTrainer`: the same policy, prompts, pictures, rewards (SAM2's masks among them), group size and update. JSON, and a line on the screen.

    videoseg bench whole_loop --json OUT

Both sides train the toy policy for some steps, one after the other in turns, each in processes of its own with the machine to itself; start-up and the first steps do
not count. TRL generates with transformers (its vLLM mode fails on the CPU build of vLLM, whose weights are packed); its reward function calls our scoring and SAM2 in
its process. Ours is `videoseg train`, synchronous, with gradients begun as groups arrive, and one step off. A step's time is from its end to the end of the next.
Memory is the largest sum of proportional set sizes over the processes of a side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np

from side_by_side import machine, memory_gib, publish, ratio
from small_policy import SMALL, save_small_policy
from cluster.metrics import read_metrics
from cluster.rollout_log import read_columns, rollout_files
from rollout.toy_data import write_toy_data

HERE = Path(__file__).resolve().parent
OURS = {"ours": [], "ours_on_arrival": ["loop.learn_on_arrival=true"], "ours_one_step_off": ["loop.max_staleness=1"]}


def watched(command: list[str], given: str = "") -> tuple[str, float]:
    """What it prints, and the GiB that it takes at most. Raises RuntimeError where it fails."""
    root = str(HERE.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, str(Path(sys.prefix) / "stacks")]), "RAY_ADDRESS": "local", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root)
    most, over = [0.0], threading.Event()

    def watch():
        while not over.wait(1.0):
            most[0] = max(most[0], memory_gib(process.pid))

    threading.Thread(target=watch, daemon=True).start()
    out, errors = process.communicate(given)
    over.set()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors[-3000:]}")
    return out, most[0]


def toy_data(folder: Path) -> list[str]:
    """The settings of a toy world that is made in this folder."""
    write_toy_data(folder, progress=lambda line: None)
    return [f"data.train={folder / 'train'}", f"data.evaluation={folder / 'valid_u'}", "data.generate=null"]


def ours(asked: list[str], folder: Path) -> dict:
    """Seconds of each step but the first; of each step the mean reward, and tokens and named objects of its completions."""
    _, gib = watched([sys.executable, "-m", "cluster.cli", "train", "debug", *asked, f"run.dir={folder.parent}", f"run.name={folder.name}"])
    steps = [r for r in read_metrics(folder / "metrics.jsonl") if "reward/mean" in r]
    seconds = [b["time"] - a["time"] for a, b in zip(steps, steps[1:])]
    columns = [read_columns(file, ["response_token_ids", "answer_json"]) for _, file in rollout_files(folder / "rollouts")]
    tokens = [[len(ids) for ids in c["response_token_ids"]] for c in columns]
    objects = [[len(json.loads(answer or "[]")) for answer in c["answer_json"]] for c in columns]
    return {"seconds": seconds, "reward": [r["reward/mean"] for r in steps], "tokens": tokens, "objects": objects, "gib": gib}


def trl(asked: list[str], steps: int, folder: Path) -> dict:
    out, gib = watched([sys.executable, str(HERE / "peers/trl_loop.py")], json.dumps({"overrides": asked, "steps": steps, "out": str(folder)}))
    return json.loads(out.splitlines()[-1]) | {"gib": gib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side (default 3)")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default 40)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps of each that do not count (default 10)")
    parser.add_argument("--size", choices=("toy", "small"), default="toy", help="toy: the debug recipe's policy and prompts; small: 22 M weights, 950 tokens from six frames, up to 256 new ones (small_policy.py)")
    parser.add_argument("--ours", nargs="*", choices=list(OURS), default=list(OURS), help="modes of ours (default: all)")
    parser.add_argument("--prompts", type=int, default=2, help="of a step (default 2)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt (default 8)")
    args = parser.parse_args()
    asked = [f"loop.steps={args.steps}", f"rollout.prompts_per_step={args.prompts}", f"rollout.group_size={args.group_size}", "eval.ends=false", "loop.save_every=100000"]
    runs: dict[str, list[dict]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        asked += toy_data(Path(folder) / "toy")
        if args.size == "small":
            save_small_policy(Path(folder) / "policy")
            asked += [*SMALL, f"policy.path={Path(folder) / 'policy'}"]
        for n in range(args.rounds):
            for name in args.ours:
                runs[name].append(ours([*asked, *OURS[name]], Path(folder) / f"{name}-{n}"))
            runs["TRL"].append(trl(asked, args.steps, Path(folder) / f"trl-{n}"))
            print(f"  round {n + 1}/{args.rounds}", file=sys.stderr, flush=True)
    a_step = args.prompts * args.group_size
    medians = {name: [statistics.median(run["seconds"][args.warm_up :]) for run in each] for name, each in runs.items()}
    sides = {
        name: {
            "completions_per_second": round(a_step / statistics.median(medians[name]), 2),
            "seconds_per_step": [round(s, 4) for s in medians[name]],
            "peak_gib": round(max(run["gib"] for run in each), 2),
            "reward_at_the_end": round(statistics.mean(r for run in each for r in run["reward"][-10:]), 3),
            "tokens": dict(zip(("p10", "p50", "p90"), np.percentile([t for run in each for step in run["tokens"] for t in step], (10, 50, 90)).tolist())),
            "objects_a_completion": round(statistics.mean(n for run in each for step in run["objects"] for n in step), 2),
        }
        for name, each in runs.items()
    }
    ratios = {name: ratio({side: {"each": seconds} for side, seconds in medians.items()}, "TRL", name) for name in args.ours}
    record = {"machine": machine(2), "size": vars(args) | {"json": None, "completions_per_step": a_step}, "sides": sides, "times_as_fast_as_trl": ratios}
    publish(record, args.json)
    for name, side in sides.items():
        print(f"{name:18} {side['completions_per_second']:8.1f} completions/s {side['peak_gib']:6.2f} GiB  {ratios.get(name, '')}", file=sys.stderr)


if __name__ == "__main__":
    main()
