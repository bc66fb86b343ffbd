"""Writes a configuration as YAML with every key's meaning beside it, and as a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from cluster.config_check import range_text

_PLAIN_WORD = re.compile(r"[A-Za-z_][\w./-]*")


def dump_yaml(config: Any, comments: bool = True, title: str = "") -> str:
    """A dataclass of settings as YAML that reads back to an equal one; with `comments`, each key's help and range follow it."""
    lines = [f"# {line}" for line in title.splitlines()]
    for field, value in _settings(config):
        if dataclasses.is_dataclass(value):
            lines += ([""] if lines else []) + _section_comment(field, comments)
        lines += _lines(field, value, comments, "")
    return "\n".join(lines) + "\n"


def fingerprint(config: Any, leave_out: tuple[str, ...] = ("run.name", "run.dir")) -> str:
    """SHA-256 (hex) over all settings but those in `leave_out`, the same in every process and on every machine."""
    values = _plain(config)
    for key in leave_out:
        *sections, name = key.split(".")
        inner = values
        for section in sections:
            inner = inner.get(section, {})
        inner.pop(name, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _settings(config: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    return ((f, getattr(config, f.name)) for f in dataclasses.fields(config) if f.init)


def _section_comment(field: dataclasses.Field, comments: bool) -> list[str]:
    return [f"# {field.metadata['help']}"] if comments and field.metadata.get("help") else []


def _lines(field: dataclasses.Field, value: Any, comments: bool, indent: str) -> list[str]:
    if dataclasses.is_dataclass(value):
        inner = [line for f, v in _settings(value) for line in _lines(f, v, comments, indent + "  ")]
        return [f"{indent}{field.name}:", *inner] if inner else [f"{indent}{field.name}: {{}}"]
    note = _note(field) if comments else ""
    return [f"{indent}{field.name}: {flow_yaml(value)}" + (f"  # {note}" if note else "")]


def _note(field: dataclasses.Field) -> str:
    """The help of a field, with its choices or range."""
    choices, allowed = field.metadata.get("choices"), range_text(field.metadata)
    limits = "one of " + ", ".join(str(c) for c in choices) if choices else allowed
    text = " ".join(str(field.metadata.get("help", "")).split())
    return f"{text} [{limits}]".strip() if limits else text


def flow_yaml(value: Any) -> str:
    """A value in YAML's flow style, on one line, in a form that OmegaConf reads back as the same value."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow_yaml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow_yaml(k)}: {flow_yaml(v)}" for k, v in value.items()) + "}"
    if dataclasses.is_dataclass(value):
        return flow_yaml({f.name: v for f, v in _settings(value)})
    # Quoted unless it is a plain word: OmegaConf takes more spellings for numbers than YAML's own writer knows (1e-6).
    style = None if not isinstance(value, str) or _PLAIN_WORD.fullmatch(value) else '"'
    if isinstance(value, str):
        value = value.replace("${", "\\${")
    text = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    """Nested dictionaries, lists and scalars, as JSON has them; a float that is whole stays distinct from an int."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(v) for f, v in _settings(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
