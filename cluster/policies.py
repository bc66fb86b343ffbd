"""Which policy answers, and under which settings: a Hugging Face folder, a hub id, an export, a run or one of its checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import checkpoints, config, config_dump, config_files, config_resolve, paths
from cluster.config import RunConfig
from cluster.config_file import config_error
from cluster.config_rules import hardware_problems
from cluster.errors import MissingFileError, UserError
from cluster.run_folder import RunFolder

SETTINGS = "videoseg.yaml"
"""In an export: the settings of the run that trained it, so that it is asked as it was trained."""
RUNS = Path("runs")
PUBLISHED_RECIPE, TOY_RECIPE = "videoseg_r1_7b", "debug"

# What a run's configuration says of the machine that it ran on.
_MACHINE = [
    *(f"{key}=auto" for key in ("cluster.device", "cluster.build", "policy.dtype", "learner.dtype", "segmentation.device", "segmentation.dtype")),
    "rollout.weight_sync=auto",
]


@dataclass(frozen=True)
class Policy:
    """name: the policy in records. settings: resolved for this machine, with paths that can be loaded. checkpoint: of a run, with the
    settings of that run, which say how its weights are put together."""

    name: str
    settings: RunConfig
    checkpoint: Path | None = None
    trained: RunConfig | None = None

    @contextmanager
    def loadable(self) -> Iterator[str]:
        """The folder or hub id that transformers and vLLM load; a checkpoint is exported to a temporary folder, for as long as the context lasts."""
        if self.checkpoint is None:
            yield self.settings.policy.path
            return
        with tempfile.TemporaryDirectory(prefix="videoseg-policy-") as folder:
            export_checkpoint(checkpoints.load(self.checkpoint), self.trained, Path(folder) / "policy")
            yield str(Path(folder) / "policy")


def find_policy(given: str | None = None, recipe: str | None = None, overrides: Sequence[str] = ()) -> Policy:
    """The policy that `given` names: a folder or hub id, a run (a path, or a name below runs/; its newest checkpoint), a run's checkpoint.

    Settings are those of `recipe` (a file or a recipe's name); without it those of the run, those that an export brings along, or else of
    PUBLISHED_RECIPE; without a policy too, those of TOY_RECIPE with its policy. `overrides` change them. Nothing heavy is loaded.
    Raises ConfigError, MissingFileError, CheckpointError.
    """
    found, hardware = _checkpoint_of_run(given) if given is not None else None, config_resolve.detect_hardware()
    if given is not None and found is None and Path(given).parent == RUNS and not Path(given).exists():  # it has the form of a hub id
        raise MissingFileError(f"there is no run {given}", "`ls runs` shows those that there are; `videoseg train run.name=NAME` makes one")
    if given is not None and found is None:
        paths.resolve_path(given, "--policy", allow_hub=True)
    own = ["rollout.log_level=ERROR"]  # vLLM's warnings would stand among what the command prints
    if recipe is None and found is not None:
        recipe, own = str(found[0].config), own + _MACHINE
    elif recipe is None and given is not None and (export := paths.local_path(str(Path(given) / SETTINGS))) is not None:
        recipe, own = str(export), own + _MACHINE
    settings = config.load(recipe or (TOY_RECIPE if given is None else PUBLISHED_RECIPE), [*own, *overrides])
    trained = None if found is None else config.load(found[0].config)
    path = settings.policy.path if given is None else given if trained is None else trained.policy.path
    settings = replace(
        settings,
        run=replace(settings.run, task="rl"),  # of supervised fine-tuning, no segmenter would be looked for
        policy=replace(settings.policy, path=path),
        rollout=replace(settings.rollout, engines=1, sleep=False, weight_sync="auto", cpu_threads=min(settings.rollout.cpu_threads, hardware.cores)),
    )
    settings = config_files.locate_models(config_resolve.resolve(settings, hardware))
    problems = [p for p in hardware_problems(settings, hardware, config_resolve.installed_build()) if p.key in ("cluster.device", "cluster.build")]
    if problems:
        raise config_error(problems)
    if paths.local_path(settings.policy.path) and not Path(settings.policy.path, "config.json").is_file():
        raise MissingFileError(f"{settings.policy.path} is neither a run nor a model: it holds no config.json", "give a run's folder, a Hugging Face folder or a hub id")
    if found is None:
        return Policy(str(path), settings)
    folder, checkpoint = found
    return Policy(f"{folder.path}/checkpoints/{checkpoint.name}", settings, checkpoint, trained)


def _checkpoint_of_run(given: str) -> tuple[RunFolder, Path] | None:
    """The run, and its newest checkpoint or the one that is named; None where it names no run."""
    path = Path(given).expanduser()
    if path.parent.name == "checkpoints" and (path / checkpoints.MANIFEST).is_file() and RunFolder(path.parent.parent).exists():
        return RunFolder(path.parent.parent.resolve()), path.resolve()
    for folder in (RunFolder(path), RunFolder(RUNS / given)):
        if folder.exists():
            folder = RunFolder(folder.path.resolve())  # `latest` will mean another run
            return folder, checkpoints.latest(folder.checkpoints, hashes=False)[0].path
    return None


def export_checkpoint(checkpoint: checkpoints.Checkpoint, settings: RunConfig, out: Path) -> None:
    """The policy of a run's checkpoint as a Hugging Face folder, with the run's settings in it. Raises UserError where `out` exists, CheckpointError
    where the files of the policy that the run began from have changed."""
    if out.exists():
        raise UserError(f"there is already something at {out}", "give a folder that does not exist yet")
    from learner.checkpoint import export_checkpoint
    from rollout.fingerprints import model_fingerprint

    policy = paths.model_folder(settings.policy.path, "policy.path")
    checkpoints.check_policy(checkpoint, settings.policy.path, model_fingerprint(policy))
    export_checkpoint(checkpoint.path / "learner", settings.learner, policy, out)
    (out / SETTINGS).write_text(config_dump.dump_yaml(settings, comments=False, title="settings of the run that trained this policy; `videoseg segment --policy` reads them"), encoding="utf-8")
