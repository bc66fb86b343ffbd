"""Pages of the site that are made when it is built: the settings from their dataclasses, the recipes, the figures of recorded benchmarks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import configs
from cluster.config import RunConfig
from cluster.config_check import default_of, describe, nested_class, range_text, types_of
from cluster.config_dump import flow_yaml
from cluster.sample_frames import SampleFramesConfig
from reward_service.config import FORMULAS
from reward_service.serve_config import RewardServeConfig
from segmentation_service.serve_config import ServeConfig

DOCS = Path(__file__).resolve().parents[1]

SETTINGS_HEAD = """\
# Configuration

Every setting of `videoseg train`, `sft`, `submit`, `segment` and `eval`, made from the dataclasses that check them. `videoseg config` prints them as a recipe has them, with `auto` filled in for the machine;
a key that is unknown, or a value of another type or out of range, is an error before anything starts. `KEY=VALUE` on the command line changes one; `null` is written so.

The settings of [`videoseg serve segmentation`](#videoseg-serve-segmentation), [`videoseg serve reward`](#videoseg-serve-reward) and [`videoseg sample-frames`](#videoseg-sample-frames) follow.
"""
OTHER_SETTINGS = (
    ("videoseg serve segmentation", ServeConfig, "serve-segmentation."),
    ("videoseg serve reward", RewardServeConfig, "serve-reward."),
    ("videoseg sample-frames", SampleFramesConfig, "sample-frames."),
)
RECIPES_HEAD = """\
# Recipes

A recipe is a YAML file that names the settings which differ from the [defaults](configuration.md), or from the recipe that it extends. `videoseg train NAME` finds these by name; `videoseg config NAME` prints
all settings of one, `videoseg plan NAME` says [what fits where](plan.md). A recipe of your own is a file: `extends: FILE` beside it, and what is different.

"""


def configuration() -> str:
    """Every key of every configuration: type, default, range or choices, help."""
    parts = [SETTINGS_HEAD]
    defaults = RunConfig()
    for field in dataclasses.fields(RunConfig):
        section = getattr(defaults, field.name)
        parts.append(f"## {field.name} {{: #{field.name} }}\n\n{field.metadata['help']}\n\n" + _presets(type(section), field.name) + _entries(type(section), section, f"{field.name}.", ""))
    for command, kind, anchor in OTHER_SETTINGS:
        shared = [f.name for f in dataclasses.fields(kind) if nested_class(types_of(kind)[f.name]) in map(type, vars(defaults).values())]
        note = "".join(f"Its section `{name}` is [that of training](#{name}).\n\n" for name in shared)
        parts.append(f"## {command}\n\n`{command} --show` prints them.\n\n{note}{_entries(kind, kind(), '', anchor, shared)}")
    return "\n".join(parts)


def _entries(kind: type, values: Any, prefix: str, anchor: str, leave_out: Sequence[str] = ()) -> str:
    """The settings of a section with these default values; None: those of the class itself, which is not there by default."""
    text = ""
    for field in (f for f in dataclasses.fields(kind) if f.init and f.name not in leave_out):
        key, of = prefix + field.name, types_of(kind)[field.name]
        value, inner = default_of(field) if values is None else getattr(values, field.name), nested_class(of)
        if not dataclasses.is_dataclass(value):
            text += f"`{key}`{{: #{anchor}{key} }}\n:   {_facts(field, of, value)}\n\n    {_text(field.metadata.get('help', ''))}\n\n"
        if inner is not None:
            text += _entries(inner, value, f"{key}.", anchor)
    return text


def _facts(field: dataclasses.Field, kind: Any, value: Any) -> str:
    choices, source = field.metadata.get("choices"), field.metadata.get("source")
    limits = "one of " + ", ".join(f"`{c}`" for c in choices) if choices else range_text(field.metadata)
    default = "no default" if value is dataclasses.MISSING else f"default `{flow_yaml(value)}`" + (f" ({_text(source)})" if source else "")
    return "; ".join(filter(None, (f"*{_text(describe(kind))}*", limits, default)))


def _presets(kind: type, section: str) -> str:
    """The key that is no field."""
    if not hasattr(kind, "preset"):
        return ""
    names = ", ".join(f"`{name}`" for name in FORMULAS)
    return f"`{section}.preset`{{: #{section}.preset }}\n:   *text*; one of {names}\n\n    Defaults of the whole section are then those of this [published system](rewards.md#formulas-and-presets).\n\n"


def _text(words: str) -> str:
    """Plain words as Markdown, but for the code in them."""
    parts = re.split(r"(`[^`]*`)", " ".join(words.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]{}|])", r"\\\1", part) for part in parts)


def recipes() -> str:
    """Each file of configs/: what its first comment says, what it extends, and itself."""
    table, files = "| recipe | |\n|---|---|\n", ""
    for name in configs.names():
        text = configs.path(name).read_text(encoding="utf-8")
        head = re.match(r"(?:#.*\n)+", text)[0].replace("\n# ", " ").removeprefix("# ")
        first = re.match(r".*?\.(?=\s)", head)[0]
        base = yaml.safe_load(text).get("extends", "").removesuffix(".yaml")
        table += f"| [`{name}`](#{name}) | {_text(first)} |\n"
        files += f"\n## {name} {{: #{name} }}\n\n" + (f"Extends [`{base}`](#{base}).\n\n" if base else "") + f"```yaml\n{text}```\n"
    return RECIPES_HEAD + table + files


BESIDE_TRL = [
    (f"{what}: {side}", f"sides.{place}.{key}", unit)
    for what, key, unit in (("completions a second", "completions_per_second", "completions/s"), ("memory", "peak_gib", "GiB"))
    for side, place in (("ours, synchronous", "ours"), ("TRL", "TRL"))
]

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
# What the page about performance takes from each record of docs/: words, place in the JSON, unit.
RECORDS = {
    "learner-benchmark.json": [
        ("shared prompts without padding against padded rows of one completion", "packing.padded_over_packed", "times as fast"),
        ("the same, tokens a second: ours", "packing.response_tokens_per_second.packed", "response tokens/s"),
        ("the same, tokens a second: padded rows", "packing.response_tokens_per_second.padded", "response tokens/s"),
        ("log-probs in chunks against full logits, width 256", "logprobs.0.chunked_over_plain", "of the peak memory"),
    ],
    "openmp-waiting.json": [
        ("OpenMP's default waiting against ours, beside a busy process", "beside_a_busy_process.default_over_ours", "times the time"),
        ("the same on an idle machine", "idle.default_over_ours", "times the time"),
    ],
    "segmentation-benchmark.json": [
        ("XMem against a plain one, three objects, 240x432", "xmem.three_objects_240x432.plain_over_ours", "times as fast"),
        ("eight hypotheses together against eight runs", "hypotheses.eight_together_over_eight_runs", "of the time"),
        ("SAM2, eight answers about a frame: one call an answer against one call", "sam2.smallest_published_1024.naive_over_ours", "times the time"),
        ("peak memory of tracking, 6,000 frames against 2,500", "length.6000_over_2500.peak_mb", "times as much"),
    ],
    "decoding-benchmark.json": [
        (f"H.264, key frames every 48, {order}: {reader}", f"frames_per_second.h264/mp4.{place}.{reader.lower()}", "frames/s")
        for order, place in (("in order", "sequential"), ("at random", "random"))
        for reader in ("ours", "decord", "OpenCV")
    ],
    "reader-benchmark.json": [
        ("10 million rows: memory after the whole pass", "ten_million.results.after_100_percent_mb", "MB"),
        ("first episode, shuffled: ours", "rates.results.shuffled ours.first_seconds", "s"),
        ("first episode, shuffled: Hugging Face's datasets, streaming", "rates.results.shuffled datasets_stream.first_seconds", "s"),
    ],
    "reward-growth.json": [("rewards of 64 completions of 8 objects, default preset", "completions.of.videoseg_r1.milliseconds.64", "ms")],
    "measures-benchmark.json": [("boundary measure F against the official computation, one object", "f.1_objects.plain_over_ours", "times as fast")],
    "pipeline-benchmark.json": [
        ("one step off: a step over the slower of generation and learning, which take the same", "efficiency.4.step_over_slower", "times the time"),
        ("the same where learning takes twice as long", "efficiency.5.step_over_slower", "times the time"),
        ("controller: pipeline and ledger, 4,096 groups a step", "controller.3.microseconds_a_group", "microseconds a group"),
        ("controller: with calls of eight actors, and rewards", "engines.3.microseconds_a_group", "microseconds a group"),
        ("the calls alone", "engines.3.calls.microseconds_a_group", "microseconds a group"),
        ("the rewards alone, eight completions", "engines.3.rewards.microseconds_a_group", "microseconds a group"),
    ],
    "whole-loop-benchmark.json": [
        ("the toy policy, 16 completions a step, against TRL: synchronous", "times_as_fast_as_trl.ours", "times as fast"),
        ("the same, gradients begun as groups arrive", "times_as_fast_as_trl.ours_on_arrival", "times as fast"),
        ("the same, one step off", "times_as_fast_as_trl.ours_one_step_off", "times as fast"),
        *BESIDE_TRL,
    ],
    "whole-loop-small-benchmark.json": [
        ("22 million weights, prompts of 950 tokens from six frames, against TRL: synchronous", "times_as_fast_as_trl.ours", "times as fast"),
        *BESIDE_TRL,
    ],
    "time-to-reward.json": [
        ("held-out reward that is to be reached", "size.reward", ""),
        ("seconds of training until then: ours, synchronous", "sides.ours.seconds", "s"),
        ("the same: TRL", "sides.TRL.seconds", "s"),
        ("steps: ours", "sides.ours.steps", ""),
        ("steps: TRL", "sides.TRL.steps", ""),
    ],
    "limits-benchmark.json": [
        row
        for size in ("toy", "small")
        for stage in ("engine", "segmenter", "learner", "sync")
        for row in (
            (f"{size}, {stage}: a step has", f"sizes.{size}.stages.{stage}.seconds", "s of it"),
            (f"{size}, {stage}: against what arithmetic and memory allow", f"sizes.{size}.stages.{stage}.times_its_limit", "times the time"),
        )
    ],
    "generation-benchmark.json": OVERHEAD,
    "generation-small-benchmark.json": OVERHEAD,
    "weight-sync-benchmark.json": SYNC,
    "weight-sync-small-benchmark.json": SYNC,
    "start-up.json": [
        ("first start, with empty caches: until the first answers are there", "first.at.first group answered", "s"),
        ("the start after it", "second.at.first group answered", "s"),
        *((f"of the first: {event}, after", f"first.took.{event}", "s") for event in START_UP),
    ],
    "scaling-benchmark.json": [
        ("the stage that grows fastest with what is asked of it: exponent", "largest.exponent.value", ""),
        *((f"a step against {what}: exponent of the last doubling", f"sizes.{size}.step.exponent_of_the_last_doubling", "") for size, what in (("completions", "completions of a group"), ("frames", "frames of the video"), ("objects", "objects"), ("shown", "frames of the prompt"))),
    ],
    "simulator-benchmark.json": [("largest error of six predicted step times", "largest_error", "of the measured time")],
    "evaluation-benchmark.json": [("scoring a video benchmark against the way of the official evaluators", "plain_over_ours", "times as fast")],
}


def with_figures(markdown: str) -> str:
    """The page about performance with tables of recorded figures in place of its comments."""
    return re.sub(r"<!-- figures of (\S+) -->", lambda found: _figures(found[1]), markdown)


def _figures(name: str) -> str:
    record = json.loads((DOCS / name).read_text())
    machine = (record if "machine" in record else next(iter(record.values())))["machine"]
    rows = "".join(f"| {what} | {_figure(_found(record, place))} {unit} |\n" for what, place, unit in RECORDS[name])
    return f"[{name}]({name}): {machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; medians, and least to most.\n\n| | |\n|---|---|\n{rows}"


def _found(record: Any, place: str) -> Any:
    """Keys with dots between them; a slash stands for a dot inside of one."""
    for part in place.split("."):
        record = record[int(part)] if isinstance(record, list) else record[part.replace("/", ".")]
    return record


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_figure(value['median'])} ({_figure(value['min'])} to {_figure(value['max'])})"
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
