"""The configuration of a run: the packages' settings put together, read from YAML and overrides, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import config_rules
from cluster.config_check import Problem, build, source_of
from cluster.config_file import config_error, find_recipe, read_settings
from cluster.sections import ClusterConfig, DataConfig, EvalConfig, LoopConfig, PolicyConfig, RunSection, SftConfig
from learner.config import LearnerConfig
from reward_service.config import RewardConfig
from reward_service.difficulty import DifficultyConfig
from rollout.config import RolloutConfig
from rollout.prompts import PromptConfig
from segmentation_service.config import SegmentationConfig


@dataclass
class RunConfig:
    """All settings of a run. Sections of the packages are documented where they are defined."""

    run: RunSection = field(default_factory=RunSection, metadata={"help": "Name, place, task and seed."})
    policy: PolicyConfig = field(default_factory=PolicyConfig, metadata={"help": "The model that is trained."})
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "Episodes."})
    prompt: PromptConfig = field(default_factory=PromptConfig, metadata={"help": "What the policy is shown."})
    rollout: RolloutConfig = field(default_factory=RolloutConfig, metadata={"help": "How completions are generated (vLLM)."})
    reward: RewardConfig = field(
        default_factory=RewardConfig, metadata={"help": "What a completion earns; `preset: NAME` in a recipe starts from a published system."}
    )
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig, metadata={"help": "Where the difficulty that sets the length budget comes from."})
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig, metadata={"help": "SAM2, and what carries its masks through the video."})
    learner: LearnerConfig = field(default_factory=LearnerConfig, metadata={"help": "How the policy is updated (DeepSpeed)."})
    sft: SftConfig = field(default_factory=SftConfig, metadata={"help": "Supervised fine-tuning (run.task=sft)."})
    loop: LoopConfig = field(default_factory=LoopConfig, metadata={"help": "The training loop."})
    eval: EvalConfig = field(default_factory=EvalConfig, metadata={"help": "Held-out evaluation."})
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata={"help": "Ray and the machines."})


def load(file: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the recipe (after what it extends), then the overrides.

    Raises ConfigError with every problem at once: unknown keys with the nearest valid one, wrong types, values out of
    range, combinations that cannot work. `auto` values stay; `config_resolve.resolve` fills them in.
    """
    values, sources = read_settings(file, overrides)
    config, problems = build(RunConfig, values, sources)
    if config is not None:
        problems += [_placed(p, sources) for p in config_rules.combination_problems(config)]
    if problems:
        raise config_error(problems)
    if config.run.recipe == "auto":
        config.run.recipe = find_recipe(file).stem if file is not None else "defaults"
    return config


def load_for_resume(file: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, tuple[Any, Any]]]:
    """A run's own `config.yaml` with overrides, and what they change: key -> (old, new).

    Raises ConfigError for a key that may not change once a run has trained under it.
    """
    old, new = load(file), load(file, overrides)
    changed = config_rules.differences(old, new)
    problems = [
        Problem(key, f"was {before!r} and cannot become {after!r} in a run that has begun", "start a new run, or resume without this setting")
        for key, (before, after) in changed.items()
        if not config_rules.may_change_on_resume(key)
    ]
    if problems:
        raise config_error(problems)
    return new, changed


def _placed(problem: Problem, sources: Any) -> Problem:
    """The problem with where its first key was set, if it was set anywhere."""
    return Problem(problem.key, problem.message, problem.remedy, source_of(problem.key.split(",")[0], sources).where)
