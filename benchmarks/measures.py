"""Speed of the boundary measure F, on one core: JSON, and a line on the screen.

    videoseg bench measures --json OUT        (or python benchmarks/measures.py --json OUT)

F of our code against the official DAVIS computation (plain_measures.py), 480x854, four frames of one and of five objects; both in turns, the
ratio taken within a round; the largest difference of the values.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

import plain_measures
from side_by_side import in_turns, machine, publish, ratio
from reward_service.measures import boundary_f

HW = (480, 854)


def blobs(count: int, rng: np.random.Generator) -> np.ndarray:
    """bool (count, H, W): wavy ellipses of 40 to 110 pixels' radius, some across the border."""
    masks = np.zeros((count, *HW), np.uint8)
    angle = np.linspace(0, 2 * np.pi, 200)
    for mask in masks:
        radius = rng.integers(40, 110) * (1 + 0.2 * np.sin(5 * angle + rng.uniform(0, 6)) + 0.1 * np.sin(11 * angle))
        outline = np.stack([rng.integers(50, 800) + 1.3 * radius * np.cos(angle), rng.integers(50, 430) + radius * np.sin(angle)], axis=-1)
        cv2.fillPoly(mask, [outline.astype(np.int32)], 1)
    return masks.astype(bool)


def f(rounds: int) -> dict:
    result = {}
    for objects in (1, 5):
        annotated = blobs(4 * objects, np.random.default_rng(objects)).reshape(4, objects, *HW)
        predicted = np.roll(annotated, (3, 5), axis=(-2, -1))
        predicted[..., 200:210, :] = False
        plain = lambda: np.array([[plain_measures.boundary_f(p, a) for p, a in zip(*frame)] for frame in zip(predicted, annotated)])
        ours = lambda: boundary_f(predicted, annotated)
        difference = float(np.abs(plain() - ours()).max())
        times = in_turns({"plain": plain, "ours": ours}, rounds)
        result[f"{objects}_objects"] = {
            "times": times,
            "plain_over_ours": ratio(times, "plain", "ours"),
            "cpu_plain_over_ours": round(times["plain"]["cpu_seconds"] / times["ours"]["cpu_seconds"], 2),
            "max_difference": difference,
        }
    return result


def lines(record: dict) -> list[str]:
    out = []
    for name, value in record["f"].items():
        r = value["plain_over_ours"]
        speed = f"{r['median']} ({r['min']} to {r['max']}; in CPU time {value['cpu_plain_over_ours']}) times as fast as the official computation"
        out.append(f"F, {name}: {speed}, largest difference {value['max_difference']:.1e}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each (default 15)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    record = {"machine": machine(1), "f": f(args.rounds)}
    publish(record, args.json)
    print("\n".join(lines(record)), file=sys.stderr)


if __name__ == "__main__":
    main()
