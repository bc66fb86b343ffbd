"""What the commands' parsers share."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.errors import UserError


def add_command(commands: Any, name: str, function: Any, example: str, more: str = "") -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=function.__doc__,
        description=function.__doc__,
        epilog=f"{more}\n\nexample: {example}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=function)
    return command


def file_and_overrides(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """CONFIG may be left out, so the first argument is an override if it has an equals sign."""
    given = list(options.settings)
    file = given.pop(0) if given and "=" not in given[0] else None
    stray = [g for g in given if "=" not in g]
    if stray:
        raise UserError(f"'{stray[0]}' is not a setting", "give one CONFIG, then key=value settings without spaces round the equals sign")
    return file, given
