"""Pages of the site that are made when it is built: the settings from their dataclasses, and the recipes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
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
