"""The training loop: draw episodes, roll out, score, learn, give the new weights back to the engines.

In supervised fine-tuning a step is less (`cluster.sft`), the loop round it the same.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import closing

import numpy as np

from learner.policy_check import check_policy
from segmentation_service.checkpoint import check_sam2

from cluster import checkpoints, config_files, rollout_log, sft
from cluster.checkpoints import Checkpoint
from cluster.config import RunConfig
from cluster.draws import Draws
from cluster.errors import CheckpointError, PartLost, RunFailed
from cluster.metrics import completion_metrics, dropped_metrics, left_out_metrics
from cluster.profiling import profiled
from cluster.progress import Progress
from cluster.ray_cluster import joined_cluster
from cluster.rollout_rows import learner_metrics, samples_of, scored_completions
from cluster.run import Run, final
from cluster.run_folder import RunFolder
from cluster.scoring import ScoredGroup
from cluster.stop import Stop
from cluster.update import update


def train(config: RunConfig, folder: RunFolder, resume: bool = False) -> None:
    """Runs a resolved configuration to its last step in `folder`; with `resume`, from the folder's last checkpoint.

    Where a learner is lost, all parts start again from the last checkpoint, `loop.max_restarts` times at most from the same one.
    """
    located = config_files.locate(config)
    checkpoint = checkpoints.latest(folder.checkpoints)[0] if resume else None
    check_policy(located.policy.path)
    if config.run.task == "rl":
        check_sam2(located.segmentation.checkpoint, located.segmentation.backend, located.segmentation.model_config)
    draws, held_out = Draws.of_run(located)
    for data in (draws, held_out):
        data.check_videos(config.data.check_seconds)
    check_resumable(checkpoint, draws)
    with closing(draws), joined_cluster(config.cluster):
        restarts = 0
        while True:
            try:
                return asyncio.run(_train(config, located, folder, draws, held_out, checkpoint))
            except PartLost as lost:
                before, checkpoint = checkpoint, checkpoints.latest(folder.checkpoints)[0] if checkpoints.steps(folder.checkpoints) else None
                restarts = restarts + 1 if before == checkpoint else 1
                if restarts > config.loop.max_restarts:
                    raise
                where = f"step {checkpoint.step}" if checkpoint else "the beginning"
                print(f"warning: {lost}; starting again from {where}", file=sys.stderr, flush=True)


async def _train(config: RunConfig, located: RunConfig, folder: RunFolder, draws: Draws, held_out: Draws, checkpoint: Checkpoint | None) -> None:
    began = time.monotonic()
    kind, learn_from = (sft.SftRun, sft.learn) if config.run.task == "sft" else (Run, learn)
    with Stop(config.loop.grace_seconds) as stop, Progress(config.loop.steps, checkpoint.step if checkpoint else 0) as progress:
        run = await stop.abandoning(kind.start(config, located, folder, draws, held_out, checkpoint, progress))
        if run is None:
            return
        try:
            if config.eval.ends and run.before is None:
                run.before = await stop.abandoning(run.evaluate())
            while run.step < config.loop.steps and not stop.requested:
                async with profiled(run):
                    collected = await stop.abandoning(run.collect())
                    if collected is None:
                        break
                    await learn_from(run, collected)
                await stop_if_untrustworthy(run)
                if run.due(config.loop.save_every):
                    await run.save()
                if run.due(config.eval.every) and run.step < config.loop.steps:
                    await stop.abandoning(run.evaluate())
                    if run.best_step() == run.step != run.saved:
                        await run.save()
            if run.saved != run.step:
                await run.save()
            after = await stop.abandoning(run.evaluate()) if config.eval.ends and not stop.requested else None
            progress.note(run.summary(time.monotonic() - began, after, stop.reason))
        finally:
            run.close()


async def learn(run: Run, groups: list[ScoredGroup]) -> None:
    """Advantages, the update, and the weights back to the engines. Once begun it is finished: learner, engines and step
    number move together."""
    config, step = run.config, run.step + 1
    kept = scored(groups, config.loop.max_failure_rate, step)
    rewards = np.stack([g.rewards for g in kept])
    async with run.weights:
        with run.stage("train"):
            await run.sleep()
            advantages, learned = await run.learning(update(run.actors.learners, config.learner, rewards, [samples_of(g) for g in kept], run.arrivals))
        with run.stage("sync"):
            synced = await run.sync(step)
        run.step = step
    with run.stage("log"):
        run.ledger.close(step, [*map(final, groups), *run.dropped])
        run.log_rollouts(step, groups, {g.draw.position: a for g, a in zip(kept, advantages)})
        completions = scored_completions(groups, version=step - 1)
        tokens = sum(c.response_tokens for c in completions)
        values = completion_metrics(completions) | left_out_metrics([b.kind for b in run.broken]) | dropped_metrics(run.dropped) | learner_metrics(learned) | synced | run.times.metrics(tokens)
        run.metrics.write(step, values)
    run.timeline.write()
    if run.online:
        for g in kept:
            run.online.update(g.draw.episode.episode_id, g.success_rate)
    run.skipped_in_a_row, run.mismatch = int(learned["skipped_in_a_row"]), values["mismatch/kl"]
    run.progress.step(step, values)
    run.note_broken(f"step {step}", run.broken)
    if run.mismatch > config.loop.mismatch_warn:
        run.progress.note(f"warning: step {step}: rollout/learner mismatch KL {run.mismatch:.4f} exceeds loop.mismatch_warn")


async def stop_if_untrustworthy(run: Run) -> None:
    """Raises `RunFailed`, with a checkpoint, after more than `learner.max_skipped` steps in a row with an update left out, and where the mismatch of
    rollout and learner exceeds `loop.mismatch_stop`."""
    if (most := run.config.loop.mismatch_stop) is not None and run.mismatch > most:
        await run.save()
        remedy = "compare dtypes and fingerprints of engine and learner, see learner.tis_cap; then resume with another loop.mismatch_stop"
        raise RunFailed(f"step {run.step}: rollout/learner mismatch KL {run.mismatch:.4g} exceeds loop.mismatch_stop = {most:g}", remedy)
    skipped, allowed = run.skipped_in_a_row, run.config.learner.max_skipped
    if not skipped:
        return
    run.progress.note(f"warning: step {run.step}: an update was left out (loss or gradient not finite, or the gradient above learner.skip_above)")
    if skipped > allowed:
        await run.save()
        remedy = "resume with another learner.skip_above or learner.max_skipped, or begin again with a lower learner.lr"
        if run.config.run.task == "rl":
            checkpoint = run.folder.checkpoints / checkpoints.checkpoint_name(run.step)
            alone = f"videoseg train {run.folder.config} --replay {rollout_log.file_of(run.folder.rollouts, run.step)} --start {checkpoint}"
            remedy = f"train on that step alone to see why: {alone}; or {remedy}"
        raise RunFailed(f"updates were left out in {skipped} steps in a row, more than learner.max_skipped = {allowed}", remedy)


def scored(groups: list[ScoredGroup], max_failure_rate: float, step: int) -> list[ScoredGroup]:
    """The groups that could be scored. Raises `RunFailed` past the allowed share of failures, broken videos not counted."""
    tried = [g for g in groups if not g.broken]
    failed = [g for g in tried if g.failure]
    if len(failed) == len(tried) or len(failed) / len(tried) > max_failure_rate:
        raise RunFailed(
            f"step {step}: {len(failed)} of {len(tried)} groups could not be scored; last cause: {failed[-1].failure}",
            "mend the cause and resume, or raise loop.max_failure_rate",
        )
    return [g for g in groups if not g.failure]


def check_resumable(checkpoint: Checkpoint | None, draws: Draws) -> None:
    """Raises `CheckpointError` if the data sets or their shares are not those that the checkpoint was trained on, or it is a replay's."""
    if checkpoint is not None and "replayed" in checkpoint.manifest:
        raise CheckpointError(f"{checkpoint.path} was made by --replay, which has no place in the data to go on from", "export it, and start a run with policy.path there")
    if checkpoint is not None and (was := checkpoint.manifest["data"]) != (now := draws.fingerprint):
        changed = [path for path, part in zip(draws.sources, now.split("+")) if part not in was.split("+")]
        raise CheckpointError(
            f"{', '.join(changed or draws.sources)}: not the episodes, or not in the shares, of {checkpoint.path} (fingerprint {now}, was {was})",
            "restore the data set, or start a new run",
        )
