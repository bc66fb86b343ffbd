"""The toy run's evidence: three seeds, groups begun ahead of updates, learning rate 0, and three controls, recorded as JSON and drawn as a plot.

    python -m examples.toy.evidence --out docs/toy-run.json

Takes an hour or more on two cores. It can be stopped and started again: finished runs are kept, an unfinished one is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

from cluster import checkpoints
from cluster.config import load
from cluster.metrics import read_metrics
from examples.toy.runs import run_to_its_end
from rollout.toy_data import ToyDataConfig, write_toy_data

RUNS = {
    "seed-0": ["run.seed=0"],
    "seed-1": ["run.seed=1"],
    "seed-2": ["run.seed=2"],
    "one-step-off": ["loop.max_staleness=1"],
    "asynchronous": ["loop.max_staleness=3"],
    "lr-0": ["learner.lr=0"],
    "blank-frames": ["data.control=blank_frames"],
    "shuffled-in-video": ["data.train={data}/train", "data.evaluation={data}/valid_u", "data.generate=null"],
    "shuffled-queries": ["data.control=shuffled_queries"],
}
SHUFFLED = Path("data/toy-shuffled")
"""The toy world with each query about a shape of its video drawn at random."""
POLICY = Path(__file__).parent / "models/policy"
CURVES = ("reward/mean", "iou/box", "iou/mask", "length/reasoning", "length/factor", "length/penalised_fraction", "kl/reference", "mismatch/kl", "mismatch/logprob_diff", "seconds/step")


def finished(folder: Path) -> bool:
    """Whether a run has evaluated its last step."""
    if not (folder / "metrics.jsonl").exists():
        return False
    last = load(folder / "config.yaml").loop.steps
    return any(r["step"] == last and "eval/iou/box" in r for r in read_metrics(folder / "metrics.jsonl"))


def run(name: str, overrides: list[str], folder: Path) -> Path:
    """One run to its end: started, resumed, or already there."""
    where = folder / name
    if finished(where):
        return where
    overrides = [o.format(data=SHUFFLED) for o in overrides]
    if any(str(SHUFFLED) in o for o in overrides) and not SHUFFLED.exists():
        write_toy_data(SHUFFLED, ToyDataConfig(shuffled=True))
    run_to_its_end(where, "train", "debug", *overrides)
    return where


def summarise(folder: Path) -> dict:
    """The fingerprint of the policy that it began from, held-out numbers before and after, their differences, and the training curves of one run."""
    records = read_metrics(folder / "metrics.jsonl")
    evaluations = [r for r in records if "eval/iou/box" in r]
    steps = [r for r in records if "reward/mean" in r]
    before, after = ({k.removeprefix("eval/"): v for k, v in e.items() if k.startswith("eval/")} for e in (evaluations[0], evaluations[-1]))
    return {
        "policy": checkpoints.latest(folder / "checkpoints", hashes=False)[0].manifest["policy"],
        "steps": len(steps),
        "before": before,
        "after": after,
        "gain": {k: round(after[k] - before[k], 4) for k in before},
        "curves": {k: [round(r[k], 5) for r in steps if r.get(k) is not None] for k in CURVES},
    }


def plot(results: dict, file: Path) -> None:
    """How the policy became what reinforcement learning starts from, box IoU of the training samples by step, and the held-out gains as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (cold, during, after) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    training = json.loads((POLICY / "training.json").read_text())
    curve, cold_start = training["curve"], training["cold_start"]
    for stage in sorted({point["stage"] for point in curve}):
        points = [point for point in curve if point["stage"] == stage]
        cold.plot([p["step"] for p in points], [p["box_iou"] for p in points], marker="o", markersize=3, label=f"stage {stage}")
    cold.plot(curve[-1]["step"] + cold_start["recipe"]["steps"], cold_start["after"]["box_iou"], "*", markersize=10, label="after the cold start")
    cold.set(xlabel="step", ylabel="box IoU, held-out, greedy", title="Before (supervised)")
    cold.legend()
    for name, result in results.items():
        during.plot(smooth(result["curves"]["iou/box"]), label=name, alpha=0.9 if name.startswith("seed") else 0.6)
    during.set(xlabel="step", ylabel="box IoU of training samples, mean of 5 steps", title="Reinforcement learning")
    during.legend(loc="lower right", bbox_to_anchor=(1, 0.03), ncols=2)  # between the curves and those of blank frames, at 0
    names = list(results)
    for offset, measure in ((-0.2, "iou/box"), (0.2, "iou/mask")):
        after.barh([i + offset for i in range(len(names))], [results[n]["gain"][measure] for n in names], 0.35, label=measure)
    after.set(yticks=range(len(names)), yticklabels=names, xlabel="change, held-out, greedy", title="After training")
    after.axvline(0, color="black", linewidth=0.8)
    after.legend()
    figure.savefig(file, dpi=110)


def smooth(values: list[float], width: int = 5) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/toy-run.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the run folders")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), help="these runs only; the others stay as they are recorded")
    args = parser.parse_args(arguments)
    recorded = json.loads(args.out.read_text())["runs"] if args.only and args.out.exists() else {}
    results = {name: recorded[name] for name in RUNS if name in recorded}
    for name in args.only or RUNS:
        results[name] = summarise(run(name, RUNS[name], args.runs))
        seeds = [r["gain"] for n, r in results.items() if n.startswith("seed")]
        over_seeds = {
            k: {"mean": round(statistics.mean(g[k] for g in seeds), 4), "min": min(g[k] for g in seeds), "max": max(g[k] for g in seeds)} for k in (seeds[0] if seeds else {})
        }
        record = {
            "command": "python -m examples.toy.evidence",
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "processor": platform.machine()},
            "gain_over_seeds": over_seeds,
            "runs": {name: results[name] for name in RUNS if name in results},
        }
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, args.out)
    plot(results, args.out.with_suffix(".png"))
    return record


if __name__ == "__main__":
    main()
