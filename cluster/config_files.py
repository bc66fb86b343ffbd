"""The models and data that a configuration names: found before anything starts, or generated where the configuration says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cluster import paths
from cluster.config import RunConfig
from cluster.errors import MissingFileError
from cluster.sections import WeightedData


def make_missing_data(config: RunConfig, progress: Callable[[str], None] = print) -> None:
    """Generate the toy world if `data.generate` asks for it and `data.train` is not there.

    Raises MissingFileError for what cannot be generated first: nothing is made for a run that cannot start.
    """
    raise_missing(file_problems(config))
    if not _will_generate(config):
        return
    out = paths.place_for(config.data.train).parent
    if out.exists():
        raise MissingFileError(f"data.train = '{config.data.train}' is not there, but {out} is", f"delete {out} to have it generated again")
    from rollout.toy_data import write_toy_data

    progress(f"generating the toy world in {out} (once)")
    write_toy_data(out, progress=progress)


def locate(config: RunConfig) -> RunConfig:
    """A copy whose paths are what to load: existing files and folders, or hub ids.

    Raises MissingFileError that lists everything missing. The run folder keeps the paths as given.
    """
    found, problems = _look(config)
    raise_missing(problems)
    return replace(
        _with_models(config, found),
        data=replace(
            config.data,
            train=_located_train(config.data.train, found),
            evaluation=found["data.evaluation"],
            train_frames=found.get("data.train_frames"),
            evaluation_frames=found.get("data.evaluation_frames"),
        ),
        sft=replace(config.sft, answers=found.get("sft.answers"), evaluation_answers=found.get("sft.evaluation_answers")),
    )


def locate_models(config: RunConfig) -> RunConfig:
    """The same for the models alone: a copy for who segments and does not train."""
    found, problems = _look(config, data=False)
    raise_missing(problems)
    return _with_models(config, found)


def _with_models(config: RunConfig, found: dict[str, str]) -> RunConfig:
    propagation = config.segmentation.propagation
    return replace(
        config,
        policy=replace(config.policy, path=found["policy.path"]),
        segmentation=replace(
            config.segmentation,
            checkpoint=found.get("segmentation.checkpoint", config.segmentation.checkpoint),
            model_config=_file_or_name(config.segmentation.model_config),
            propagation=replace(
                propagation, checkpoint=found.get("segmentation.propagation.checkpoint"), model_config=_file_or_name(propagation.model_config)
            ),
        ),
    )


def file_problems(config: RunConfig) -> list[MissingFileError]:
    """An error for each model and data set that is missing and will not be generated."""
    generated = _will_generate(config)
    return [p for p in _look(config)[1] if not (generated and p.message.startswith("data."))]


def raise_missing(problems: list[MissingFileError]) -> None:
    """One error for all of them; nothing where there are none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "".join(f"\n  {p}" for p in problems)
        raise MissingFileError(f"these are missing:{listed}", "; ".join(p.remedy for p in problems))


def _located_train(train: str | list[WeightedData], found: dict[str, str]) -> str | list[WeightedData]:
    if isinstance(train, str):
        return found["data.train"]
    return [replace(s, path=found[f"data.train[{i}].path"]) for i, s in enumerate(train)]


def _will_generate(config: RunConfig) -> bool:
    return config.data.generate == "toy" and paths.local_path(config.data.train) is None


def _file_or_name(given: str | None) -> str | None:
    """A file, or else a name that means something inside a package."""
    found = given and paths.local_path(given)
    return str(found.absolute()) if found else given


def path_settings(config: RunConfig, data: bool = True) -> list[tuple[str, str, bool]]:
    """(setting, path given, whether it may be a hub id) of every model and data set that the configuration names; without `data` of models alone."""
    segments = config.run.task == "rl"
    wanted = [("policy.path", config.policy.path, True)]
    wanted += [("segmentation.checkpoint", config.segmentation.checkpoint, True)] if segments else []
    train = config.data.train
    if data:
        wanted += [("data.train", train, False)] if isinstance(train, str) else [(f"data.train[{i}].path", s.path, False) for i, s in enumerate(train)]
        wanted.append(("data.evaluation", config.data.evaluation, False))
    propagation = config.segmentation.propagation
    if segments and propagation.checkpoint is not None:
        wanted.append(("segmentation.propagation.checkpoint", propagation.checkpoint, propagation.method == "sam2"))
    if data:
        wanted += [(f"data.{name}", given, False) for name in ("train_frames", "evaluation_frames") if (given := getattr(config.data, name)) is not None]
    if data and config.run.task == "sft":
        wanted += [(f"sft.{name}", given, False) for name in ("answers", "evaluation_answers") if (given := getattr(config.sft, name)) is not None]
    return wanted


def _look(config: RunConfig, data: bool = True) -> tuple[dict[str, str], list[MissingFileError]]:
    """Setting -> what to load for it, and an error for each that is missing."""
    found, problems = {}, []
    for key, given, allow_hub in path_settings(config, data):
        try:
            found[key] = paths.resolve_path(given, key, allow_hub)
        except MissingFileError as error:
            problems.append(error)
    return found, problems
