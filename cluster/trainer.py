"""The training loop: draw episodes, roll out, score, learn, give the new weights back; and what is kept of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray

from learner.grpo import group_advantages
from reward_service import think_text
from rollout.engine import policy_fingerprints
from rollout.prompts import PromptBuilder

from cluster import checkpoints, config_files, rollout_log
from cluster.config import RunConfig
from cluster.draws import Draw, Draws
from cluster.errors import CheckpointError, RunFailed
from cluster.evaluation import held_out_metrics
from cluster.metrics import MetricsWriter, StageTimes, completion_metrics, read_metrics
from cluster.placement import Actors, gather, join_cluster, start_actors, stop_actors
from cluster.progress import Progress, first_and_last, summary_line
from cluster.rollout_rows import learner_metrics, rollout_rows, samples_of, scored_completions
from cluster.run_folder import RunFolder
from cluster.scoring import ScoredGroup, score_group
from cluster.stop import Stop
from cluster.weight_sync import sync_weights


def train(config: RunConfig, folder: RunFolder, resume: bool = False) -> None:
    """Runs a resolved configuration to its last step in `folder`; with `resume`, from the folder's last checkpoint."""
    config_files.make_missing_data(config)
    located = config_files.locate(config)
    builder = PromptBuilder(located.policy.path, config.prompt)
    draws = Draws(located.data.train, builder, config.data, config.run.seed)
    held_out = Draws(located.data.evaluation, builder, config.data, seed=0)
    checkpoint = checkpoints.latest(folder.checkpoints)[0] if resume else None
    check_resumable(checkpoint, draws)
    started_here = join_cluster(config.cluster)
    try:
        asyncio.run(_train(located, config, folder, draws, held_out, checkpoint))
    finally:
        if started_here:
            ray.shutdown()


async def _train(located: RunConfig, config: RunConfig, folder: RunFolder, draws: Draws, held_out: Draws, checkpoint) -> None:
    began = time.monotonic()
    with Stop(config.loop.grace_seconds) as stop, Progress(config.loop.steps, checkpoint.step if checkpoint else 0) as progress:
        run = await stop.abandoning(Run.start(located, config, folder, draws, held_out, checkpoint, progress))
        if run is None:
            return
        try:
            ends = config.eval.ends
            if ends and run.before is None:
                run.before = await stop.abandoning(run.evaluate())
            while run.step < config.loop.steps and not stop.requested:
                groups = await stop.abandoning(run.collect())
                if groups is None:
                    break
                await run.learn(groups)
                if run.due(config.loop.save_every):
                    await run.save()
                if run.due(config.eval.every) and run.step < config.loop.steps:
                    await stop.abandoning(run.evaluate())
            if run.saved != run.step:
                await run.save()
            after = await stop.abandoning(run.evaluate()) if ends and not stop.requested else None
            progress.note(run.summary(time.monotonic() - began, after, stop.reason))
        finally:
            run.close()


@dataclass
class Run:
    """A run in progress: its parts, and what a checkpoint holds besides the learner (`step`, `position`, `before`)."""

    config: RunConfig
    folder: RunFolder
    actors: Actors
    draws: Draws
    held_out: Draws
    metrics: MetricsWriter
    progress: Progress
    processor: str  # the engines' fingerprint
    step: int = 0
    position: int = 0  # of the next draw in the endless stream of episodes
    saved: int = -1  # step of the newest checkpoint
    before: dict[str, float] | None = None  # the evaluation before the first step
    times: StageTimes = field(default_factory=StageTimes)
    upcoming: asyncio.Task | None = None

    # ------------------------------------------------------------------------------------------ one step, end to end

    async def collect(self) -> list[ScoredGroup]:
        """The step's episodes, G completions of each, scored as the groups finish. May be abandoned at any time."""
        self.times = StageTimes()
        with self.stage("draw"):
            draws = await self.next_draws()
        with self.stage("rollout"):
            return await asyncio.gather(*(self.rollout(draw) for draw in draws))

    async def learn(self, groups: list[ScoredGroup]) -> None:
        """Advantages, the update, and the weights back to the engines. Once begun it is finished: learner, engines and
        `step` move together."""
        config, step = self.config, self.step + 1
        kept = self.scored(groups)
        rewards = np.stack([g.rewards for g in kept])
        advantages = group_advantages(rewards, method=config.learner.advantage, eps=config.learner.advantage_eps).numpy()
        with self.stage("train"):
            samples = ray.put([s for g, a in zip(kept, advantages) for s in samples_of(g, a)])
            learned = (await gather([learner.train_step.remote(samples) for learner in self.actors.learners]))[0]
        with self.stage("sync"):
            synced = await self.sync(step)
        with self.stage("log"):
            by_position = {g.draw.position: a for g, a in zip(kept, advantages)}
            rollout_log.write_rollouts(self.folder.rollouts, step, rollout_rows(step, groups, by_position, self.processor))
            scored = scored_completions(groups, version=self.step)
            tokens = sum(c.response_tokens for c in scored)
            values = completion_metrics(scored) | learner_metrics(learned) | synced | self.times.metrics(tokens)
            self.metrics.write(step, values)
        self.step, self.position = step, self.position + len(groups)
        self.progress.step(step, values)
        self.check_mismatch(values)

    async def next_draws(self) -> list[Draw]:
        """This step's draws; those of the next step are decoded in the background meanwhile."""
        count = self.config.rollout.prompts_per_step
        make = lambda start: asyncio.create_task(asyncio.to_thread(lambda: [self.draws.train(start + i) for i in range(count)]))
        draws = await (self.upcoming or make(self.position))
        self.upcoming = make(self.position + count)
        return draws

    async def rollout(self, draw: Draw, greedy: bool = False) -> ScoredGroup:
        """G completions of a draw (a single one if greedy) and their scores."""
        config = self.config
        count = 1 if greedy else config.rollout.group_size
        sampling = config.rollout.sampling().greedy() if greedy else config.rollout.sampling()
        seeds = sampling_seeds(config.run.seed, self.step, draw.position, count)
        engine = self.actors.engines[draw.position % len(self.actors.engines)]
        segmenter = self.actors.segmenters[draw.position % len(self.actors.segmenters)]
        completions = await engine.generate.remote(draw.prompt, count, sampling, seeds)
        log_masks = config.loop.log_masks_every and (self.step + 1) % config.loop.log_masks_every == 0
        segment = segmenter.segment_group.remote if config.reward.needs_predicted_masks or log_masks or greedy else None
        tokens = [self.think_tokens(c.text) for c in completions]
        return await score_group(draw, completions, tokens, config.reward, segment, config.loop.score_tries, config.loop.score_seconds)

    def think_tokens(self, text: str) -> int:
        return len(self.draws.builder.tokenizer(think_text(text), add_special_tokens=False)["input_ids"])

    def scored(self, groups: list[ScoredGroup]) -> list[ScoredGroup]:
        """The groups that could be scored. Raises `RunFailed` past the allowed share of failures."""
        failed = [g for g in groups if g.failure]
        if len(failed) == len(groups) or len(failed) / len(groups) > self.config.loop.max_failure_rate:
            raise RunFailed(
                f"step {self.step + 1}: {len(failed)} of {len(groups)} groups could not be scored; last cause: {failed[-1].failure}",
                "mend the cause and resume, or raise loop.max_failure_rate",
            )
        return [g for g in groups if not g.failure]

    async def sync(self, version: int) -> dict[str, float]:
        return await sync_weights(self.actors, version, self.config.rollout.sync_timeout_seconds)

    def check_mismatch(self, values: dict[str, float]) -> None:
        """Warns where engine and learner disagree on the same weights."""
        if (kl := values["mismatch/kl"]) > (limit := self.config.loop.mismatch_warn):
            self.progress.note(f"warning: step {self.step}: rollout/learner mismatch KL {kl:.4f} is above loop.mismatch_warn = {limit}")

    # ------------------------------------------------------------------------------------------ one step, end to end

    async def collect(self) -> list[ScoredGroup]:
        """The step's episodes, G completions of each, scored as the groups finish. May be abandoned at any time."""
        self.times = StageTimes()
        with self.stage("draw"):
            draws = await self.next_draws()
        with self.stage("rollout"):
            return await asyncio.gather(*(self.rollout(draw) for draw in draws))

    async def learn(self, groups: list[ScoredGroup]) -> None:
        """Advantages, the update, and the weights back to the engines. Once begun it is finished: learner, engines and
        `step` move together."""
        config, step = self.config, self.step + 1
        kept = self.scored(groups)
        rewards = np.stack([g.rewards for g in kept])
        advantages = group_advantages(rewards, method=config.learner.advantage, eps=config.learner.advantage_eps).numpy()
        with self.stage("train"):
            samples = ray.put([s for g, a in zip(kept, advantages) for s in samples_of(g, a)])
            learned = (await gather([learner.train_step.remote(samples) for learner in self.actors.learners]))[0]
        with self.stage("sync"):
            synced = await self.sync(step)
        with self.stage("log"):
            by_position = {g.draw.position: a for g, a in zip(kept, advantages)}
            rollout_log.write_rollouts(self.folder.rollouts, step, rollout_rows(step, groups, by_position, self.processor))
            scored = scored_completions(groups, version=self.step)
            tokens = sum(c.response_tokens for c in scored)
            values = completion_metrics(scored) | learner_metrics(learned) | synced | self.times.metrics(tokens)
            self.metrics.write(step, values)
        self.step, self.position = step, self.position + len(groups)
        self.progress.step(step, values)
        self.check_mismatch(values)

    async def next_draws(self) -> list[Draw]:
        """This step's draws; those of the next step are decoded in the background meanwhile."""
        count = self.config.rollout.prompts_per_step
        make = lambda start: asyncio.create_task(asyncio.to_thread(lambda: [self.draws.train(start + i) for i in range(count)]))
        draws = await (self.upcoming or make(self.position))
        self.upcoming = make(self.position + count)
        return draws

    async def rollout(self, draw: Draw, greedy: bool = False) -> ScoredGroup:
        """G completions of a draw (a single one if greedy) and their scores."""
        config = self.config
        count = 1 if greedy else config.rollout.group_size
        sampling = config.rollout.sampling().greedy() if greedy else config.rollout.sampling()
        seeds = sampling_seeds(config.run.seed, self.step, draw.position, count)
        engine = self.actors.engines[draw.position % len(self.actors.engines)]
        segmenter = self.actors.segmenters[draw.position % len(self.actors.segmenters)]
        completions = await engine.generate.remote(draw.prompt, count, sampling, seeds)
        log_masks = config.loop.log_masks_every and (self.step + 1) % config.loop.log_masks_every == 0
        segment = segmenter.segment_group.remote if config.reward.needs_predicted_masks or log_masks or greedy else None
        tokens = [self.think_tokens(c.text) for c in completions]
        return await score_group(draw, completions, tokens, config.reward, segment, config.loop.score_tries, config.loop.score_seconds)

    def think_tokens(self, text: str) -> int:
        return len(self.draws.builder.tokenizer(think_text(text), add_special_tokens=False)["input_ids"])

    def scored(self, groups: list[ScoredGroup]) -> list[ScoredGroup]:
        """The groups that could be scored. Raises `RunFailed` past the allowed share of failures."""
        failed = [g for g in groups if g.failure]
        if len(failed) == len(groups) or len(failed) / len(groups) > self.config.loop.max_failure_rate:
            raise RunFailed(
                f"step {self.step + 1}: {len(failed)} of {len(groups)} groups could not be scored; last cause: {failed[-1].failure}",
                "mend the cause and resume, or raise loop.max_failure_rate",
            )
        return [g for g in groups if not g.failure]

    async def sync(self, version: int) -> dict[str, float]:
        return await sync_weights(self.actors, version, self.config.rollout.sync_timeout_seconds)

    def check_mismatch(self, values: dict[str, float]) -> None:
        """Warns, or stops the run, where engine and learner disagree on the same weights (lessons from prime-rl)."""
        kl, loop = values["mismatch/kl"], self.config.loop
        message = f"step {self.step}: rollout/learner mismatch KL is {kl:.4f} nats per token"
        if loop.mismatch_stop is not None and kl > loop.mismatch_stop:
            raise RunFailed(f"{message}, above loop.mismatch_stop = {loop.mismatch_stop}", "compare dtypes, temperature and templates of engine and learner")
        if kl > loop.mismatch_warn:
            self.progress.note(f"warning: {message}, above loop.mismatch_warn = {loop.mismatch_warn}")

    # ---------------------------------------------------------------------------------------- round about the steps

    @classmethod
    async def start(cls, located: RunConfig, config: RunConfig, folder: RunFolder, draws: Draws, held_out: Draws, checkpoint, progress: Progress) -> Run:
        """All parts loaded, checked to be equal in engine and learner, on the checkpoint's weights; then the run folder."""
        progress.stage("starting")
        ours = policy_fingerprints(located.policy.path)
        learner_arguments = dict(
            config=config.learner,
            policy_path=located.policy.path,
            seed=config.run.seed,
            total_steps=config.loop.steps,
            temperature=config.rollout.temperature,
            banned_token_ids=ours["banned_token_ids"],
        )
        actors = await start_actors(located, learner_arguments)
        try:
            for number, theirs in enumerate(await gather([engine.fingerprints.remote() for engine in actors.engines])):
                check_fingerprints(ours, theirs, number)
            if checkpoint is None:
                folder.create(config)
            else:
                await gather([learner.load.remote(str(checkpoint.path / "learner")) for learner in actors.learners])
                rollout_log.drop_after(folder.rollouts, checkpoint.step)
            metrics = MetricsWriter(folder.path, resume_step=checkpoint.step if checkpoint else None)
            run = cls(config, folder, actors, draws, held_out, metrics, progress, ours["processor"])
            if checkpoint is not None:
                run.step = run.saved = checkpoint.step
                run.position, run.before = checkpoint.manifest["position"], checkpoint.manifest["before"]
            await run.sync(run.step)  # also on a fresh start: the engines serve what the learner trains, proved by hashes
            progress.restart_clock()
            return run
        except BaseException:
            stop_actors(actors)
            raise

    async def evaluate(self) -> dict[str, float]:
        """One greedy answer to each held-out episode; the answers are kept in `evaluations/`, the means as `eval/*`."""
        with self.stage("evaluate"):
            draws = await asyncio.to_thread(self.held_out.held_out, self.config.eval.episodes)
            groups = await asyncio.gather(*(self.rollout(draw, greedy=True) for draw in draws))
        values = held_out_metrics(groups)
        rollout_log.write_rollouts(self.folder.path / "evaluations", self.step, rollout_rows(self.step, groups, {}, self.processor))
        self.metrics.write(self.step, {f"eval/{name}": value for name, value in values.items()})
        self.progress.note(f"held-out, {self.step} steps: " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
        self.progress.restart_clock()
        return values

    async def save(self) -> None:
        """A checkpoint of this step: the learner's state in files, the run's own in the manifest."""
        with self.stage("checkpoint"):
            state = {"position": self.position, "data": self.draws.fingerprint, "before": self.before}
            with checkpoints.writing(self.folder.checkpoints, self.step, state) as temporary:
                await gather([learner.save.remote(str(Path(temporary).absolute() / "learner")) for learner in self.actors.learners])
            checkpoints.keep_last(self.folder.checkpoints, self.config.loop.keep_checkpoints)
        self.saved = self.step
        self.progress.restart_clock()

    def due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def stage(self, name: str):
        self.progress.stage(name)
        return self.times.stage(name)

    def summary(self, seconds: float, after: dict[str, float] | None, stopped: str) -> str:
        if self.before and after:
            return summary_line(self.folder.path, self.step, seconds, self.before, after)
        steps = [r for r in read_metrics(self.folder.metrics) if "reward/mean" in r]
        first, last = first_and_last(steps) if steps else ({}, {})
        return summary_line(self.folder.path, self.step, seconds, first, last, what="training", stopped=stopped)

    def close(self) -> None:
        if self.upcoming:
            self.upcoming.cancel()
        self.metrics.close()
        stop_actors(self.actors)


def sampling_seeds(seed: int, step: int, position: int, count: int) -> list[int]:
    """One seed a completion, a pure function of (run, step, position, index)."""
    return np.random.SeedSequence([seed, step, position]).generate_state(count, np.uint64).astype(np.uint64).__rshift__(1).tolist()


def check_fingerprints(ours: dict, theirs: dict, engine: int) -> None:
    """Raises `RunFailed` naming what differs between the prompt builder's and learner's policy and an engine's."""
    different = [name for name, value in ours.items() if theirs.get(name) != value]
    if different:
        raise RunFailed(f"engine {engine} and learner have another {', '.join(different)} of the policy", "give both the same policy.path and versions")


def check_resumable(checkpoint, draws: Draws) -> None:
    """Raises `CheckpointError` if the data set is not the one that the checkpoint was trained on."""
    if checkpoint is not None and checkpoint.manifest["data"] != draws.fingerprint:
        raise CheckpointError(
            f"{draws.path} is not the data set of {checkpoint.path} (fingerprint {draws.fingerprint}, was {checkpoint.manifest['data']})",
            "restore the data set, or start a new run",
        )
