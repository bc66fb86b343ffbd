"""Training again from saved rollouts: other learner settings on the same samples, or the step at which a run stopped.

Only learners run, no engines and no segmenters. Rewards are those in the files, advantages are taken anew; the prompts' pictures
come from the videos, and each prompt must have the fingerprint that it had.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from learner.batch import Sample
from learner.policy_check import check_policy
from rollout.decoding import Decoders
from rollout.fingerprints import policy_fingerprints
from rollout.prompts import PromptBuilder, resize
from segmentation_service.video import VideoError

from cluster import checkpoints
from cluster.config import RunConfig
from cluster.errors import DataError
from cluster.metrics import MetricsWriter
from cluster.paths import resolve_path
from cluster.placement import gather, start_actors, stop_actors
from cluster.progress import Progress
from cluster.ray_cluster import joined_cluster
from cluster.rollout_log import RolloutRow, read_rollouts, rollout_files
from cluster.rollout_rows import learner_metrics
from cluster.run_folder import RunFolder
from cluster.sinks import Sinks
from cluster.update import update


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The rollout files that paths name: files, folders of them, or run folders, in order of their steps. Raises DataError where there are none."""
    files: list[Path] = []
    for path in paths:
        folder = path / "rollouts" if (path / "rollouts").is_dir() else path
        found = [file for _, file in rollout_files(folder)] if folder.is_dir() else [path] * path.is_file()
        if not found:
            raise DataError(f"{path}: no rollouts here", "give a file of a run's rollouts/, that folder, or the run folder")
        files += found
    return files


def replay(config: RunConfig, folder: RunFolder, paths: Sequence[Path], checkpoint: Path | None = None) -> None:
    """One step for each file, with the learner as the resolved `config` says, from `policy.path` or from a checkpoint of a run with the same learner.

    The learning rate's schedule is that of a run of `loop.steps`. The new run folder gets the metrics and a checkpoint of the end. Raises
    DataError for rollouts that cannot be trained on: of another policy, of groups of one, or whose videos are gone.
    """
    files = files_of(paths)
    located = replace(config, policy=replace(config.policy, path=resolve_path(config.policy.path, "policy.path", allow_hub=True)))
    check_policy(located.policy.path)
    start = None if checkpoint is None else checkpoints.load(checkpoint)
    with closing(Pictures(located)) as pictures:
        pictures.check(files[0])
        with joined_cluster(config.cluster):
            asyncio.run(_replay(config, located, folder, files, start, pictures))


async def _replay(
    config: RunConfig, located: RunConfig, folder: RunFolder, files: Sequence[Path], start: checkpoints.Checkpoint | None, pictures: Pictures
) -> None:
    actors = await start_actors(located, policy_fingerprints(located.policy.path)["banned_token_ids"], roles=("learner",))
    first = 0 if start is None else start.step
    try:
        if start is not None:
            await gather([learner.load.remote(str(start.path.absolute() / "learner")) for learner in actors.learners])
        folder.create(config)
        with Progress(first + len(files), first) as progress, MetricsWriter(folder.path, None, Sinks(config.run.sinks, folder.path, asdict(config), print)) as metrics:
            for step, file in enumerate(files, first + 1):
                progress.stage(f"train on {file}")
                groups = scored_groups(read_rollouts(file), file)
                rewards = np.array([[row.reward for row in group] for group in groups])
                _, learned = await update(actors.learners, config.learner, rewards, [pictures.samples(group) for group in groups])
                values = {"reward/mean": math.fsum(rewards.flat) / rewards.size} | learner_metrics(learned)
                metrics.write(step, values)
                progress.step(step, values)
            state = {"replayed": [str(file) for file in files]}
            with checkpoints.writing(folder.checkpoints, first + len(files), state) as temporary:
                await gather([learner.save.remote(str(temporary.absolute() / "learner")) for learner in actors.learners])
            progress.note(f"{folder.path}: replayed {len(files)} steps; what they did is in {folder.metrics}; the policy: videoseg export {folder.path} OUT")
    finally:
        stop_actors(actors)


def scored_groups(rows: Sequence[RolloutRow], file: Path) -> list[list[RolloutRow]]:
    """The groups that were trained on, in order. Raises DataError where none is left, or they are of several sizes."""
    groups = [list(rows) for _, rows in groupby((row for row in rows if row.valid), key=lambda row: row.group)]
    sizes = sorted({len(group) for group in groups})
    if len(sizes) != 1:
        raise DataError(f"{file}: groups of {', '.join(map(str, sizes)) or 'no'} scored completions", "give rollouts of training steps as a run wrote them")
    return groups


class Pictures:
    """What a policy was shown, made again: frames from the videos, resized as the prompt's grid says."""

    def __init__(self, config: RunConfig) -> None:
        data = config.data
        self.builder = PromptBuilder(config.policy.path, config.prompt)
        self.decoders = Decoders(data.decoders, data.decode_seconds, int(data.frame_cache_gb * 2**30))

    def close(self) -> None:
        self.decoders.close()

    def check(self, file: Path) -> None:
        """Raises DataError for rollouts of another policy, as far as their first prompt tells, and where its video is gone: before anything starts."""
        group = scored_groups(read_rollouts(file), file)[0]
        text, pad = group[0].prompt_text, self.builder.image_pad_id
        ours = self.builder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if [t for t in ours if t != pad] != [t for t in group[0].prompt_token_ids if t != pad]:
            raise DataError(f"the rollouts' prompts are not tokenised as {self.builder.model_path} does", "set policy.path to the policy that made them, or to one trained from it")
        self.samples(group)

    def samples(self, group: Sequence[RolloutRow]) -> list[Sample]:
        """A group's samples, which share the prompt's arrays."""
        row, patch = group[0], self.builder.patch
        wanted = [*row.frame_ids, row.target_frame]
        try:
            frames = self.decoders.frames(Path(row.video), wanted).result().by_number
        except VideoError as error:
            raise DataError(f"rollouts of episode {row.episode_id}: {error}", "restore the video; replay shows the policy what it saw") from error
        images = tuple(resize(frames[t], (h * patch, w * patch)) for t, (_, h, w) in zip(wanted, row.grid_thw, strict=True))
        prompt_ids, grid = np.asarray(row.prompt_token_ids, np.int32), np.asarray(row.grid_thw, np.int64)
        return [
            Sample(
                prompt_ids=prompt_ids,
                response_ids=np.asarray(r.response_token_ids, np.int32),
                rollout_logprobs=np.asarray(r.rollout_logprobs, np.float32),
                images=images,
                grid_thw=grid,
                group=row.group,
                fingerprint=row.prompt_fingerprint,
                truncated=r.finish_reason == "length",
            )
            for r in group
        ]
