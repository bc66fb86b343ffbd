"""A run in progress: its parts and its state, started, asked for rollouts and evaluations, saved and closed.

Engines and segmenters that are lost are started again (`cluster.replicas`). Where a learner is lost, whatever waits for it raises PartLost, after which
`cluster.trainer` starts the run again from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from ray.exceptions import RayError

from reward_service import think_text
from reward_service.difficulty import OnlineDifficulty
from rollout.config import SamplingConfig
from rollout.fingerprints import model_fingerprint, policy_fingerprints

from cluster import checkpoints, paths, ray_cluster, rollout_log
from cluster.checkpoints import Checkpoint
from cluster.config import RunConfig
from cluster.draws import SUBSTITUTES, BrokenEpisode, Draw, Draws
from cluster.errors import CheckpointError, PartLost, RunFailed, causes
from cluster.evaluation import held_out_metrics
from cluster.ledger import FILE as LEDGER
from cluster.ledger import Final, Ledger
from cluster.metrics import MetricsWriter, StageTimes, best_step, left_out_metrics, read_metrics
from cluster.pipeline import DrawsAhead, Pipeline
from cluster.placement import ROLES, Actors, gather, start_actors, stop_actors
from cluster.progress import Progress, first_and_last, summary_line
from cluster.replicas import LOST, Replicas, described
from cluster.rollout_rows import rollout_rows, samples_of
from cluster.run_folder import RunFolder
from cluster.scoring import ScoredGroup, score_group
from cluster.sinks import Sinks
from cluster.timeline import FILE as TRACE
from cluster.timeline import Timeline
from cluster.update import Arrivals
from cluster.weight_sync import OBJECT_STORE, connect, sync_weights

DIFFICULTY = "difficulty.json"  # in a checkpoint
ALIVE_SECONDS = 60.0  # within which a learner that has nothing to do must answer

T = TypeVar("T")


@dataclass
class Run:
    """The parts of a run, and what a checkpoint holds besides the learner: `step`, `ledger`, `before` and `online`."""

    config: RunConfig
    folder: RunFolder
    actors: Actors
    draws: Draws
    held_out: Draws
    metrics: MetricsWriter
    progress: Progress
    policy: Mapping[str, Any]  # its fingerprints
    began_from: str  # fingerprint of the policy's files, which hold the frozen weights and the first reference
    timeline: Timeline
    step: int = 0  # updates so far, and the version of the weights
    before: dict[str, float] | None = None  # the evaluation before the first step
    online: OnlineDifficulty | None = None  # success rates of the episodes, where difficulty is estimated from them
    saved: int = -1  # step of the newest checkpoint
    syncs: int = 0  # of the weights, since the parts started
    skipped_in_a_row: int = 0  # the last steps that left an update out
    mismatch: float = 0.0  # KL of rollout and learner in the last step, nats a token
    times: StageTimes = field(default_factory=StageTimes)
    broken: list[BrokenEpisode] = field(default_factory=list)  # left out of this step
    dropped: list[Final] = field(default_factory=list)  # begun for this step, and neither trained nor kept for another
    arrivals: Arrivals | None = None  # groups of this step that the learners have begun with

    def __post_init__(self) -> None:
        loop = self.config.loop
        self.ledger, self.ahead = Ledger(self.folder.path / LEDGER), DrawsAhead(self.draws)
        self.pipeline = Pipeline(loop, self.config.rollout.prompts_per_step, self.ledger, self.ahead, self._begin)
        self.weights = asyncio.Lock()  # held while the learner's weights differ from those of version `step`
        kill, restarts = self.actors.kill, (loop.max_restarts, self.progress.note, self.timeline)
        self.engines = Replicas("engine", self.actors.engines, kill, self._start_engine, self._join, loop.group_seconds, *restarts)
        self.segmenters = Replicas("segmenter", self.actors.segmenters, kill, partial(self._started, "segmenter"), None, loop.score_seconds, *restarts)

    @classmethod
    async def start(
        cls, config: RunConfig, located: RunConfig, folder: RunFolder, draws: Draws, held_out: Draws, checkpoint: Checkpoint | None, progress: Progress,
        roles: Collection[str] = ROLES,
    ) -> Run:
        """Everything loaded, the same policy proved in engines and learner, the checkpoint's state in place, and then the run
        folder made, if it is not there. `located` is `config` with paths that can be loaded; `roles` are the parts that the run has."""
        progress.stage("starting")
        ours = policy_fingerprints(located.policy.path)
        began_from = await asyncio.to_thread(model_fingerprint, paths.model_folder(located.policy.path, "policy.path"))
        if checkpoint is not None:
            checkpoints.check_policy(checkpoint, config.policy.path, began_from)
        timeline = Timeline(folder.path / TRACE)
        actors = await start_actors(located, ours["banned_token_ids"], roles, timeline)
        try:
            for number, theirs in enumerate(await gather([engine.fingerprints.remote() for engine in actors.engines])):
                check_fingerprints(ours, theirs, number)
            if not folder.exists():
                folder.create(config, await asyncio.to_thread(ray_cluster.hardware, config.cluster))
            if checkpoint is not None:
                await gather([learner.load.remote(str(checkpoint.path.absolute() / "learner")) for learner in actors.learners])
            since = checkpoint.step if checkpoint else -1  # -1: from the very beginning, also where a run was lost before its first checkpoint
            rollout_log.drop_after(folder.rollouts, since)
            metrics = MetricsWriter(folder.path, since, Sinks(config.run.sinks, folder.path, asdict(config), progress.note, since))
            run = cls(config, folder, actors, draws, held_out, metrics, progress, ours, began_from, timeline)
            run.ledger.roll_back(since, checkpoint.manifest if checkpoint else {"position": 0})
            if config.difficulty.is_online:
                run.online = OnlineDifficulty(config.difficulty)
            if checkpoint is not None:
                if run.online:
                    run.online.load_state_dict(json.loads((checkpoint.path / DIFFICULTY).read_text(encoding="utf-8")))
                run.step = run.saved = checkpoint.step
                run.before = checkpoint.manifest["before"]
                draws.slow = dict(checkpoint.manifest.get("slow_videos", {}))
            if actors.engines:
                await connect(actors, config)
                async with run.weights:
                    with run.stage("sync"):
                        await run.sync(run.step)  # before the first batch, on a fresh start too: hashes prove that engines serve what the learner trains
            progress.restart_clock()
            return run
        except BaseException:
            stop_actors(actors)
            raise

    async def collect(self) -> list[ScoredGroup]:
        """The step's groups, scored, as `cluster.pipeline` hands them out. May be abandoned at any time.

        Where the videos of all of them break in tracking, the next episodes are taken. Raises RunFailed if that does not end.
        """
        self.times, self.broken, self.dropped = StageTimes(), [], []
        self.arrivals = Arrivals(self.actors.learners, self.config.learner, self.timeline, self.learning) if self.config.loop.learn_on_arrival else None
        for _ in range(1 + SUBSTITUTES):
            with self.stage("rollout"):
                taken = await (self.arrivals.unless_lost(self.pipeline.take(self.step, self._arrived)) if self.arrivals else self.pipeline.take(self.step))
            self.broken += broken_episodes(taken.groups)
            self.dropped += taken.dropped
            if not all(g.broken for g in taken.groups):
                return taken.groups
            self.dropped += map(final, taken.groups)
        raise RunFailed(f"{len(self.broken)} videos one after another cannot be tracked, last: {self.broken[-1].reason}", "check that the data set is still there")

    def _arrived(self, group: ScoredGroup) -> None:
        if not group.failure:
            self.arrivals.add(samples_of(group), group.rewards)

    def _begin(self, draws: list[Draw]) -> list[asyncio.Task[ScoredGroup]]:
        """Groups of the next step but so many as are on their way."""
        loop, rollout = self.config.loop, self.config.rollout
        log_masks = bool(loop.log_masks_every) and (self.step + 1) % loop.log_masks_every == 0
        return self.answer(draws, rollout.group_size, self.sampling(), log_masks, self.online)

    def answer(
        self, draws: list[Draw], count: int, sampling: SamplingConfig, masks: bool, online: OnlineDifficulty | None = None, propagated: bool = False
    ) -> list[asyncio.Task[ScoredGroup]]:
        """`count` completions of every draw, and their scores; `masks` asks for masks also where no reward term needs them, `propagated` for J and F of
        those carried through the video. Without `online` the episodes' own ratings count."""
        seeds = [sampling_seeds(self.config.run.seed, self.step, draw.position, count) for draw in draws]
        asked = [(draw.prompt, count, sampling, s) for draw, s in zip(draws, seeds)]
        if not self.config.loop.deterministic:

            async def one(draw: Draw, prompt: tuple) -> ScoredGroup:
                return await self.score(draw, await self.engines.call(draw.position, "generate", *prompt), masks, online, propagated)

            return [asyncio.ensure_future(one(*both)) for both in zip(draws, asked)]

        # All requests of an engine are enqueued before its first token, and groups are scored in order, so that batches are the same.
        engines = len(self.actors.engines)
        shares = [asyncio.ensure_future(self.engines.call(e, "generate_in_order", asked[e::engines], only=True)) for e in range(engines) if asked[e::engines]]

        async def in_order(i: int, before: asyncio.Task | None) -> ScoredGroup:
            completions = (await shares[i % engines])[i // engines]
            await asyncio.gather(*shares, *([before] if before else []))
            return await self.score(draws[i], completions, masks, online, propagated)

        tasks: list[asyncio.Task[ScoredGroup]] = []
        for i in range(len(draws)):
            tasks.append(asyncio.ensure_future(in_order(i, tasks[-1] if tasks else None)))
        return tasks

    async def score(self, draw: Draw, completions: list, masks: bool, online: OnlineDifficulty | None, propagated: bool = False) -> ScoredGroup:
        config = self.config
        video = propagated or config.reward.needs_video_masks
        segment = partial(self.segmenters.call, draw.position, "segment_group", tries=2) if masks or video or config.reward.needs_predicted_masks else None
        propagate = partial(self.segmenters.call, draw.position, "propagate_group", tries=2) if video else None
        tokenizer = self.draws.builder.tokenizer
        think_tokens = [len(tokenizer(think_text(c.text), add_special_tokens=False)["input_ids"]) for c in completions]
        return await score_group(draw, completions, think_tokens, config.reward, segment, propagate, config.loop.score_tries, online, boundaries=propagated)

    def sampling(self) -> SamplingConfig:
        """How completions are drawn, with the two largest log-probs where a reward term asks how uncertain the policy was."""
        sampling = self.config.rollout.sampling()
        return replace(sampling, top_logprobs=2) if self.config.reward.needs_uncertainty else sampling

    async def sleep(self) -> None:
        """Engines give the memory of the GPUs that they share to the learner, where `rollout.sleep` says so. The sync wakes them."""
        if self.config.rollout.sleep and self.config.cluster.device == "cuda":
            await gather([engine.sleep.remote(2) for engine in self.engines.up])

    async def sync(self, version: int) -> dict[str, float]:
        """All engines that are up serve the learner's weights as `version`. Where one is lost meanwhile, all are started again: a half-loaded one must not serve.

        `weights` must be held: an engine that starts meanwhile gets them from `_join`.
        """
        try:
            return await self._send_weights(self.engines.up, version)
        except LOST as error:
            return await self.engines.renew(error, lambda engines: self._send_weights(engines, version))

    async def _send_weights(self, engines: Sequence[Any], version: int) -> dict[str, float]:
        try:
            sent = await sync_weights(engines, self.actors.learners, version, self.config, checked=self.syncs % self.config.rollout.sync_check_every == 0)
            self.syncs += 1
            return sent
        except LOST as error:
            await self._check_learners(error)
            raise

    async def _start_engine(self, number: int) -> Any:
        if self.config.rollout.weight_sync != OBJECT_STORE:
            raise PartLost(f"engine {number} is lost, which was joined to the learner by {self.config.rollout.weight_sync}", "resume")
        engine = await self._started("engine", number)
        check_fingerprints(self.policy, (await gather([engine.fingerprints.remote()]))[0], number)
        return engine

    async def _join(self, engine: Any) -> None:
        """Gives an engine that was started again the newest weights."""
        async with self.weights:
            await self._send_weights([engine], self.step)

    async def _started(self, role: str, number: int) -> Any:
        actor, limit = self.actors.new(role, number), self.config.cluster.start_seconds
        try:
            await asyncio.wait_for(gather([actor.ready.remote()]), limit)
        except asyncio.TimeoutError as error:
            self.actors.kill(actor)
            raise RunFailed(f"{role} {number} was not ready within cluster.start_seconds = {limit:g}", f"look into its log, then `videoseg resume {self.folder.path}`") from error
        await self.actors.find_processes([actor])
        return actor

    async def learning(self, work: Awaitable[T]) -> T:
        """The result of what the learners were asked. Raises PartLost where one of them is lost, or after `loop.learn_seconds` has not done what it was asked within
        another minute."""
        task, limit = asyncio.ensure_future(work), self.config.loop.learn_seconds
        try:
            while not (await asyncio.wait({task}, timeout=limit))[0]:
                await self._check_learners(asyncio.TimeoutError(f"nothing after loop.learn_seconds = {limit:g}"))
            return task.result()
        except RayError as error:
            await self._check_learners(error)
            raise
        finally:
            task.cancel()

    async def _check_learners(self, error: BaseException) -> None:
        """Raises PartLost, from `error`, unless all ranks are alive and did not merely lose each other."""
        remedy = f"`videoseg resume {self.folder.path}` goes on from the last checkpoint"
        for rank, learner in enumerate(self.actors.learners):
            try:
                await asyncio.wait_for(gather([learner.alive.remote()]), ALIVE_SECONDS)
            except (RayError, asyncio.TimeoutError) as lost:
                self.actors.kill(learner)
                raise PartLost(f"learner rank {rank} is lost: {described(lost, ALIVE_SECONDS)}", remedy) from error
        if is_collective(error):
            raise PartLost(f"the learner's ranks lost each other: {described(error, 0)}", remedy) from error

    async def evaluate(self) -> dict[str, float]:
        """One greedy answer to each held-out episode; the answers are kept in `evaluations/`, the means as `eval/*`."""
        with self.stage("evaluate"):
            draws, broken = await asyncio.to_thread(self.held_out.held_out, self.config.eval.episodes)
            groups = await asyncio.gather(*self.answer(draws, 1, self.sampling().greedy(), masks=True, propagated=self.config.eval.propagate))
        broken += broken_episodes(groups)
        values = held_out_metrics(groups) | left_out_metrics([b.kind for b in broken])
        rollout_log.write_rollouts(self.folder.path / "evaluations", self.step, rollout_rows(self.step, groups, {}, self.policy["processor"]))
        self.note_evaluation(values, broken)
        return values

    def note_evaluation(self, values: Mapping[str, float], broken: list[BrokenEpisode]) -> None:
        self.note_broken("held-out", broken)
        self.metrics.write(self.step, {f"eval/{name}": value for name, value in values.items()})
        self.progress.note(f"held-out after {self.step} steps: " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
        self.progress.restart_clock()

    def log_rollouts(self, step: int, groups: list[ScoredGroup], advantages: Mapping[int, Sequence[float | np.ndarray]]) -> None:
        rollout_log.write_rollouts(self.folder.rollouts, step, rollout_rows(step, groups, advantages, self.policy["processor"]))

    async def save(self) -> None:
        """A checkpoint of this step: the learner's state and the success rates in files, the rest of the run's in the manifest."""
        with self.stage("checkpoint"):
            state = self.ledger.state_dict() | {"slow_videos": dict(self.draws.slow), "data": self.draws.fingerprint, "policy": self.began_from, "before": self.before}
            try:
                with checkpoints.writing(self.folder.checkpoints, self.step, state) as temporary:
                    await self.learning(gather([learner.save.remote(str(temporary.absolute() / "learner")) for learner in self.actors.learners]))
                    if self.online:
                        (temporary / DIFFICULTY).write_text(json.dumps(self.online.state_dict()), encoding="utf-8")
            except OSError as error:
                raise CheckpointError(f"the checkpoint of step {self.step} cannot be written: {error}", f"make room, then `videoseg resume {self.folder.path}`") from error
            checkpoints.keep_last(self.folder.checkpoints, self.config.loop.keep_checkpoints, protect=(self.best_step(),))
        self.saved = self.step
        self.engines.losses = self.segmenters.losses = 0  # those before count no more
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

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage of the step, shows it, and puts it into the timeline."""
        self.progress.stage(name)
        with self.times.stage(name), self.timeline.span("loop", name, version=self.step):
            yield

    def summary(self, seconds: float, after: dict[str, float] | None, stopped: str) -> str:
        """The last line of a run: held-out before and after, or the first and last training steps of a run that was stopped."""
        if self.before and after:
            return summary_line(self.folder.path, self.step, seconds, self.before, after)
        steps = [record for record in read_metrics(self.folder.metrics) if "seconds/step" in record]
        first, last = first_and_last(steps) if steps else ({}, {})
        return summary_line(self.folder.path, self.step, seconds, first, last, what="training", stopped=stopped)

    def close(self) -> None:
        self.pipeline.close()
        if self.arrivals:
            self.arrivals.close()
        self.engines.close()
        self.segmenters.close()
        self.metrics.close()
        self.timeline.write()
        stop_actors(self.actors)


def broken_episodes(groups: list[ScoredGroup]) -> list[BrokenEpisode]:
    """Those that the groups' draws replaced, and those whose videos broke in tracking."""
    return [episode for g in groups for episode in (*g.draw.replaced, g.broken) if episode]


def final(group: ScoredGroup) -> Final:
    """What becomes of a group that an update gets."""
    reason = f"video: {group.broken.kind}" if group.broken else group.failure and f"scoring: {group.failure}"
    return Final(group.draw.position, group.draw.episode.episode_id, reason or "")


def is_collective(error: BaseException) -> bool:
    """Whether a rank failed because it could not reach another one."""
    names = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
    return any(type(e).__name__ in names or (isinstance(e, RuntimeError) and ("gloo" in str(e) or "NCCL" in str(e))) for e in causes(error))


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
