"""Targets as other RL stacks carry them: one label a prompt, as JSON text or as a mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reward_service.score_request import MalformedItem


def labelled(completion: str, label: Any, **values: Any) -> dict[str, Any] | MalformedItem:
    """The item of a completion and its label: a target, or an item without its completion, {"target": ..., "difficulty": ..., ...}.

    values: more fields of the item; those that are None are left out. A label that is neither makes a malformed item.
    """
    try:
        found = json.loads(label) if isinstance(label, (str, bytes)) else label
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        return MalformedItem(reason=f"the label is not the JSON of a target: {str(label)[:80]!r}")
    item = dict(found) if "target" in found else {"target": found}
    return {**item, **{key: value for key, value in values.items() if value is not None}, "completion": completion}
