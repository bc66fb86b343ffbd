"""Finds the models and data files that a configuration names: as given, then from the checkout's root, then as a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.errors import MissingFileError

ROOT = Path(__file__).resolve().parent.parent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_path(given: str, root: Path = ROOT) -> Path | None:
    """The existing file or folder that `given` names, relative to the current folder or else to the checkout's root."""
    path = Path(given).expanduser()
    for candidate in [path] if path.is_absolute() else [path, root / path]:
        if candidate.exists():
            return candidate
    return None


def resolve_path(given: str, key: str, allow_hub: bool = False, root: Path = ROOT) -> str:
    """What to load for the setting `key`: an existing path, absolute because actors elsewhere have another current folder, or
    `given` itself if it is a model hub's `org/name`.

    Raises MissingFileError naming all that was tried. A name whose first part is a folder here (`data/toy`) is a path
    that is missing, never a hub id.
    """
    found = local_path(given, root)
    if found is not None:
        return str(found.absolute())
    if allow_hub and _HUB_ID.fullmatch(given) and local_path(given.split("/")[0], root) is None:
        return given
    path = Path(given).expanduser()
    tried = [str(path)] if path.is_absolute() else [str(Path.cwd() / path)] + ([str(root / path)] if root != Path.cwd() else [])
    hub = " (nor is it a hub id such as Qwen/Qwen2.5-VL-7B-Instruct)" if allow_hub else ""
    raise MissingFileError(f"{key} = {given!r}: no such file or folder{hub}; tried {', '.join(tried)}", f"set {key}=PATH to one that exists")


def model_folder(given: str, key: str) -> str:
    """The folder of the checkpoint that the setting `key` names; a hub id is downloaded, unless it was before. Raises MissingFileError."""
    found = resolve_path(given, key, allow_hub=True)
    if Path(found).is_dir():
        return found
    from huggingface_hub import snapshot_download

    return snapshot_download(found)


def place_for(given: str, root: Path = ROOT) -> Path:
    """Where to make what `given` names and does not exist yet: below the checkout's root, where a run from any folder
    finds it again; below the current folder if the package is installed without a checkout."""
    path = Path(given).expanduser()
    return root / path if not path.is_absolute() and (root / "setup.cfg").is_file() else path
