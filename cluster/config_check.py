"""Checks plain values against dataclasses: unknown keys, types, ranges, choices; every problem is collected, none hides another.

The packages describe their settings as dataclasses whose fields carry `metadata={"help", "min", "max", "choices"}`
(`above` and `below` are bounds that the value may not equal). A class with a classmethod `preset(name)` also takes the key
`preset`, which is no field: the values' defaults are then those of that preset.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where a value came from: `where` is `file:line` or the override as typed; `text` is an override's raw value."""

    where: str
    text: str | None = None


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration, as one line for the person who wrote it."""

    key: str
    message: str
    remedy: str = ""
    where: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.key}: {self.message}" + (f"; {self.remedy}" if self.remedy else "")


class _WrongType(Exception):
    """The value is not of the field's type; the text says what was expected."""


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """Field name -> type of a dataclass, with annotations that are written as text evaluated."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def nested_class(kind: Any) -> type | None:
    """The dataclass inside `kind` (itself, or `Optional` of it), or None for a leaf."""
    options = [o for o in typing.get_args(kind) if o is not type(None)] if _is_union(kind) else [kind]
    return options[0] if len(options) == 1 and is_dataclass(options[0]) else None


def default_of(field: dataclasses.Field) -> Any:
    """The field's default value, or MISSING."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def leaf_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted key of every setting below `cls`, in order of declaration."""
    for name, kind in types_of(cls).items():
        inner = nested_class(kind)
        if inner is None:
            yield prefix + name
        else:
            yield from leaf_keys(inner, f"{prefix}{name}.")


def nearest_key(key: str, root: type) -> str | None:
    """The valid key that `key` most probably stands for: first within its section, then the same name elsewhere."""
    keys = list(leaf_keys(root))
    sections = sorted({k[: k.rfind(".")] for k in keys if "." in k} | {k.split(".")[0] for k in keys})
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys + sections if k.rpartition(".")[0] == section}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return siblings[close[0]]
    same_name = [k for k in keys if k.rpartition(".")[2] == name]
    if same_name:
        return same_name[0]
    return next(iter(difflib.get_close_matches(key, keys + sections, n=1, cutoff=0.7)), None)


def build(
    cls: type, values: Mapping[str, Any], sources: Mapping[str, Source], root: type | None = None, prefix: str = ""
) -> tuple[Any, list[Problem]]:
    """Make a `cls` from plain values (nested mappings); returns it with every problem found.

    A value that is wrong is replaced by its default, so that the rest can be checked too: use the result only if the
    list is empty. It is None if the class cannot be made at all. `sources` maps dotted keys to where they were set.
    """
    root = root or cls
    problems: list[Problem] = []

    def problem(key: str, message: str, remedy: str = "") -> None:
        problems.append(Problem(key, message, remedy, source_of(key, sources).where))

    kinds = types_of(cls)
    for name, value in values.items():
        if name not in kinds and not (name == "preset" and _has_presets(cls)):
            problems += _unknown(f"{prefix}{name}", value, kinds, root, sources)
    base = _preset(cls, values, prefix, problem)
    made: dict[str, Any] = {}
    for field in fields(cls):
        if not field.init:
            continue
        key, kind = prefix + field.name, kinds[field.name]
        default = getattr(base, field.name) if base is not None else default_of(field)
        inner = nested_class(kind)
        if inner is kind and values.get(field.name, ...) is None:
            values = {**values, field.name: {}}  # a section whose keys are all commented out
        if field.name not in values:
            if default is MISSING:
                problem(key, "must be set", field.metadata.get("help", ""))
            else:
                made[field.name] = default
            continue
        value = values[field.name]
        if inner is not None and isinstance(value, Mapping):
            if base is not None and is_dataclass(default):
                value = {**dataclasses.asdict(default), **value}
            section, found = build(inner, value, sources, root, f"{key}.")
            problems += found
            made[field.name] = default if section is None and default is not MISSING else section
            continue
        try:
            made[field.name] = _checked(kind, value, field.metadata, source_of(key, sources).text)
        except (_WrongType, ValueError) as error:
            problem(key, str(error))
            if default is not MISSING:
                made[field.name] = default
    try:
        return cls(**made), problems
    except TypeError:
        if not problems:
            raise
        return None, problems
    except ValueError as error:  # the dataclass's own __post_init__
        problem(*named_key(str(error), root, prefix.rstrip(".") or "configuration"), getattr(error, "remedy", ""))
        return None, problems


def named_key(text: str, root: type, otherwise: str) -> tuple[str, str]:
    """A message that begins with a setting's key (`learner.lr = 0 …`, `learner.lr: …`) as (key, rest)."""
    match = re.match(r"(\w+(?:\.\w+)+)\s*[:=]?\s*", text)
    return (match[1], text[match.end() :]) if match and match[1] in leaf_keys(root) else (otherwise, text)


def source_of(key: str, sources: Mapping[str, Source]) -> Source:
    """Where `key`, or else the nearest section round it, was set."""
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0]
    return Source("")


def _has_presets(cls: type) -> bool:
    return callable(getattr(cls, "preset", None))


def _preset(cls: type, values: Mapping[str, Any], prefix: str, problem: Any) -> Any:
    if "preset" not in values or not _has_presets(cls):
        return None
    try:
        return cls.preset(values["preset"])
    except (KeyError, ValueError, TypeError) as error:
        problem(f"{prefix}preset", str(error.args[0]) if error.args else str(error), getattr(error, "remedy", ""))
        return None


def _unknown(key: str, value: Any, kinds: Mapping[str, Any], root: type, sources: Mapping[str, Source]) -> list[Problem]:
    """One problem for the key; or one for each key in it, if it is a section that resembles none of ours."""
    nearest = nearest_key(key, root)
    if nearest is None and isinstance(value, Mapping) and value:
        return [p for name, inner in value.items() for p in _unknown(f"{key}.{name}", inner, kinds, root, sources)]
    remedy = f"did you mean {nearest}?" if nearest else f"the keys here are {', '.join(kinds)}"
    return [Problem(key, "unknown key", remedy, source_of(key, sources).where)]


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _checked(kind: Any, value: Any, metadata: Mapping[str, Any], text: str | None) -> Any:
    """`value` as a `kind` within the field's bounds and choices; raises _WrongType or ValueError with the reason."""
    typed = _as_type(kind, value, text)
    for item in typed if isinstance(typed, (list, tuple)) else [typed]:
        _check_bounds(item, metadata)
    return typed


def _check_bounds(value: Any, metadata: Mapping[str, Any]) -> None:
    choices = metadata.get("choices")
    if choices and value is not None and value not in choices:
        close = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{_show(value)} is not one of {', '.join(_show(c) for c in choices)}{hint}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if math.isnan(value):
        raise ValueError("must be a number, got nan")
    low, high, above, below = (metadata.get(k) for k in ("min", "max", "above", "below"))
    outside = (low is not None and value < low) or (high is not None and value > high)
    if outside or (above is not None and value <= above) or (below is not None and value >= below):
        raise ValueError(f"{_show(value)} is out of range, allowed is {range_text(metadata)}")


def range_text(metadata: Mapping[str, Any]) -> str:
    """The allowed range in words: `0 .. 1`, `at least 2`, `above 0 and at most 1`; empty if there is none."""
    low, high, above, below = (metadata.get(k) for k in ("min", "max", "above", "below"))
    if low is not None and high is not None:
        return f"{_show(low)} .. {_show(high)}"
    parts = [f"above {_show(above)}" if above is not None else "", f"at least {_show(low)}" if low is not None else ""]
    parts += [f"below {_show(below)}" if below is not None else "", f"at most {_show(high)}" if high is not None else ""]
    return " and ".join(p for p in parts if p)


def _as_type(kind: Any, value: Any, text: str | None = None) -> Any:
    """`value` as a `kind`; whole floats pass as int, ints as float; `text`, an override as typed, passes for text."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if _is_union(kind):
        for option in args:
            # An exact match first, so that `int | str` keeps 3 a number and `float | None` keeps None.
            if option in (int, float, bool, str, type(None)) and type(value) is option:
                return value
        for option in args:
            try:
                return _as_type(option, value, text)
            except _WrongType:
                continue
    elif kind is type(None) and value is None:
        return None
    elif origin is typing.Literal:
        if value in args:
            return value
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        return _as_sequence(origin, args, value, kind)
    elif origin is dict and isinstance(value, Mapping):
        return {_as_type(args[0], k): _as_type(args[1], v) for k, v in value.items()}
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is int and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value == int(value):
        return int(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is str and isinstance(value, str):
        return value
    elif kind is str and text is not None and isinstance(value, (int, float)):
        return text
    elif is_dataclass(kind) and isinstance(value, Mapping):
        made, problems = build(kind, value, {})
        if problems:
            raise ValueError("; ".join(str(p) for p in problems))
        return made
    raise _WrongType(f"{_show(value)} is not {describe(kind)}" + (" (write it in quotes)" if kind is str and value is not None else ""))


def _as_sequence(origin: Any, args: tuple[Any, ...], value: Any, kind: Any) -> Any:
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        return origin(_as_type(args[0], v) for v in value)
    if len(args) != len(value):
        raise _WrongType(f"{_show(list(value))} is not {describe(kind)}")
    return tuple(_as_type(a, v) for a, v in zip(args, value, strict=True))


def describe(kind: Any) -> str:
    """A type in words: `a whole number`, `a list of numbers`, `text or null`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null", Any: "any value"}
    if _is_union(kind):
        return " or ".join(describe(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(_show(a) for a in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list ({describe(args[0])} each)"
    if origin is tuple:
        return f"a list of {len(args)} ({', '.join(describe(a) for a in args)})"
    if origin is dict:
        return f"a section of {describe(args[1])} values"
    return words.get(kind) or (f"a section ({', '.join(types_of(kind))})" if is_dataclass(kind) else str(kind))


def _show(value: Any) -> str:
    """A value as the person would write it in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, (int, list)) else f"'{value}'"
