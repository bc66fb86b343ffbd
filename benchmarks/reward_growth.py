"""How the cost of a reward grows: with the length of hostile texts, and with the completions of a group. One core, JSON.

    videoseg bench reward_growth --json OUT        (or python benchmarks/reward_growth.py --json OUT)

    text         texts of many families, each also inside a think block, an answer block, a list, ...: `parse_answer`, and `score` with every
                 preset. The steepest family's CPU seconds at doubling lengths, and the exponent p of seconds ~ characters^p; bytes allocated
                 at the peak, a character
    completions  groups of 16 to 1,024 completions of 8 objects (of one, where the preset is for one), without masks: the exponent over their number

Python's garbage collector is off meanwhile. Its passes over all objects of the process add up to linear time as well, but come in steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from side_by_side import machine, publish
from reward_service import FrameTarget, RewardConfig, Target, parse_answer, score, score_group
from reward_service.config import FORMULAS

SHORTEST = 0.002
"""Seconds of a measurement: the processor's clock may have steps of milliseconds."""
STEEPEST, STEEP = 8, 1.25
"""Families that are measured at all lengths: so many, and those with a larger exponent between two lengths."""
DIGITS = "9" * 4299
OBJECT = '{"bbox_2d": [10, 10, 19, 19], "point_2d": [15, 15], "negative_point_2d": [[5, 5]]},'
UNITS = {
    "letters": "a",
    "spaces": " ",
    "wide spaces": "\u2003",
    "astral letters": "\U0001d54f",
    "lone surrogates": "\ud800",
    "nulls": "\x00",
    "sentences": "a. ",
    "sentences that differ": None,  # see `texts`
    "thoughts": "<think>",
    "thoughts that close": "</think> ",
    "thoughts, closed": "<think>a</think>",
    "answers": "<answer>",
    "answers that close": "</answer>",
    "answers, closed": "<answer>[]</answer>",
    "answers that open a brace": "<answer>   {",
    "braces that close an answer": "}   </answer>",
    "braces": "{",
    "closing braces": "}",
    "empty braces": "{}",
    "keys, nested": '{"a":',
    "brackets": "[",
    "closing brackets": "]",
    "empty brackets": "[],",
    "brackets and braces": "[{",
    "quotes": '"',
    "strings, escaped": '"\\u0041\\n",',
    "backslashes": "\\",
    "commas": ",",
    "minus signs": "-",
    "digits": "9",
    "integers of 4,299 digits": DIGITS + ",",
    "negative numbers": "-999999999,",
    "numbers too large": "1e999,",
    "NaN": "NaN,",
    "infinities": "-Infinity,",
    "booleans": "true,",
    "fences": "```json\n",
    "fences, closed": "```json\n[]\n```\n",
    "boxes": OBJECT,
    "boxes of wrong arity": '{"bbox_2d": [10, 10, 19], "point_2d": [1, 2, 3]},',
    "one object of one system": '{"bbox": [10, 10, 19, 19], "points_1": [15, 15], "points_2": [12, 12]},',
    "boxes of huge integers": '{"bbox_2d": [10, 10, %s, 19], "point_2d": [15, 15]},' % DIGITS,
    "all of them": "<think>[{\"<answer>```\\ 9.</think>NaN}]</answer>",
}
WRAPS = {
    "bare": "{}",
    "thought": "<think>{}</think><answer>[]</answer>",
    "answer": "<think></think><answer>{}</answer>",
    "open answer": "<answer>{}",
    "list": "<think></think><answer>[{}0]</answer>",
    "string": '<think></think><answer>["{}"]</answer>',
    "boxes of one object": '<think></think><answer>{{"keyframe_timestamp": 0, "bbox_2d_list": [{}0]}}</answer>',
    "a negative point": '<think></think><answer>[{{"bbox_2d": [10, 10, 19, 19], "negative_point_2d": [{}0]}}]</answer>',
    "text beside 120 boxes": '<think></think><answer>[{{"bbox_2d": ["{}", 1, 2, 3], "point_2d": [1, 2]}}' + ', {{"bbox_2d": ["", 1, 2, 3], "point_2d": [1, 2]}}' * 119 + "]</answer>",
    "text beside 120 boxes of one object": '<think></think><answer>{{"keyframe_timestamp": 0, "bbox_2d_list": [["{}", 1, 2, 3]' + ', ["", 1, 2, 3]' * 119 + "]}}</answer>",
    "two turns": '<think></think><answer>[{{"frame_idx": 0}}]</answer><think></think><answer>[{}0]</answer>',
}  # fmt: skip


def texts(characters: int) -> Iterator[tuple[str, str]]:
    """(family, text) of about so many characters."""
    for name, unit in UNITS.items():
        filling = " ".join(f"{n:x}." for n in range(characters // 7)) if unit is None else unit * -(-characters // len(unit))
        for wrap, form in WRAPS.items():
            yield f"{name}, {wrap}", form.format(filling)


def scorers() -> dict[str, Callable[[str], object]]:
    """Of a text: parse_answer, and score with each preset, without masks of answers."""
    mask = np.zeros((2, 84, 84), bool)
    mask[0, 10:20, 10:20] = mask[1, 40:61, 40:61] = True
    boxes, points = [[10, 10, 19, 19], [40, 40, 60, 60]], [[[15, 15], [12, 12]], [[50, 50]]]
    several = Target((84, 84), boxes, points, masks=mask, frames={0: FrameTarget(boxes, mask), 3: FrameTarget([None, None], [None, None])})
    one = Target((84, 84), boxes[:1], points[:1])
    found: dict[str, Callable[[str], object]] = {"parse_answer": parse_answer}
    for name in FORMULAS:
        config = without_masks(name)
        truth = one if name in ("seg_zero", "pixelthink") else several
        length = 0 if config.needs_length else None
        found[name] = lambda text, config=config, truth=truth, length=length: score(text, truth, config, length=length)
    return found


def without_masks(name: str) -> RewardConfig:
    config = RewardConfig.preset(name)
    config.weights.video_iou = 0.0
    return config


def cpu_seconds(run: Callable[[], object], rounds: int) -> float:
    """Of one run: the smallest of so many measurements, as what else the machine does only adds. Short runs are measured by the hundred."""
    times = []
    for _ in range(rounds):
        runs, start, taken = 0, time.thread_time(), 0.0
        while taken < SHORTEST:
            run()
            runs, taken = runs + 1, time.thread_time() - start
        times.append(taken / runs)
    return min(times)


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """p of seconds ~ size^p by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def text(rounds: int, largest: int) -> dict:
    """Every family at two lengths; the steepest of them, and all that look steeper than linear, at doubling lengths."""
    sizes = [largest >> n for n in (5, 4, 3, 2, 1, 0)]
    runs, slopes = scorers(), {}
    for (family, short), (_, long) in zip(texts(sizes[0]), texts(sizes[2])):
        for name, run in runs.items():
            slopes[name, family] = exponent([len(short), len(long)], [cpu_seconds(lambda: run(given), 1) for given in (short, long)])
    print("  all families screened", file=sys.stderr, flush=True)
    found = {}
    for name, run in runs.items():
        families = sorted((f for n, f in slopes if n == name), key=lambda f: slopes[name, f], reverse=True)
        steep = {f for n, f in enumerate(families) if n < STEEPEST or slopes[name, f] > STEEP}
        measured = {family: ([], []) for family in steep}
        for size in sizes:
            for family, given in texts(size):
                if family in steep:
                    measured[family][0].append(len(given))
                    measured[family][1].append(cpu_seconds(lambda: run(given), rounds))
        p = {family: exponent(*of) for family, of in measured.items()}
        steepest = max(p, key=p.get)
        peak = {family: peak_bytes(lambda: run(given)) / len(given) for family, given in texts(sizes[0])}
        hungriest = max(peak, key=peak.get)
        found[name] = {
            "largest_exponent": round(p[steepest], 3),
            "its_family": steepest,
            "its_characters": measured[steepest][0],
            "its_milliseconds": [round(1000 * t, 3) for t in measured[steepest][1]],
            "families_measured": len(steep),
            "peak_bytes_a_character": round(peak[hungriest], 1),
            "of_family": hungriest,
        }
        print(f"  {name}: {found[name]['largest_exponent']} ({steepest}), {found[name]['peak_bytes_a_character']} bytes ({hungriest})", file=sys.stderr, flush=True)
    return {"families": len(slopes) // len(runs), "rounds": rounds, "of": found}


def peak_bytes(run: Callable[[], object]) -> int:
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def completions(rounds: int, largest: int = 1024) -> dict:
    """64 completions of 8 objects are the size that the service promises to score in 5 ms. All presets take turns, as a machine's speed comes and goes."""
    sizes = [n for n in (16, 32, 64, 128, 256, 512, 1024) if n <= largest]
    runs = {name: group_scorer(name, sizes[-1]) for name in FORMULAS}
    seconds = {(name, n): [] for name in runs for n in sizes}
    for _ in range(rounds):
        for name, n in seconds:
            seconds[name, n].append(cpu_seconds(lambda: runs[name](n), 1))
    result = {}
    for name, run in runs.items():
        fastest = [min(seconds[name, n]) for n in sizes]
        result[name] = {
            "exponent": round(exponent(sizes, fastest), 3),
            "milliseconds": {str(n): round(1000 * t, 3) for n, t in zip(sizes, fastest)},
            "median_milliseconds_of_64": round(1000 * float(np.median(seconds[name, 64])), 3),
            "distinct_totals_of_64": len({s.total for s in run(64)}),
        }
        print(f"  {name}: {result[name]['milliseconds']['64']} ms for 64, exponent {result[name]['exponent']}", file=sys.stderr, flush=True)
    return {"rounds": rounds, "of": result}


def group_scorer(name: str, most: int) -> Callable[[int], list]:
    """Scores the first so many of `most` completions."""
    config, truth = without_masks(name), target_of_8()
    given = [answer(name, np.random.default_rng(n)) for n in range(most)]
    if name in ("seg_zero", "pixelthink"):
        truth = Target(truth.image_size, truth.boxes[:1], [[truth.points[0][0], truth.boxes[0][:2]]])
    run = lambda n: score_group(given[:n], truth, config, 4.0, lengths=[30] * n)
    run(1)
    return run


def target_of_8() -> Target:
    rng = np.random.default_rng(0)
    corner, size = rng.integers(0, 700, (8, 2)), rng.integers(20, 120, (8, 2))
    boxes, masks = np.concatenate([corner, corner + size], axis=1), np.zeros((8, 840, 840), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1 : y2 + 1, x1 : x2 + 1] = True
    points = [[[(x1 + x2) // 2, (y1 + y2) // 2]] for x1, y1, x2, y2 in boxes.tolist()]
    frames = {0: FrameTarget(boxes.tolist(), masks), 1: FrameTarget([None] * 8, [None] * 8)}
    return Target((840, 840), boxes.tolist(), points, masks=masks, frames=frames)


def answer(name: str, rng: np.random.Generator) -> str:
    """A completion as the preset asks for it, its boxes up to 12 pixels off."""
    boxes = np.array(target_of_8().boxes)
    boxes = rng.permutation(boxes + rng.integers(-12, 13, boxes.shape)).tolist()
    middle = lambda b: [(b[0] + b[2]) // 2, (b[1] + b[3]) // 2]
    think = "<think>Eight are asked for. They stand in rows. Each gets a box.</think>\n"
    if name in ("seg_zero", "pixelthink"):
        said = {"bbox": boxes[0], "points_1": middle(boxes[0]), "points_2": boxes[0][:2]}
    elif name == "veason_r1":
        said = {"keyframe_timestamp": 0, "bbox_2d_list": boxes}
    else:
        said = [{"bbox_2d": b, "point_2d": middle(b), "negative_point_2d": [b[2] + 9, b[3] + 9]} for b in boxes]
    first = f'{think}<answer>[{{"frame_idx": 0}}]</answer>' if name == "revseg" else ""
    return f"{first}{think}<answer>{json.dumps(said)}</answer>"


QUESTIONS = {"text": text, "completions": completions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), help="these questions only")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each text, five times as many of each group; the fastest counts")
    parser.add_argument("--largest", type=int, default=2**20, help="characters of the longest texts")
    args = parser.parse_args()
    record = {"machine": machine(1)}
    gc.disable()
    for name in args.only or QUESTIONS:
        record[name] = text(args.rounds, args.largest) if name == "text" else completions(5 * args.rounds)
    publish(record, args.json)


if __name__ == "__main__":
    main()
