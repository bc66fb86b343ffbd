"""How long until a held-out reward is reached, ours and TRL's `GRPOTrainer`: the debug recipe on both sides. JSON, and a line on the screen.

    videoseg bench time_to_reward --json OUT

Both begin from the toy policy and train on the same prompts with the same rewards, group size, KL, learning rate and its schedule (peers/trl_loop.py), one after the other in turns, each with
the machine to itself. Every so many steps each answers the same held-out episodes greedily, and the same code scores the answers: that time does not count, nor does start-up. What
each samples is its own, so that curves differ as those of two seeds do. A side is there at its first evaluation that reaches the reward.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from side_by_side import machine, publish, spread
from whole_loop import HERE, OURS, toy_data, watched
from cluster.metrics import read_metrics


class Evaluation(NamedTuple):
    step: int
    seconds: float
    """Of training, until then."""
    reward: float


def ours(asked: list[str], every: int, folder: Path) -> list[Evaluation]:
    watched([sys.executable, "-m", "cluster.cli", "train", "debug", *asked, f"eval.every={every}", f"run.dir={folder.parent}", f"run.name={folder.name}"])
    found, seconds, before = [], 0.0, 0.0
    for record in read_metrics(folder / "metrics.jsonl"):  # the first is the evaluation before step 1
        if "eval/reward/mean" in record:
            found.append(Evaluation(record["step"], seconds, record["eval/reward/mean"]))
        else:
            seconds += record["time"] - before
        before = record["time"]
    return found


def trl(asked: list[str], steps: int, every: int, folder: Path) -> list[Evaluation]:
    given = {"overrides": asked, "steps": steps, "out": str(folder), "every": every}
    out, _ = watched([sys.executable, str(HERE / "peers/trl_loop.py")], json.dumps(given))
    return [Evaluation(*each) for each in json.loads(out.splitlines()[-1])["held_out"]]


def reached(curve: list[Evaluation], reward: float) -> Evaluation | None:
    return next((e for e in curve if e.reward >= reward), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--reward", type=float, default=6.2, help="mean held-out reward to be reached (default 6.2; the toy policy begins at 5.6)")
    parser.add_argument("--prompts", type=int, default=24, help="of a step (default 24, the recipe's)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default 60)")
    parser.add_argument("--every", type=int, default=5, help="steps from one evaluation to the next (default 5)")
    parser.add_argument("--episodes", type=int, default=256, help="held-out ones of an evaluation (default 256)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side (default 1)")
    parser.add_argument("--ours", nargs="+", choices=sorted(OURS), default=["ours", "ours_on_arrival"], help="what of ours to run (default: synchronous, and gradients begun as groups arrive)")
    args = parser.parse_args()
    asked = [f"loop.steps={args.steps}", f"rollout.prompts_per_step={args.prompts}", f"eval.episodes={args.episodes}", "loop.save_every=100000"]
    curves: dict[str, list[list[Evaluation]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        asked += toy_data(Path(folder) / "toy")
        for n in range(args.rounds):
            for name in args.ours:
                curves[name].append(ours([*asked, *OURS[name], f"run.seed={n}"], args.every, Path(folder) / f"{name}-{n}"))
                if (begins := curves[name][-1][0].reward) >= args.reward:
                    sys.exit(f"--reward {args.reward:g} is reached before any training, which begins at {begins:.3f}; ask for more")
            curves["TRL"].append(trl([*asked, f"run.seed={n}"], args.steps, args.every, Path(folder) / f"trl-{n}"))
            print(f"  round {n + 1}/{args.rounds}", file=sys.stderr, flush=True)
    there = {name: [reached(curve, args.reward) for curve in each] for name, each in curves.items()}
    record = {"machine": machine(2), "size": vars(args) | {"json": None}, "sides": {}}
    for name, each in curves.items():
        record["sides"][name] = side = {"curves": [[[e.step, round(e.seconds, 1), round(e.reward, 4)] for e in curve] for curve in each]}
        if all(there[name]):
            side |= {"steps": spread([e.step for e in there[name]]), "seconds": spread([e.seconds for e in there[name]], 1)}
        if all(there[name]) and all(there["TRL"]):
            side["trl_over_it"] = spread([b.seconds / a.seconds for a, b in zip(there[name], there["TRL"])])
        print(f"{name:18} {side.get('seconds', 'not reached')}", file=sys.stderr)
    publish(record, args.json)


if __name__ == "__main__":
    main()
