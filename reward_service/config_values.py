"""RewardConfig out of plain values, such as the JSON of a request: nothing unknown, nothing of a wrong type."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from reward_service.config import RewardConfig
from reward_service.score_request import nearest


def reward_config(preset: str | None, values: Mapping[str, Any] | None, otherwise: RewardConfig) -> RewardConfig:
    """The preset, or else `otherwise`, with `values` (nested as the dataclass is) in place of its own.

    Raises ValueError on an unknown preset, an unknown key (with the nearest one) or a value of a wrong type or range.
    """
    base = otherwise if preset is None else RewardConfig.preset(preset)
    return _replaced(base, values, "reward") if values else base


def _replaced(config: Any, values: Mapping[str, Any], path: str) -> Any:
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    kinds = typing.get_type_hints(type(config))
    changed = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{path}.{str(key)[:80]}: unknown key; {nearest(str(key)[:80], known)}")
        if key == "own_terms":
            raise ValueError(f"{path}.own_terms names code to run, which a request may not; set it where the service is started")
        if is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}.{key} has settings of its own ({', '.join(f.name for f in fields(known[key]))}); got {str(value)[:80]!r}")
            changed[key] = _replaced(known[key], value, f"{path}.{key}")
        else:
            changed[key] = _typed(kinds[key], value, f"{path}.{key}")
    return replace(config, **changed)


def _typed(kind: Any, value: Any, path: str) -> Any:
    options = typing.get_args(kind) or (kind,)
    if type(value) is int and float in options:
        value = float(value)
    if type(value) not in options or value != value:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
        raise ValueError(f"{path}={str(value)[:80]!r}: must be {' or '.join(names[option] for option in options)}")
    return value
