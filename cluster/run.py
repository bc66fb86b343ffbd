"""A run in progress: its parts and its state, started, asked for rollouts and evaluations, saved and closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reward_service import think_text
from reward_service.difficulty import OnlineDifficulty
from rollout.config import SamplingConfig
from rollout.fingerprints import policy_fingerprints

from cluster import checkpoints, rollout_log
from cluster.checkpoints import Checkpoint
from cluster.config import RunConfig
from cluster.draws import SUBSTITUTES, BrokenEpisode, Draw, Draws
from cluster.errors import RunFailed
from cluster.evaluation import held_out_metrics
from cluster.metrics import MetricsWriter, StageTimes, best_step, left_out_metrics, read_metrics
from cluster.placement import ROLES, Actors, gather, start_actors, stop_actors
from cluster.progress import Progress, first_and_last, summary_line
from cluster.rollout_rows import rollout_rows
from cluster.run_folder import RunFolder
from cluster.scoring import ScoredGroup, score_group
from cluster.weight_sync import connect, sync_weights

DIFFICULTY = "difficulty.json"  # in a checkpoint


@dataclass
class Run:
    """The parts of a run, and what a checkpoint holds besides the learner: `step`, `position`, `before` and `online`."""

    config: RunConfig
    folder: RunFolder
    actors: Actors
    draws: Draws
    held_out: Draws
    metrics: MetricsWriter
    progress: Progress
    processor: str  # fingerprint of the image processor
    step: int = 0  # updates so far, and the version of the weights
    position: int = 0  # of the next draw in the endless stream of episodes
    before: dict[str, float] | None = None  # the evaluation before the first step
    online: OnlineDifficulty | None = None  # success rates of the episodes, where difficulty is estimated from them
    saved: int = -1  # step of the newest checkpoint
    skipped_in_a_row: int = 0  # the last steps that left an update out
    times: StageTimes = field(default_factory=StageTimes)
    upcoming: asyncio.Task | None = None
    broken: list[BrokenEpisode] = field(default_factory=list)  # left out of this step

    @classmethod
    async def start(
        cls, config: RunConfig, located: RunConfig, folder: RunFolder, draws: Draws, held_out: Draws, checkpoint: Checkpoint | None, progress: Progress,
        roles: Collection[str] = ROLES,
    ) -> Run:
        """Everything loaded, the same policy proved in engines and learner, the checkpoint's state in place, and then the run
        folder made. `located` is `config` with paths that can be loaded; `roles` are the parts that the run has."""
        progress.stage("starting")
        ours = policy_fingerprints(located.policy.path)
        actors = await start_actors(located, ours["banned_token_ids"], roles)
        try:
            for number, theirs in enumerate(await gather([engine.fingerprints.remote() for engine in actors.engines])):
                check_fingerprints(ours, theirs, number)
            if checkpoint is None:
                folder.create(config)
            else:
                await gather([learner.load.remote(str(checkpoint.path.absolute() / "learner")) for learner in actors.learners])
                rollout_log.drop_after(folder.rollouts, checkpoint.step)
            metrics = MetricsWriter(folder.path, resume_step=checkpoint.step if checkpoint else None)
            run = cls(config, folder, actors, draws, held_out, metrics, progress, ours["processor"])
            if config.difficulty.is_online:
                run.online = OnlineDifficulty(config.difficulty)
            if checkpoint is not None:
                if run.online:
                    run.online.load_state_dict(json.loads((checkpoint.path / DIFFICULTY).read_text(encoding="utf-8")))
                run.step = run.saved = checkpoint.step
                run.position, run.before = checkpoint.manifest["position"], checkpoint.manifest["before"]
                draws.slow = dict(checkpoint.manifest.get("slow_videos", {}))
            if actors.engines:
                await connect(actors, config)
                await run.sync(run.step)  # before the first batch, on a fresh start too: hashes prove that engines serve what the learner trains
            progress.restart_clock()
            return run
        except BaseException:
            stop_actors(actors)
            raise

    async def collect(self) -> list[ScoredGroup]:
        """The step's episodes, G completions of each, scored as the groups finish. May be abandoned at any time.

        Where the videos of all of them break in tracking, the next episodes are taken. Raises RunFailed if that does not end.
        """
        self.times, self.broken = StageTimes(), []
        rollout = self.config.rollout
        log_masks = self.config.loop.log_masks_every and (self.step + 1) % self.config.loop.log_masks_every == 0
        for _ in range(1 + SUBSTITUTES):
            with self.stage("draw"):
                draws = await self.next_draws()
            with self.stage("rollout"):
                groups = await self.answer(draws, rollout.group_size, self.sampling(), bool(log_masks), self.online)
            self.broken += broken_episodes(groups)
            if not all(g.broken for g in groups):
                return groups
            self.position += len(groups)
        raise RunFailed(f"{len(self.broken)} videos one after another cannot be tracked, last: {self.broken[-1].reason}", "check that the data set is still there")

    async def next_draws(self) -> list[Draw]:
        """This step's draws; those of the next step are decoded in the background meanwhile."""
        count = self.config.rollout.prompts_per_step
        make = lambda start: asyncio.create_task(asyncio.to_thread(self.draws.batch, start, count))
        draws = await (self.upcoming or make(self.position))
        self.upcoming = make(self.position + count)
        return draws

    async def answer(
        self, draws: list[Draw], count: int, sampling: SamplingConfig, masks: bool, online: OnlineDifficulty | None = None
    ) -> list[ScoredGroup]:
        """`count` completions of every draw, and their scores; `masks` asks for masks also where no reward term needs them. Without
        `online` the episodes' own ratings count."""
        config, engines = self.config, self.actors.engines
        seeds = [sampling_seeds(config.run.seed, self.step, draw.position, count) for draw in draws]
        if config.loop.deterministic:  # all requests of an engine enqueued before its first token, so that batches are the same
            shares = [list(range(e, len(draws), len(engines))) for e in range(len(engines))]
            asked = [[(draws[i], count, sampling, seeds[i]) for i in share] for share in shares]
            done = await gather([e.generate_in_order.remote([(d.prompt, *rest) for d, *rest in a]) for e, a in zip(engines, asked) if a])
            completions = {i: c for share, results in zip(shares, done) for i, c in zip(share, results)}
            return [await self.score(draw, completions[i], masks, online) for i, draw in enumerate(draws)]

        async def one(i: int, draw: Draw) -> ScoredGroup:
            engine = engines[draw.position % len(engines)]
            return await self.score(draw, await engine.generate.remote(draw.prompt, count, sampling, seeds[i]), masks, online)

        return await asyncio.gather(*(one(i, draw) for i, draw in enumerate(draws)))

    async def score(self, draw: Draw, completions: list, masks: bool, online: OnlineDifficulty | None) -> ScoredGroup:
        config = self.config
        segmenter = self.actors.segmenters[draw.position % len(self.actors.segmenters)]
        video = config.reward.needs_video_masks
        segment = segmenter.segment_group.remote if masks or video or config.reward.needs_predicted_masks else None
        propagate = segmenter.propagate_group.remote if video else None
        tokenizer = self.draws.builder.tokenizer
        think_tokens = [len(tokenizer(think_text(c.text), add_special_tokens=False)["input_ids"]) for c in completions]
        loop = config.loop
        return await score_group(
            draw, completions, think_tokens, config.reward, segment, propagate, loop.score_tries, loop.score_seconds, online
        )

    def sampling(self) -> SamplingConfig:
        """How completions are drawn, with the two largest log-probs where a reward term asks how uncertain the policy was."""
        sampling = self.config.rollout.sampling()
        return replace(sampling, top_logprobs=2) if self.config.reward.needs_uncertainty else sampling

    async def sync(self, version: int) -> dict[str, float]:
        return await sync_weights(self.actors, version, self.config)

    async def evaluate(self) -> dict[str, float]:
        """One greedy answer to each held-out episode; the answers are kept in `evaluations/`, the means as `eval/*`."""
        with self.stage("evaluate"):
            draws, broken = await asyncio.to_thread(self.held_out.held_out, self.config.eval.episodes)
            groups = await self.answer(draws, 1, self.sampling().greedy(), masks=True)
        broken += broken_episodes(groups)
        values = held_out_metrics(groups) | left_out_metrics([b.kind for b in broken])
        rollout_log.write_rollouts(self.folder.path / "evaluations", self.step, rollout_rows(self.step, groups, {}, self.processor))
        self.note_evaluation(values, broken)
        return values

    def note_evaluation(self, values: Mapping[str, float], broken: list[BrokenEpisode]) -> None:
        self.note_broken("held-out", broken)
        self.metrics.write(self.step, {f"eval/{name}": value for name, value in values.items()})
        self.progress.note(f"held-out after {self.step} steps: " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
        self.progress.restart_clock()

    def log_rollouts(self, step: int, groups: list[ScoredGroup], advantages: Mapping[int, Sequence[float | np.ndarray]]) -> None:
        rollout_log.write_rollouts(self.folder.rollouts, step, rollout_rows(step, groups, advantages, self.processor))

    async def save(self) -> None:
        """A checkpoint of this step: the learner's state and the success rates in files, the rest of the run's in the manifest."""
        with self.stage("checkpoint"):
            state = {"position": self.position, "slow_videos": dict(self.draws.slow), "data": self.draws.fingerprint, "before": self.before}
            with checkpoints.writing(self.folder.checkpoints, self.step, state) as temporary:
                await gather([learner.save.remote(str(temporary.absolute() / "learner")) for learner in self.actors.learners])
                if self.online:
                    (temporary / DIFFICULTY).write_text(json.dumps(self.online.state_dict()), encoding="utf-8")
            checkpoints.keep_last(self.folder.checkpoints, self.config.loop.keep_checkpoints, protect=(self.best_step(),))
        self.saved = self.step
        self.progress.restart_clock()

    def best_step(self) -> int | None:
        """The step whose evaluation is best by `loop.keep_best`; None without that setting."""
        measure = self.config.loop.keep_best
        return None if measure is None else best_step(self.folder.metrics, f"eval/{measure}")

    def note_broken(self, where: str, broken: list[BrokenEpisode]) -> None:
        for episode in broken:
            self.progress.note(f"warning: {where}: episode {episode.episode_id} is left out ({episode.kind}): {episode.reason}")

    def due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """Times a stage of the step, and shows it."""
        self.progress.stage(name)
        return self.times.stage(name)

    def summary(self, seconds: float, after: dict[str, float] | None, stopped: str) -> str:
        """The last line of a run: held-out before and after, or the first and last training steps of a run that was stopped."""
        if self.before and after:
            return summary_line(self.folder.path, self.step, seconds, self.before, after)
        steps = [record for record in read_metrics(self.folder.metrics) if "seconds/step" in record]
        first, last = first_and_last(steps) if steps else ({}, {})
        return summary_line(self.folder.path, self.step, seconds, first, last, what="training", stopped=stopped)

    def close(self) -> None:
        if self.upcoming:
            self.upcoming.cancel()
        self.metrics.close()
        stop_actors(self.actors)


def broken_episodes(groups: list[ScoredGroup]) -> list[BrokenEpisode]:
    """Those that the groups' draws replaced, and those whose videos broke in tracking."""
    return [episode for g in groups for episode in (*g.draw.replaced, g.broken) if episode]


def sampling_seeds(seed: int, step: int, position: int, count: int) -> list[int]:
    """One seed a completion, a pure function of (run, step, position, index)."""
    return (np.random.SeedSequence([seed, step, position]).generate_state(count, np.uint64) >> np.uint64(1)).tolist()


def check_fingerprints(ours: dict, theirs: dict, engine: int) -> None:
    """Raises `RunFailed` naming what differs between an engine's policy and that of prompts and learner."""
    different = [name for name, value in ours.items() if theirs.get(name) != value]
    if different:
        raise RunFailed(
            f"engine {engine} has another {', '.join(different)} of the policy than prompts and learner", "use one policy folder and the same versions on all nodes"
        )
