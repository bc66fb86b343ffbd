"""Checkpoint folders: `step_NNNNNN`, made under another name and renamed, listed in a manifest, the newest k kept.

What is inside a checkpoint is its writers' affair; here every file in it gets its size and SHA-256 into `manifest.json`,
so that a truncated or altered checkpoint is found before anything is loaded from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `manifest` is what `commit` wrote, with the caller's `extra` under its own names."""

    step: int
    path: Path
    manifest: Mapping[str, Any]


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def begin(folder: str | Path, step: int) -> Path:
    """An empty folder with a temporary name, into which every writer (all ranks) puts its files before `commit`."""
    temporary = Path(folder) / f".{checkpoint_name(step)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, step: int, extra: Mapping[str, Any] | None = None) -> Checkpoint:
    """Write the manifest, make everything durable, then give the folder its name; replaces a checkpoint of that step.

    `extra` (JSON values: fingerprints, versions, data position) is kept in the manifest.
    """
    files = [p for p in sorted(temporary.rglob("*")) if p.is_file()]
    if not files:
        raise CheckpointError(f"nothing was written for the checkpoint of step {step} in {temporary}", "this is a defect: report it")
    listed = [{"path": p.relative_to(temporary).as_posix(), "bytes": p.stat().st_size, "sha256": file_hash(p)} for p in files]
    manifest = {**(extra or {}), "format": FORMAT, "step": step, "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "files": listed}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in [*files, temporary / MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        flush_to_disk(path)
    final = temporary.parent / checkpoint_name(step)
    if final.exists():
        replaced = final.with_name(f".{final.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
        os.rename(temporary, final)
        shutil.rmtree(replaced)
    else:
        os.rename(temporary, final)
    flush_to_disk(final.parent)
    return Checkpoint(step, final, manifest)


@contextmanager
def writing(folder: str | Path, step: int, extra: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """`begin`, the caller's writes, `commit`; if the caller fails, nothing is left behind."""
    temporary = begin(folder, step)
    try:
        yield temporary
        commit(temporary, step, extra)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(path: str | Path, hashes: bool = True) -> Checkpoint:
    """The checkpoint at `path`, every file compared with the manifest; raises CheckpointError naming the file at fault."""
    path = Path(path)
    remedy = "delete that folder and resume from the one before it"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, listed = int(manifest["step"]), manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable {MANIFEST} ({error})", remedy) from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {manifest.get('format')}, this version reads {FORMAT}", "use the version that wrote it")
    for entry in listed:
        file = path / entry["path"]
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {entry['path']}", remedy)
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"checkpoint {path}: {entry['path']} has {file.stat().st_size} bytes instead of {entry['bytes']}", remedy)
        if hashes and file_hash(file) != entry["sha256"]:
            raise CheckpointError(f"checkpoint {path}: {entry['path']} is not what was written (SHA-256 differs)", remedy)
    return Checkpoint(step, path, manifest)


def check_policy(checkpoint: Checkpoint, path: str, fingerprint: str) -> None:
    """Raises CheckpointError where the policy's files at `path` are not those that the run began from: a checkpoint holds no frozen weights and no tokenizer."""
    if checkpoint.manifest.get("policy", fingerprint) != fingerprint:
        raise CheckpointError(f"policy.path = {path}: its files are not those that {checkpoint.path} was trained from", "restore them, or start a new run")


def steps(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every finished checkpoint below `folder`, oldest first; nothing is opened."""
    matches = [(_NAME.fullmatch(p.name), p) for p in Path(folder).iterdir()] if Path(folder).is_dir() else []
    return sorted((int(m[1]), p) for m, p in matches if m and p.is_dir())


def latest(folder: str | Path, hashes: bool = True) -> tuple[Checkpoint, list[CheckpointError]]:
    """The newest checkpoint that is whole, with the reasons why newer ones were passed over.

    Raises CheckpointError if there is none.
    """
    rejected: list[CheckpointError] = []
    for _, path in reversed(steps(folder)):
        try:
            return load(path, hashes), rejected
        except CheckpointError as error:
            rejected.append(error)
    reasons = "".join(f"\n  {e}" for e in rejected)
    raise CheckpointError(f"there is no usable checkpoint in {folder}{reasons}", "start a new run with `videoseg train`")


def keep_last(folder: str | Path, keep: int, protect: tuple[int, ...] = ()) -> list[int]:
    """Delete all but the newest `keep` checkpoints (and those of the steps in `protect`); returns the steps deleted.

    Left-overs of interrupted writes and deletions go too. `keep` must be at least 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    deleted = []
    for step, path in steps(folder)[:-keep]:
        if step not in protect:
            # Renamed first: a deletion that is cut short must not leave half a checkpoint under a good name.
            doomed = path.with_name(f".{path.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            deleted.append(step)
    for path in Path(folder).glob(".step_*"):
        if path.suffix in (".old", ".tmp"):
            shutil.rmtree(path, ignore_errors=True)
    return deleted


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Writes the whole file anew, durably: whoever reads it meanwhile sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush_to_disk(temporary)
    os.replace(temporary, path)


def flush_to_disk(path: str | Path) -> None:
    """fsync a file or a folder, so that a rename which follows never shows an empty file after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
