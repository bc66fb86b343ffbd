"""report.json of a data set that a command makes: from what, so that only the same command goes on with it, and what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from rollout.episodes import DataError

REPORT = "report.json"


def write_report(folder: Path, content: Mapping) -> None:
    """Writes the folder's report to a temporary name and renames it."""
    temporary = folder / f".{REPORT}.{os.getpid()}"
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, folder / REPORT)


def read_report(folder: Path, settings: Mapping, made_by: str) -> dict:
    """The folder's report. Raises DataError where `made_by`, such as "import", did not make the folder, or did so with other settings."""
    file = folder / REPORT
    if not file.exists():
        raise DataError(f"{folder} is there and was not made by an {made_by}; give another folder")
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if changed:
        was = ", ".join(f"{key} was {before.get(key)}, is {settings[key]}" for key in changed)
        raise DataError(f"{folder} is of another {made_by} ({was}); remove it or give another folder")
    return before
