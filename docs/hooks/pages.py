"""Pages of the site that are made when it is built: the settings from their dataclasses, the recipes, the figures of recorded benchmarks."""

from __future__ import annotations

import dataclasses
import json
import re
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


def _entries(kind: type, values: Any, prefix: str, anchor: str, leave_out: list[str] | tuple[str, ...] = ()) -> str:
    text = ""
    for field, inner in ((f, nested_class(types_of(kind)[f.name])) for f in dataclasses.fields(kind) if f.init and f.name not in leave_out):
        key, value = prefix + field.name, getattr(values, field.name)
        if inner is not None and dataclasses.is_dataclass(value):
            text += _entries(inner, value, f"{key}.", anchor)
        else:
            text += f"`{key}`{{: #{anchor}{key} }}\n:   {_facts(field, types_of(kind)[field.name], value)}\n\n    {_text(field.metadata.get('help', ''))}\n\n"
    return text


def _facts(field: dataclasses.Field, kind: Any, value: Any) -> str:
    choices, source = field.metadata.get("choices"), field.metadata.get("source")
    limits = "one of " + ", ".join(f"`{c}`" for c in choices) if choices else range_text(field.metadata)
    return "; ".join(filter(None, (f"*{_text(describe(kind))}*", limits, f"default `{flow_yaml(value)}`" + (f" ({_text(source)})" if source else ""))))


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


# Per record of docs/: the command that makes it, and what the page about performance takes from it (words, place in the JSON, unit).
RECORDS: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "learner-benchmark.json": (
        "videoseg bench learning --json docs/learner-benchmark.json",
        (
            ("shared prompts without padding against padded rows of one completion", "packing.padded_over_packed", "times as fast"),
            ("the same, tokens a second: ours", "packing.response_tokens_per_second.packed", "response tokens/s"),
            ("the same, tokens a second: padded rows", "packing.response_tokens_per_second.padded", "response tokens/s"),
            ("log-probs in chunks against full logits, width 256", "logprobs.0.chunked_over_plain", "of the peak memory"),
        ),
    ),
    "segmentation-benchmark.json": (
        "videoseg bench segmentation --json docs/segmentation-benchmark.json",
        (
            ("XMem against a plain one, three objects, 240x432", "xmem.three_objects_240x432.plain_over_ours", "times as fast"),
            ("eight hypotheses together against eight runs", "hypotheses.eight_together_over_eight_runs", "of the time"),
            ("SAM2, eight answers about a frame: one call an answer against one call", "sam2.smallest_published_1024.naive_over_ours", "times the time"),
            ("peak memory of tracking, 6,000 frames against 2,500", "length.6000_over_2500.peak_mb", "times as much"),
        ),
    ),
    "decoding-benchmark.json": (
        "videoseg bench decoding --json docs/decoding-benchmark.json",
        tuple(
            (f"H.264, key frames every 48, {order}: {reader}", f"frames_per_second.h264\\.mp4.{order}.{key}", "frames/s")
            for order in ("sequential", "random")
            for reader, key in (("ours", "ours"), ("decord", "decord"), ("OpenCV", "opencv"))
        ),
    ),
    "reader-benchmark.json": (
        "python benchmarks/reader.py --peer-python PEER/bin/python --json docs/reader-benchmark.json",
        (
            ("10 million rows: memory after the whole pass", "ten_million.results.after_100_percent_mb", "MB"),
            ("first episode, shuffled: ours", "rates.results.shuffled ours.first_seconds", "s"),
            ("first episode, shuffled: datasets, streaming", "rates.results.shuffled datasets_stream.first_seconds", "s"),
        ),
    ),
    "evaluation-benchmark.json": (
        "videoseg bench evaluation --json docs/evaluation-benchmark.json",
        (("scoring a video benchmark against the way of the official evaluators", "plain_over_ours", "times as fast"),),
    ),
    "measures-benchmark.json": (
        "videoseg bench measures --json docs/measures-benchmark.json",
        (("boundary measure F against the official computation, one object", "f.1_objects.plain_over_ours", "times as fast"),),
    ),
    "reward-growth.json": (
        "videoseg bench reward_growth --json docs/reward-growth.json",
        (("rewards of 64 completions of 8 objects, default preset", "completions.of.videoseg_r1.milliseconds.64", "ms"),),
    ),
    "openmp-waiting.json": (
        "videoseg bench openmp_waiting --json docs/openmp-waiting.json",
        (
            ("OpenMP's default waiting against ours, beside a busy process", "beside_a_busy_process.default_over_ours", "times the time"),
            ("the same on an idle machine", "idle.default_over_ours", "times the time"),
        ),
    ),
}


def with_records(markdown: str) -> str:
    """The page about performance with a table of the recorded figures in place of its comment."""
    return markdown.replace("<!-- records -->", "\n".join(_record(*given) for given in RECORDS.items()))


def _record(name: str, given: tuple[str, tuple[tuple[str, str, str], ...]]) -> str:
    record, (command, rows) = json.loads((DOCS / name).read_text()), given
    machine = _found(record, "machine") if "machine" in record else next(iter(record.values()))["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    table = "".join(f"| {what} | {_figure(_found(record, place))} {unit} |\n" for what, place, unit in rows)
    return f"```sh\n{command}\n```\n\n[{name}]({name}); {where}.\n\n| | median (least to most) |\n|---|---|\n{table}"


def _found(record: Any, place: str) -> Any:
    for part in re.split(r"(?<!\\)\.", place):
        record = record[int(part)] if isinstance(record, list) else record[part.replace("\\.", ".")]
    return record


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:,g} ({value['min']:,g} to {value['max']:,g})"
    return f"{value:,g}"
