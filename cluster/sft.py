"""Supervised fine-tuning: a policy learns given answers to the episodes and prompts that reinforcement learning will use.

Only learners run. A step is draws with answers (`cluster.answers`) and an update; the loop, its checkpoints and its end are those of `cluster.trainer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import ray

from learner.batch import Sample
from reward_service import parse_answer

from cluster.checkpoints import Checkpoint
from cluster.config import RunConfig
from cluster.draws import Draw, Draws
from cluster.ledger import Final
from cluster.metrics import StageTimes, left_out_metrics
from cluster.placement import gather
from cluster.progress import Progress
from cluster.rollout_rows import learner_metrics
from cluster.run import Run
from cluster.run_folder import RunFolder
from cluster.scoring import mean_box_iou

# Of the learner's numbers: the loss under its own name, and what is about ratios and weights, which are all 1.
_LEFT_OUT = ("policy_loss", "ratio", "dual_clip_fraction", "tis_weight", "tis_capped_fraction")


def likelihood_settings(config: RunConfig) -> RunConfig:
    """The configuration with which the learner's loss is the mean negative log-likelihood of the answers' tokens, and nothing else.

    No loss of its own is needed: with advantage 1 a token's cispo loss is -clip(r, 1 - 0, 1 + 0) log p = -log p, whatever r, so for further
    passes and mini-batches too; without a cap on importance weights, KL and entropy bonus that is all. Log-probs are at temperature 1.
    """
    learner = replace(
        config.learner, surrogate="cispo", ratio_level="token", clip_low=0.0, clip_high=0.0, dual_clip=None, loss_aggregation="token", entropy_coef=0.0, kl_coef=0.0, reference_every=0, tis_cap=None
    )
    return replace(config, learner=learner, rollout=replace(config.rollout, temperature=1.0))


class SftRun(Run):
    """A run whose parts are learners alone. `collect` gives the step's draws."""

    @classmethod
    async def start(
        cls, config: RunConfig, located: RunConfig, folder: RunFolder, draws: Draws, held_out: Draws, checkpoint: Checkpoint | None, progress: Progress
    ) -> SftRun:
        if written := draws.answers.written:
            progress.note(f"{written.file}: answers to {len(written.episode_ids)} episodes, of which {', '.join(draws.paths)} can show {len(draws.episodes)}")
        return await super().start(config, likelihood_settings(located), folder, draws, held_out, checkpoint, progress, roles=("learner",))

    async def collect(self) -> list[Draw]:
        """The step's draws. May be abandoned at any time."""
        self.times = StageTimes()
        with self.stage("draw"):
            count = self.config.rollout.prompts_per_step
            draws = await self.ahead.take(self.ledger.begin(count), self.ledger.upcoming(count))
        self.broken = [episode for draw in draws for episode in draw.replaced]
        return draws

    async def evaluate(self) -> dict[str, float]:
        """The loss of the answers to the held-out episodes; written as `eval/*`."""
        with self.stage("evaluate"):
            draws, broken = await asyncio.to_thread(self.held_out.held_out, self.config.eval.episodes)
            samples = ray.put(samples_of(draws))
            logprobs = (await gather([learner.compute_logprobs.remote(samples) for learner in self.actors.learners]))[0]
        values = {"sft/loss": -float(np.concatenate(logprobs).mean(dtype=np.float64))} | answer_metrics(draws) | left_out_metrics([b.kind for b in broken])
        self.note_evaluation(values, broken)
        return values

    def summary(self, seconds: float, after: dict[str, float] | None, stopped: str) -> str:
        path = self.folder.path
        return f"{super().summary(seconds, after, stopped)}; go on with `videoseg export {path} OUT`, then `videoseg train ... policy.path=OUT`"


async def learn(run: SftRun, draws: list[Draw]) -> None:
    """The update. Once begun it is finished: learner and step number move together."""
    step = run.step + 1
    with run.stage("train"):
        samples = ray.put(samples_of(draws))
        learned = (await run.learning(gather([learner.train_step.remote(samples) for learner in run.actors.learners])))[0]
    with run.stage("log"):
        run.ledger.close(step, [Final(draw.position, draw.episode.episode_id) for draw in draws])
        of_learner = learner_metrics({name: value for name, value in learned.items() if name not in _LEFT_OUT})
        of_learner = {name: value for name, value in of_learner.items() if name.startswith("learner/")}  # the rest compares with an engine, or clips
        loss = {"sft/loss": learned["policy_loss"]}
        values = loss | answer_metrics(draws) | left_out_metrics([b.kind for b in run.broken]) | of_learner | run.times.metrics(learned["response_tokens"])
        run.metrics.write(step, values)
    run.timeline.write()
    run.step, run.skipped_in_a_row = step, int(learned["skipped_in_a_row"])
    run.progress.step(step, values)
    run.note_broken(f"step {step}", run.broken)


def samples_of(draws: Sequence[Draw]) -> list[Sample]:
    """One sample a draw, its answer as the completion. No engine sampled it, so its log-probs there are left at 0: the settings make no use of them."""
    return [
        Sample(
            prompt_ids=draw.prompt.token_ids,
            response_ids=draw.answer.token_ids,
            rollout_logprobs=np.zeros(len(draw.answer.token_ids), np.float32),
            images=draw.prompt.images,
            grid_thw=draw.prompt.grid_thw,
            group=draw.position,
            fingerprint=draw.prompt.fingerprint,
            advantage=1.0,
        )
        for draw in draws
    ]


def answer_metrics(draws: Sequence[Draw]) -> dict[str, float]:
    """How right the answers to learn are: a mean box IoU near 0 says that a file's boxes are of other frames, or in other units, than the policy's."""
    parsed = [parse_answer(d.answer.text).to_frame(d.prompt.units, d.prompt.policy_hw, d.prompt.frame_hw) for d in draws]
    ious = [mean_box_iou(answer, draw.target) for answer, draw in zip(parsed, draws)]
    return {"sft/answers/iou_box": float(np.mean(ious)), "sft/answers/invalid_fraction": float(np.mean([not answer.well_formed for answer in parsed]))}
