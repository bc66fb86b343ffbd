"""The tables of docs/performance.md, from docs/bench-all.json: rewrites what stands between the page's `figures` comments.

    python docs/hooks/figures.py        after `videoseg bench all --json docs/bench-all.json --peer-python PEER/bin/python`, with decord
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
PAGE, BENCHMARKS = DOCS / "performance.md", DOCS / "bench-all.json"

BESIDE_TRL = [
    (f"{what}: {side}", f"sides.{place}.{key}", unit)
    for what, key, unit in (("completions a second", "completions_per_second", "completions/s"), ("memory", "peak_gib", "GiB"))
    for side, place in (("ours, synchronous", "ours"), ("TRL", "TRL"))
]

BENCHMARK_NAMES = {"mevis": "MeViS", "revos": "ReVOS", "ref_davis17": "Ref-DAVIS17"}
START_UP = (
    "policy and data checked", "Ray begun", "actors asked for", "vLLM imported", "engine core begun", "engine core imported", "model loaded", "warmed up", "engine ready", "weights synced", "first group answered",
)  # fmt: skip
OVERHEAD = [
    ("our engine against vLLM's own AsyncLLM, the same requests", "seconds_of_ours_over.AsyncLLM", "times the time"),
    ("the same, CPU time of all processes", "cpu_seconds_of_ours_over.AsyncLLM", "times the CPU time"),
    ("our engine against vllm.LLM, all in one process", "seconds_of_ours_over.LLM", "times the time"),
    ("ours", "tokens_per_second.ours", "tokens/s"),
]
SYNC = [
    ("weights", "bytes", "bytes"),
    ("a sync against a plain copy in memory", "sync_over_copy", "times the time"),
    *((f"of it: {stage}", f"seconds.{stage}", "s") for stage in ("pause", "gather and hash", "put", "load", "wake")),
    ("from the last gradient to the first token", "seconds.last gradient to first token", "s"),
]
# What the page about performance takes from the record of each benchmark: words, place in the JSON, unit.
FIGURES = {
    "learning": [
        ("shared prompts without padding against padded rows of one completion", "packing.padded_over_packed", "times as fast"),
        ("the same, tokens a second: ours", "packing.response_tokens_per_second.packed", "response tokens/s"),
        ("the same, tokens a second: padded rows", "packing.response_tokens_per_second.padded", "response tokens/s"),
        ("log-probs in chunks against full logits, width 256", "logprobs.0.chunked_over_plain", "of the peak memory"),
    ],
    "openmp_waiting": [
        ("OpenMP's default waiting against ours, beside a busy process", "beside_a_busy_process.default_over_ours", "times the time"),
        ("the same on an idle machine", "idle.default_over_ours", "times the time"),
    ],
    "segmentation": [
        ("XMem against a plain one, three objects, 240x432", "xmem.three_objects_240x432.plain_over_ours", "times as fast"),
        ("eight hypotheses together against eight runs", "hypotheses.eight_together_over_eight_runs", "of the time"),
        ("SAM2, eight answers about a frame: one call an answer against one call", "sam2.smallest_published_1024.naive_over_ours", "times the time"),
        ("peak memory of tracking, 6,000 frames against 2,500", "length.6000_over_2500.peak_mb", "times as much"),
    ],
    "decoding": [
        (f"H.264, key frames every 48, {order}: {reader}", f"frames_per_second.h264/mp4.{place}.{reader.lower()}", "frames/s")
        for order, place in (("in order", "sequential"), ("at random", "random"))
        for reader in ("ours", "decord", "OpenCV")
    ],
    "reader": [
        ("10 million rows: memory after the whole pass", "ten_million.results.after_100_percent_mb", "MB"),
        ("first episode, shuffled: ours", "rates.results.shuffled ours.first_seconds", "s"),
        ("first episode, shuffled: Hugging Face's datasets, streaming", "rates.results.shuffled datasets_stream.first_seconds", "s"),
    ],
    "reward_growth": [("rewards of 64 completions of 8 objects, default preset", "completions.of.videoseg_r1.milliseconds.64", "ms")],
    "measures": [("boundary measure F against the official computation, one object", "f.1_objects.plain_over_ours", "times as fast")],
    "pipeline": [
        ("one step off: a step over the slower of generation and learning, which take the same", "efficiency.4.step_over_slower", "times the time"),
        ("the same where learning takes twice as long", "efficiency.5.step_over_slower", "times the time"),
        ("controller: pipeline and ledger, 4,096 groups a step", "controller.3.microseconds_a_group", "microseconds a group"),
        ("controller: with calls of eight actors, and rewards", "engines.3.microseconds_a_group", "microseconds a group"),
        ("the calls alone", "engines.3.calls.microseconds_a_group", "microseconds a group"),
        ("the rewards alone, eight completions", "engines.3.rewards.microseconds_a_group", "microseconds a group"),
    ],
    "whole_loop": [
        ("the toy policy, 16 completions a step, against TRL: synchronous", "times_as_fast_as_trl.ours", "times as fast"),
        ("the same, gradients begun as groups arrive", "times_as_fast_as_trl.ours_on_arrival", "times as fast"),
        ("the same, one step off", "times_as_fast_as_trl.ours_one_step_off", "times as fast"),
        *BESIDE_TRL,
    ],
    "whole_loop_small": [
        ("22 million weights, prompts of 950 tokens from six frames, against TRL: synchronous", "times_as_fast_as_trl.ours", "times as fast"),
        *BESIDE_TRL,
        *((f"{which} of the tokens of an answer: {side}", f"sides.{side}.tokens.{key}", "tokens") for which, key in (("10th percentile", "p10"), ("median", "p50"), ("90th percentile", "p90")) for side in ("ours", "TRL")),
    ],
    "time_to_reward": [
        ("held-out reward that is to be reached", "size.reward", ""),
        ("seconds of training until then: ours, synchronous", "sides.ours.seconds", "s"),
        ("the same: TRL", "sides.TRL.seconds", "s"),
        ("steps: ours", "sides.ours.steps", ""),
        ("steps: TRL", "sides.TRL.steps", ""),
    ],
    "limits": [
        row
        for size in ("toy", "small")
        for stage in ("engine", "segmenter", "learner", "sync")
        for row in (
            (f"{size}, {stage}: a step has", f"sizes.{size}.stages.{stage}.seconds", "s of it"),
            (f"{size}, {stage}: against what arithmetic and memory allow", f"sizes.{size}.stages.{stage}.times_its_limit", "times the time"),
        )
    ],
    "generation": OVERHEAD,
    "generation_small": OVERHEAD,
    "weight_sync": SYNC,
    "weight_sync_small": SYNC,
    "start_up": [
        ("first start, with empty caches: until the first answers are there", "first.at.first group answered", "s"),
        ("the start after it", "second.at.first group answered", "s"),
        *((f"of the first: {event}, after", f"first.took.{event}", "s") for event in START_UP),
        *((f"processor time of the first: {kind}", f"first.cpu_seconds.{kind}", "s") for kind in ("command", "engine", "engine core", "learner", "segmenter", "Ray")),
    ],
    "scaling": [
        ("the stage that grows fastest with what is asked of it: exponent", "largest.exponent.value", ""),
        *((f"a step against {what}: exponent of the last doubling", f"sizes.{size}.step.exponent_of_the_last_doubling", "") for size, what in (("completions", "completions of a group"), ("frames", "frames of the video"), ("objects", "objects"), ("shown", "frames of the prompt"))),
    ],
    "simulator": [("largest error of six predicted step times", "largest_error", "of the measured time")],
    "evaluation": [
        (f"scoring {name} against the way of the official evaluators", f"of.{key}.plain_over_ours", "times as fast") for key, name in BENCHMARK_NAMES.items()
    ],
}

# What was aimed at: words, a benchmark, place in its record, and the bound, least (True) or most.
TARGETS = [
    ("[whole loop](#the-whole-loop-against-trl), small size, against TRL", "whole_loop_small", "times_as_fast_as_trl.ours", True, 3, "times as fast"),
    ("whole loop, toy size, synchronous", "whole_loop", "times_as_fast_as_trl.ours", True, 1, "times as fast"),
    ("the same, gradients begun as groups arrive", "whole_loop", "times_as_fast_as_trl.ours_on_arrival", True, 1, "times as fast"),
    ("the same, one step off", "whole_loop", "times_as_fast_as_trl.ours_one_step_off", True, 1, "times as fast"),
    ("[engine](#engine) against vLLM alone, toy size", "generation", "seconds_of_ours_over.AsyncLLM", False, 1.05, "times the time"),
    ("the same, small size", "generation_small", "seconds_of_ours_over.AsyncLLM", False, 1.05, "times the time"),
    ("[pipeline](#the-loop), one step off: a step over the slower of generation and learning", "pipeline", "efficiency.4.step_over_slower", False, 1.15, "times the time"),
    ("[controller](#the-loop), a group: loop and ledger", "pipeline", "controller.3.microseconds_a_group", False, 1000, "microseconds"),
    ("the same with calls of eight actors, and rewards", "pipeline", "engines.3.microseconds_a_group", False, 1000, "microseconds"),
    ("[start-up](#start-up), from the command to the first answers: first start", "start_up", "first.at.first group answered", False, 75, "s"),
    ("the same, second start", "start_up", "second.at.first group answered", False, 50, "s"),
    *((f"[scoring](#rewards-and-evaluation) {name} against the official way", "evaluation", f"of.{key}.plain_over_ours", True, 3, "times as fast") for key, name in BENCHMARK_NAMES.items()),
]


def with_figures(page: str, run: dict) -> str:
    """The page with what a run of all benchmarks found between its comments: a table of a benchmark's figures, what was aimed at, or what it ran on. Raises
    LookupError where the run lacks a figure, or a comment names no benchmark."""
    makes = {"the run": lambda: _where(run), "targets": lambda: _targets(run)}
    makes |= {f"figures of {name}": lambda name=name: _table(run["benchmarks"][name], FIGURES[name]) for name in FIGURES}
    return re.sub(r"<!-- ((?:the run|targets|figures)[^>]*) -->\n.*?<!-- end -->", lambda found: f"<!-- {found[1]} -->\n{makes[found[1]]()}<!-- end -->", page, flags=re.DOTALL)


def _where(run: dict) -> str:
    machine, minutes = run["machine"], sum(result.get("seconds", 0) for result in run["benchmarks"].values()) / 60
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; {versions}; commit {run['commit'][:7]}; {minutes:.0f} minutes.\n"


def _targets(run: dict) -> str:
    """By the medians."""
    said = "| | aim, on two cores | measured | |\n|---|---|---|---|\n"
    for what, name, place, least, bound, unit in TARGETS:
        value = _found(run["benchmarks"][name]["record"], place)
        median = value["median"] if isinstance(value, dict) else value
        holds = median >= bound if least else median <= bound
        said += f"| {what} | at {'least' if least else 'most'} {_figure(bound)} {unit} | {_figure(value)} | {'holds' if holds else '**does not hold**'} |\n"
    return said


def _table(result: dict, rows: list[tuple[str, str, str]]) -> str:
    said = "".join(f"| {what} | {_figure(_found(result['record'], place))} {unit} |\n" for what, place, unit in rows)
    return f"`{result['command']}`, {result['seconds'] / 60:.1f} minutes; medians, and least to most:\n\n| | |\n|---|---|\n{said}"


def _found(record: Any, place: str) -> Any:
    """Keys with dots between them; a slash stands for a dot inside of one."""
    for part in place.split("."):
        record = record[int(part)] if isinstance(record, list) else record[part.replace("/", ".")]
    return record


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        if value["min"] == value["max"]:  # one round
            return _figure(value["median"])
        return f"{_figure(value['median'])} ({_figure(value['min'])} to {_figure(value['max'])})"
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        made = with_figures(PAGE.read_text(), json.loads(BENCHMARKS.read_text()))
    except LookupError as missing:
        sys.exit(f"{BENCHMARKS.name} has no {missing}, which a table needs: run its benchmark again, with what it compares with (`videoseg bench all --help`)")
    partial = PAGE.with_suffix(".partial")
    partial.write_text(made)
    partial.replace(PAGE)
