"""Does the simulator tell how long a step takes? Three runs of stages with known costs, on the machine's own clock, give it its numbers; it predicts six others.

    videoseg bench simulator --json OUT        (or python benchmarks/simulator.py --json OUT)

    calibration  synchronous runs with other numbers of sequences: from their step times a decoding step's cost, a sequence's share of it, and an update's, by least squares on simulated ones
    predictions  other numbers of engines, sequences at a time and groups, and asynchronous modes: step seconds as measured and as simulated with the calibrated costs
    scaling      what a thousand engines cost: simulated step seconds and utilisation, where the learner is the limit and where it is not
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from side_by_side import machine, publish
from cluster.sections import LoopConfig
from cluster.simulate import Costs, Sizes, simulate

LENGTHS = np.random.default_rng(0).integers(10, 60, 64).tolist()
TRUE = Costs(LENGTHS, step_seconds=0.004, sequence_seconds=0.00015, score_seconds=0.004, learn_seconds=0.15, sync_seconds=0.02)
"""What the stages of the measured runs take. The simulator is not told."""
CALIBRATED_BY = [Sizes(groups=1, completions=1), Sizes(groups=8, completions=4), Sizes(groups=16, completions=8)]  # the longest of one response and of a hundred differ
PREDICTED = [
    ("two engines", Sizes(engines=2, groups=16, completions=8), LoopConfig(steps=12)),
    ("few sequences at a time", Sizes(groups=16, completions=8, sequences=32), LoopConfig(steps=12)),
    ("one step off", Sizes(groups=8, completions=8), LoopConfig(steps=12, max_staleness=1)),
    ("one step off, two engines", Sizes(engines=2, groups=16, completions=8, sequences=64), LoopConfig(steps=12, max_staleness=1)),
    ("asynchronous", Sizes(engines=2, groups=8, completions=8, sequences=32), LoopConfig(steps=12, max_staleness=3)),
    ("late groups dropped", Sizes(engines=2, groups=16, completions=4, sequences=16), LoopConfig(steps=12, wait_for=0.75)),
]


def step_seconds(costs: Costs, sizes: Sizes, loop: LoopConfig, rounds: int, live: bool = False) -> float:
    """Mean over runs with other lengths, the same ones live and simulated."""
    return float(np.mean([simulate(costs, sizes, loop, seed, live=live).step_seconds for seed in range(rounds)]))


def calibrate(rounds: int) -> tuple[Costs, list[dict]]:
    """Costs with which the simulator takes as long as three synchronous runs did."""
    loop = LoopConfig(steps=8)
    measured = [step_seconds(TRUE, sizes, loop, rounds, live=True) for sizes in CALIBRATED_BY]
    costs_of = lambda x: Costs(LENGTHS, step_seconds=x[0], sequence_seconds=x[1], learn_seconds=x[2], score_seconds=TRUE.score_seconds)
    off = lambda x: [step_seconds(costs_of(x), sizes, loop, rounds) / m - 1 for sizes, m in zip(CALIBRATED_BY, measured)]
    start = np.array([1e-3, 1e-4, 0.1])
    fitted = least_squares(off, start, bounds=(0, np.inf), x_scale=start, diff_step=0.02)
    return costs_of(fitted.x.tolist()), [{"sizes": asdict(s), "measured_step_seconds": round(m, 4)} for s, m in zip(CALIBRATED_BY, measured)]


def predictions(costs: Costs, rounds: int) -> list[dict]:
    found = []
    for name, sizes, loop in PREDICTED:
        live, told = step_seconds(TRUE, sizes, loop, rounds, live=True), step_seconds(costs, sizes, loop, rounds)
        found.append({"case": name, "measured_step_seconds": round(live, 4), "simulated": round(told, 4), "error": round(told / live - 1, 4)})
        print(f"  {found[-1]}", file=sys.stderr, flush=True)
    return found


def scaling() -> list[dict]:
    found = []
    costs = Costs(LENGTHS, step_seconds=0.02, sequence_seconds=0.0005, prompt_seconds=0.05, score_seconds=0.02, token_seconds=2e-4, sync_seconds=0.5)
    for engines in (1, 10, 100, 1000):
        for ranks in (8, 8 * engines):
            sizes = Sizes(engines=engines, segmenters=max(1, engines // 4), ranks=ranks, groups=4 * engines, completions=4, sequences=16)
            forecast = simulate(costs, sizes, LoopConfig(steps=6, max_staleness=1))
            found.append({"engines": engines, "ranks": ranks, "groups_a_step": sizes.groups} | {k: round(v, 4) for k, v in asdict(forecast).items()})
            print(f"  {found[-1]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    costs, runs = calibrate(args.rounds)
    told = {name: round(getattr(costs, name), 6) for name in ("step_seconds", "sequence_seconds", "learn_seconds")}
    true = {name: getattr(TRUE, name) for name in told} | {"learn_seconds": TRUE.learn_seconds + TRUE.sync_seconds}
    found = predictions(costs, args.rounds)
    record = {"machine": machine(1), "calibration": {"runs": runs, "costs": told, "true_costs": true}, "predictions": found, "largest_error": max(abs(p["error"]) for p in found), "scaling": scaling()}
    publish(record, args.json)


if __name__ == "__main__":
    main()
