"""How a reply to the frame sampler's questions is read: an interval, or a position in percent. Pure functions, exact numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

UNITS = ("seconds", "percent", "frames")

_NUMBER = r"(?<![\w.])-?\d{1,9}(?:\.\d{1,9})?(?!\d|\.\d)"
_CLOCK = r"(?<![\w.:])(?:\d{1,3}:)?\d{1,3}:\d{1,2}(?:\.\d{1,9})?"
_UNIT = r"\s*(?:%|per ?cent\b|s(?:ec(?:ond)?s?)?\b)?"


def _quantity(name: str) -> str:
    return rf'"?(?P<{name}>(?:frames?\s*)?(?:{_CLOCK}|{_NUMBER}){_UNIT})"?'


_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf'start\w*"?\s*[:=]\s*{_quantity("a")}\s*[,;]?\s*"?end\w*"?\s*[:=]\s*{_quantity("b")}',
        rf"\[\s*{_quantity('a')}\s*,\s*{_quantity('b')}\s*\]",
        rf"{_quantity('a')}\s*(?:-|–|—|to|until|and)\s*{_quantity('b')}",
    )
)
_PERCENT_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf'(?:percent\w*|position)"?\s*[:=]\s*"?(?P<p>{_NUMBER}\s*%?)',
        rf"(?P<p>{_NUMBER}\s*(?:%|per ?cent\b))",
        rf"^\s*(?P<p>{_NUMBER})\s*\.?\s*$",
    )
)


@dataclass(frozen=True)
class Quantity:
    """A place in a video as a reply names it. `unit` is one of UNITS; None: a bare number."""

    value: Fraction
    unit: str | None


def read_intervals(reply: str) -> list[tuple[Quantity, Quantity]]:
    """The different intervals in a reply, the last one last: those written as start and end (JSON, say), else those in brackets,
    else "3 s to 5 s". Where one end has a unit and the other has none, it is the unit of both."""
    for form in _FORMS:
        if found := [_pair(_read(match["a"]), _read(match["b"])) for match in form.finditer(reply)]:
            return _last_of_each(found)
    return []


def read_percents(reply: str) -> list[tuple[Fraction, bool]]:
    """The different percentages in a reply, the last one last, and for each whether it was written as a fraction of 1: those named
    percent or position, else those with a percent sign, else the number that is the whole reply."""
    for form in _PERCENT_FORMS:
        if found := [_percent(match["p"]) for match in form.finditer(reply)]:
            return _last_of_each(found)
    return []


def _last_of_each(found: list) -> list:
    return list(dict.fromkeys(reversed(found)))[::-1]


def _pair(a: Quantity, b: Quantity) -> tuple[Quantity, Quantity]:
    return Quantity(a.value, a.unit or b.unit), Quantity(b.value, b.unit or a.unit)


def _read(text: str) -> Quantity:
    frame, number, unit = re.fullmatch(r"(frames?)?\s*([-\d.:]+)\s*(.*)", text.strip(), re.IGNORECASE).groups()
    if ":" in number:
        value = Fraction(0)
        for part in number.split(":"):
            value = value * 60 + Fraction(part)
        return Quantity(value, "seconds")
    return Quantity(Fraction(number), "frames" if frame else "seconds" if unit.lower().startswith("s") else "percent" if unit else None)


def _percent(text: str) -> tuple[Fraction, bool]:
    number = re.match(r"[-\d.]+", text)[0]
    value = Fraction(number)
    is_fraction = number == text.strip() and "." in number and 0 < value < 1
    return (value * 100 if is_fraction else value), is_fraction
