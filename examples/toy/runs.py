"""`videoseg` as a command, and runs that go on where they were cut short."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def videoseg(*words: str) -> None:
    """Raises CalledProcessError where it does not end with 0."""
    print(f"--- videoseg {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "cluster.cli", *words], check=True)


def run_to_its_end(folder: Path, *begin: str) -> None:
    """Resumes the run in `folder`, or begins it with the words `begin` where it has no checkpoint."""
    if list((folder / "checkpoints").glob("step_*")):
        videoseg("resume", str(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)  # interrupted before its first checkpoint
        videoseg(*begin, f"run.dir={folder.parent}", f"run.name={folder.name}")
