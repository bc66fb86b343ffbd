"""The recipes that come with the project: one YAML file each, found by name wherever the package is installed."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """The recipes' names, without `.yaml`."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def path(name: str) -> Path | None:
    """The file of a recipe named `debug`, `debug.yaml` or `configs/debug.yaml`; None if there is no such recipe."""
    parts = Path(name).parts
    if len(parts) == 2 and parts[0] == FOLDER.name:
        parts = parts[1:]
    if len(parts) != 1:
        return None
    found = FOLDER / (parts[0] if parts[0].endswith(".yaml") else f"{parts[0]}.yaml")
    return found if found.is_file() else None
