"""Reward terms of one's own: functions of an answer and its target, named in the configuration and added to whatever preset is used."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

from reward_service.answer import Answer
from reward_service.target import Target

Term = Callable[[Answer, Target], float]
_NAME = re.compile(r"[A-Za-z_][\w.]*:([A-Za-z_]\w*)")


@dataclass
class OwnTerm:
    """`function`: "package.module:name" of a `Term`, which gives 0..1 for every answer, however malformed. It is imported where rewards are computed, and only there.

    Raises ValueError for another form, or a weight below 0.
    """

    function: str = field(metadata={"help": "package.module:name of a function (answer, target) -> 0..1; the term is called by that name."})
    weight: float = field(default=1.0, metadata={"help": "Its weight.", "min": 0.0})

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.function):
            raise ValueError(f"own term {self.function!r} is not of the form package.module:function")
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"own term {self.function}: weight {self.weight!r} must be at least 0")

    def check(self) -> None:
        """Raises ValueError where the function is not there: known before anything is scored."""
        _imported(self.function)

    @property
    def name(self) -> str:
        return self.function.rpartition(":")[2]

    def __call__(self, answer: Answer, target: Target) -> float:
        """Raises ValueError where the function is not there, or does not give a number from 0 to 1."""
        value = _imported(self.function)(answer, target)
        if isinstance(value, str) or not 0.0 <= float(value) <= 1.0:
            raise ValueError(f"own term {self.function} gave {value!r}; it must be a number from 0 to 1")
        return float(value)


@cache
def _imported(function: str) -> Term:
    module, _, name = function.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"own term {function} cannot be imported ({error}); is its folder on PYTHONPATH, or its package installed?") from error
    if not callable(found):
        raise ValueError(f"own term {function} is no function")
    return found
