"""A run as a job of a Ray cluster: checked here, sent to the cluster's job server, its log streamed until the end.

What is sent is a command line (`videoseg train …` or `videoseg resume …`) and environment variables, and a copy of a folder only where one
is asked for. The command runs on the head node, in a folder of Ray's own, with what is installed there; so every path in it is absolute,
and must lead to the same files on every node (docs/cluster.md).
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import configs
from cluster import config, config_files, paths, run_folder
from cluster.config_dump import flow_yaml
from cluster.config_file import find_recipe
from cluster.errors import ConfigError, MissingFileError, UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CHECKPOINT_SECONDS = 600
"""How long the checkpoint of a stopped job may take, after `loop.grace_seconds`, before Ray kills it. Ray's own limit is 3 seconds."""
NOT_SENT = ["/runs/", "/data/"]  # of a working directory, besides what Ray and .gitignore leave out: they are used where they are
EXAMPLES = paths.ROOT / "examples"  # part of every checkout: a node uses its own


@dataclass(frozen=True)
class Job:
    """A command line of ours as a job. `run` is the run's folder; `stop_seconds` lie between `ray job stop` and the kill."""

    id: str
    command: Sequence[str]
    run: Path
    stop_seconds: int = CHECKPOINT_SECONDS
    env: Mapping[str, str] = field(default_factory=dict)
    working_dir: str | None = None
    notes: Sequence[str] = ()

    @property
    def entrypoint(self) -> str:
        """For the head node's shell: the installation in the place of this one if it has one there, else what its PATH finds."""
        return f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH {shlex.join(['videoseg', *self.command])}"

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment. Its limit for a stopped job is an environment variable that the job's supervisor reads."""
        copied = {"working_dir": self.working_dir, "excludes": NOT_SENT} if self.working_dir else {}
        return {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_seconds), **self.env}, **copied}


def training_job(recipe: str, overrides: Sequence[str], working_dir: str | None, name: str | None, env: Mapping[str, str]) -> Job:
    """`videoseg train RECIPE OVERRIDES` as a job, with the run's name decided and its paths made absolute.

    Raises what `videoseg train` raises for settings, for the run's name and for relative paths that are not there. An absolute path that
    is not here may be on the nodes, and is noted.
    """
    settings = config.load(recipe, overrides)
    _refuse_address(settings)
    task = "-sft" if settings.run.task == "sft" else ""
    folder = run_folder.plan(Path(settings.run.dir).expanduser().absolute(), settings.run.name, settings.run.recipe + task)
    changed, notes = absolute_paths(settings)
    decided = {**changed, "run.dir": str(folder.path.parent), "run.name": folder.name}
    kept = [o for o in overrides if o.partition("=")[0] not in decided]
    command = ["train", _recipe_on_nodes(recipe, working_dir), *kept, *(f"{key}={value}" for key, value in decided.items())]
    notes += [f"{key} is made absolute: {value}" for key, value in changed.items()]
    return Job(name or folder.name, command, folder.path, _stop_seconds(settings), env, working_dir, notes)


def resuming_job(run: str, overrides: Sequence[str], working_dir: str | None, name: str | None, env: Mapping[str, str]) -> Job:
    """`videoseg resume RUN OVERRIDES` as a job. A run that this machine does not see must be given by its absolute path."""
    path, stop_seconds, notes = Path(run), CHECKPOINT_SECONDS, []
    if path.is_absolute() and not path.exists():
        notes.append(f"this machine does not see {path}: the nodes must")
    else:
        folder = run_folder.find(run)
        settings, _ = config.load_for_resume(folder.config, overrides)
        _refuse_address(settings)
        path, stop_seconds = folder.path.absolute(), _stop_seconds(settings)
    job_id = name or f"{path.name}-resumed-{time.strftime('%Y%m%d-%H%M%S')}"
    return Job(job_id, ["resume", str(path), *overrides], path, stop_seconds, env, working_dir, notes)


def absolute_paths(settings: config.RunConfig) -> tuple[dict[str, str], list[str]]:
    """(setting -> absolute path in place of a relative one, as overrides write it; notes about absolute paths that are not here).

    The project's own examples stay as they are. Raises MissingFileError for relative paths that are not there and will not be generated.
    """
    changed: dict[str, str] = {}
    notes, missing = [], []
    for key, given, allow_hub in config_files.path_settings(settings):
        if Path(given).is_absolute():
            notes += [] if Path(given).exists() else [f"{key} = {given} is not on this machine: it must be on the nodes"]
            continue
        try:
            made = settings.data.generate and key in ("data.train", "data.evaluation") and paths.local_path(given) is None
            found = str(paths.place_for(given).absolute()) if made else paths.resolve_path(given, key, allow_hub)
        except MissingFileError as error:
            missing.append(error)
            continue
        if Path(found).is_absolute() and not Path(found).is_relative_to(EXAMPLES):  # else a hub id, or ours
            changed[key] = found
    config_files.raise_missing(missing)
    if not isinstance(settings.data.train, str):  # a list is one setting
        found = [changed.pop(f"data.train[{i}].path", part.path) for i, part in enumerate(settings.data.train)]
        changed["data.train"] = flow_yaml([{"path": path, "weight": part.weight} for path, part in zip(found, settings.data.train)])
    return changed, notes


def _recipe_on_nodes(recipe: str, working_dir: str | None) -> str:
    """The name of a recipe that comes with the project; a file by its path in the working directory's copy, or else its absolute path."""
    file = find_recipe(recipe).absolute()
    if file.parent == configs.FOLDER:
        return file.stem
    inside = working_dir and file.is_relative_to(Path(working_dir).absolute())
    return str(file.relative_to(Path(working_dir).absolute()) if inside else file)


def _refuse_address(settings: config.RunConfig) -> None:
    if settings.cluster.address is not None:
        raise ConfigError(f"cluster.address = {settings.cluster.address!r}, but a job joins the cluster that it runs on", "leave cluster.address out; --address says where to submit")


def _stop_seconds(settings: config.RunConfig) -> int:
    return math.ceil(settings.loop.grace_seconds) + CHECKPOINT_SECONDS


def submit(job: Job, address: str | None = None, wait: bool = True) -> int:
    """Send the job; with `wait` stream its log to its end. Returns the exit status: the job's own, or 130 where it was stopped or this
    was interrupted (the job goes on then)."""
    if job.working_dir and "://" not in job.working_dir and not Path(job.working_dir).is_dir():
        raise UserError(f"--working-dir {job.working_dir} is not a folder", "give the folder whose files the job needs, or leave it out")
    address = server_address(address)
    client = connect(address)
    for note in job.notes:
        print(f"note: {note}")
    print(f"run folder, which every node must see: {job.run}")
    _send(client, job)
    try:
        print(f"job {job.id} is submitted to {address}", flush=True)
        if not wait:
            print(_hints(job, address))
            return 0
        return _report(job, follow(client, job.id), address)
    except KeyboardInterrupt:
        print(f"\ndetached; the job goes on\n{_hints(job, address)}")
        return 130
    except (OSError, RuntimeError) as error:
        raise UserError(f"the connection to {address} is lost ({error}); the job may go on", f"when it is back:\n{_hints(job, address)}") from error


def server_address(given: str | None) -> str:
    """URL of the job server: as given, or by Ray's environment variables, or on this machine."""
    by_ray = os.environ.get("RAY_ADDRESS", "")
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or (by_ray if by_ray.startswith("http") else DEFAULT_ADDRESS)
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    if urlsplit(address).scheme not in ("http", "https"):
        raise UserError(f"--address {address} is not the URL of a job server", f"give the head node's dashboard, such as {DEFAULT_ADDRESS}")
    return address


def connect(address: str) -> Any:
    """A `JobSubmissionClient` of the job server at this URL, which has answered. Raises UserError where none does, or it wants another token."""
    elsewhere = "start one with `ray start --head`, or give --address URL; to a cluster elsewhere: ssh -L 8265:127.0.0.1:8265 HEAD (docs/cluster.md)"
    url = urlsplit(address)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}", elsewhere) from error
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of every stream that ends
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets its environment variables win over the argument
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        what = "another token than RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_MODE") == "token" else "a token"
        raise UserError(f"the cluster at {address} asks for {what}", "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN=… as where `ray start` was called (or have its ~/.ray/auth_token)") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"what answers at {address} is not Ray's job server: {error}", elsewhere) from error


def _send(client: Any, job: Job, tries: int = 5) -> None:
    """Submit the job. A cluster that has only just started is asked again: its job server waits half a minute for its agent before it gives up."""
    try:
        client.submit_job(entrypoint=job.entrypoint, submission_id=job.id, runtime_env=job.runtime_env, metadata={"run": str(job.run)})
    except RuntimeError as error:
        if "No available agent" in str(error) and tries > 1:
            print("note: the cluster is not ready for jobs yet; asking again", flush=True)
            return _send(client, job, tries - 1)
        if "already exists" in str(error):
            raise UserError(f"the cluster has, or had, a job named {job.id}", "give another with --name") from error
        raise UserError(f"the cluster refuses the job: {error}", "see the head node's logs") from error
    except ValueError as error:  # the working directory is too large, or cannot be packed
        raise UserError(f"--working-dir {job.working_dir} cannot be sent: {error}", "list what the job does not need in its .rayignore") from error


def follow(client: Any, job_id: str) -> Any:
    """Print the job's log as it grows, until the job has ended; its `JobDetails`. Where the stream breaks, it is taken up again.

    Raises OSError or RuntimeError if the job server is gone.
    """
    from aiohttp import ClientError

    shown = 0

    async def tail() -> None:
        nonlocal shown
        total = 0  # the stream begins with the log's first character each time
        async for text in client.tail_job_logs(job_id):
            print(text[max(0, shown - total) :], end="", flush=True)
            total += len(text)
            shown = max(shown, total)

    while True:
        broken = None
        try:
            asyncio.run(tail())
        except (ClientError, OSError, RuntimeError) as error:
            broken = error
        details = client.get_job_info(job_id)
        if details.status.is_terminal():
            return details
        if broken:
            print(f"note: the stream of the log broke and is taken up again: {broken}", file=sys.stderr)
        time.sleep(1)


def _report(job: Job, details: Any, address: str) -> int:
    """Say how the job ended; the exit status that goes with it."""
    status, code = str(details.status), details.driver_exit_code
    if status == "SUCCEEDED":
        print(f"job {job.id} succeeded; look further: videoseg status {job.run}")
        return 0
    if status == "STOPPED":
        print(f"job {job.id} was stopped; to go on: videoseg submit --address {address} --resume {job.run}")
        return 130
    if code is None:  # it never ran, or its supervisor died: there is no log of ours
        print(details.message, file=sys.stderr)
    elif code == 127:
        print("remedy: `videoseg` is not on the head node's PATH: start Ray in its environment (docs/cluster.md)", file=sys.stderr)
    print(f"job {job.id} failed" + (f" with exit status {code}" if code is not None else ""), file=sys.stderr)
    return 1 if not code else 128 - code if code < 0 else code


def _hints(job: Job, address: str) -> str:
    return "\n".join(
        [
            f"  its log      ray job logs --address {address} --follow {job.id}",
            f"  its state    videoseg status {job.run}",
            f"  stop it      ray job stop --address {address} {job.id}      (with a checkpoint)",
            f"  go on after  videoseg submit --address {address} --resume {job.run}",
        ]
    )
