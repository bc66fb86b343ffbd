"""SHA-256 of files. Those of large files are remembered by size and time of change, so that a resumed run does not read them again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LARGE = 2**30


def file_hashes(files: Iterable[Path], large: int = LARGE) -> dict[Path, bytes]:
    """The SHA-256 of each file, eight files at a time. Files of at least `large` bytes are looked up and noted in `memory()`."""
    distinct = list(dict.fromkeys(files))
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(distinct, pool.map(lambda file: _hash(file, large), distinct)))


def memory() -> Path:
    """The folder with the remembered hashes, one small file each."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videoseg-r1" / "file-hashes"


def _hash(file: Path, large: int) -> bytes:
    state = file.stat()
    if state.st_size < large:
        return _read(file)
    known = [str(file.resolve()), state.st_size, state.st_mtime_ns]
    note = memory() / (hashlib.sha256(known[0].encode()).hexdigest()[:32] + ".json")
    if note.exists() and (noted := json.loads(note.read_text(encoding="utf-8")))["file"] == known:
        return bytes.fromhex(noted["sha256"])
    print(f"hashing {file} ({state.st_size / 2**30:.1f} GiB, once)", file=sys.stderr, flush=True)
    digest = _read(file)
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"file": known, "sha256": digest.hex()}), encoding="utf-8")
    os.replace(partial, note)
    return digest


def _read(file: Path) -> bytes:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
