"""Does the simulator tell how long a step takes? Three runs of stages with known costs, on the machine's own clock, give it its numbers; it predicts six others.

    videoseg bench simulator --json OUT        (or python benchmarks/simulator.py --json OUT)

    calibration  synchronous runs with other numbers of sequences: from their step times a decoding step's cost, a sequence's share of it, and an update's, by least squares
    predictions  other numbers of engines, sequences at a time and groups, and asynchronous modes: step seconds as measured and as simulated with the calibrated costs
    controller   what a thousand engines cost: simulated step seconds and utilisation, where the learner is the limit and where it is not
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from side_by_side import machine, publish
from cluster.sections import LoopConfig
from cluster.simulate import Costs, Sizes, simulate

LENGTHS = np.random.default_rng(0).integers(10, 60, 64).tolist()
TRUE = Costs(LENGTHS, step_seconds=0.004, sequence_seconds=0.00015, score_seconds=0.004, learn_seconds=0.15, sync_seconds=0.02)
"""What the stages of the measured runs take. The simulator is not told."""
CALIBRATED_BY = [Sizes(groups=2, completions=4), Sizes(groups=8, completions=4), Sizes(groups=16, completions=8)]
PREDICTED = [
    ("two engines", Sizes(engines=2, groups=16, completions=8), LoopConfig(steps=12)),
    ("few sequences at a time", Sizes(groups=16, completions=8, sequences=32), LoopConfig(steps=12)),
    ("one step off", Sizes(groups=8, completions=8), LoopConfig(steps=12, max_staleness=1)),
    ("one step off, two engines", Sizes(engines=2, groups=16, completions=8, sequences=64), LoopConfig(steps=12, max_staleness=1)),
    ("asynchronous", Sizes(engines=2, groups=8, completions=8, sequences=32), LoopConfig(steps=12, max_staleness=3)),
    ("late groups dropped", Sizes(engines=2, groups=16, completions=4, sequences=16), LoopConfig(steps=12, wait_for=0.75)),
]


def calibrate(rounds: int) -> tuple[Costs, list[dict]]:
    """Costs from three synchronous runs: step = longest x (step_seconds + sequences x sequence_seconds) + update, nearly; the simulator itself says how far from it."""
    loop = LoopConfig(steps=8)
    measured = [float(np.median([simulate(TRUE, sizes, loop, seed, live=True).step_seconds for seed in range(rounds)])) for sizes in CALIBRATED_BY]
    costs = Costs(LENGTHS, step_seconds=0.001, sequence_seconds=0.0001, score_seconds=TRUE.score_seconds, learn_seconds=0.1)
    names = ("step_seconds", "sequence_seconds", "learn_seconds")
    for _ in range(6):  # Gauss-Newton on the simulated step times
        predicted = lambda c: np.array([np.mean([simulate(c, sizes, loop, seed).step_seconds for seed in range(rounds)]) for sizes in CALIBRATED_BY])
        base = predicted(costs)
        slopes = np.stack([(predicted(replace(costs, **{n: getattr(costs, n) * 1.05})) - base) / (getattr(costs, n) * 0.05) for n in names], axis=1)
        change = np.linalg.lstsq(slopes, np.array(measured) - base, rcond=None)[0]
        costs = replace(costs, **{n: max(1e-6, getattr(costs, n) + float(d)) for n, d in zip(names, change)})
    return costs, [{"sizes": asdict(s), "measured_step_seconds": round(m, 4)} for s, m in zip(CALIBRATED_BY, measured)]


def predictions(costs: Costs, rounds: int) -> list[dict]:
    found = []
    for name, sizes, loop in PREDICTED:
        live, told = ([simulate(c, sizes, loop, seed, live=real).step_seconds for seed in range(rounds)] for c, real in ((TRUE, True), (costs, False)))
        error = np.mean(told) / np.mean(live) - 1
        found.append({"case": name, "measured_step_seconds": round(float(np.mean(live)), 4), "simulated": round(float(np.mean(told)), 4), "error": round(float(error), 4)})
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
