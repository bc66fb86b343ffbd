"""The toy policy's cold start: `videoseg sft` on what the toy teacher says, which leaves reinforcement learning something to mend.

Nine answers in ten are hedged where there is another shape to add, and two scenes in five are grey, where nothing is the answer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.config import load
from cluster.metrics import read_metrics
from cluster.policies import SETTINGS
from examples.toy.runs import run_to_its_end, videoseg
from examples.toy.teacher import NOTHING, answer
from rollout.episodes import Episode, read_episodes
from rollout.toy_data import ToyDataConfig, video_of, write_toy_data

DEBUG = load("debug")  # the policy learns the very prompt, and the frames, that it is trained with later
ANSWERS = 4  # to an episode, each about a frame of its own


@dataclass(frozen=True)
class ColdStart:
    scenes: ToyDataConfig = ToyDataConfig(train=1200, valid_u=60, valid=0, seed=1)  # the seeds of the data that reinforcement learning draws from are others
    grey: ToyDataConfig = ToyDataConfig(train=400, valid_u=0, valid=0, seed=2, grey=True)
    grey_share: float = 0.4
    hedged: float = 0.9
    steps: int = 350
    batch: int = 32
    lr: float = 5e-4

    def overrides(self, base: Path, data: Path) -> list[str]:
        sets = [(data / "scenes/train", 1 - self.grey_share), (data / "grey/train", self.grey_share)]
        return [
            f"policy.path={base}", "data.generate=null",
            "data.train=[" + ", ".join(f"{{path: {path}, weight: {weight:g}}}" for path, weight in sets) + "]", f"data.evaluation={data / 'scenes/valid_u'}",
            f"sft.answers={data / 'answers.jsonl'}", f"sft.evaluation_answers={data / 'answers.jsonl'}",
            f"rollout.prompts_per_step={self.batch}", f"loop.steps={self.steps}", "loop.save_every=50", "loop.keep_checkpoints=1",
            f"learner.lr={self.lr:g}", "learner.min_lr_ratio=0.1", "learner.warmup_steps=20", "learner.adam_beta2=0.98", "learner.weight_decay=0.02",
            "eval.every=50", "eval.episodes=128",
        ]  # fmt: skip


def write_demonstrations(out: Path, config: ColdStart) -> None:
    """`scenes` and `grey`, folders as `videoseg data toy` writes them, and `answers.jsonl` with the teacher's answers to their episodes."""
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rng = np.random.default_rng(config.scenes.seed)
    with open(work / "answers.jsonl", "w", encoding="utf-8") as lines:
        for name, data in (("scenes", config.scenes), ("grey", config.grey)):
            write_toy_data(work / name, data)
            episodes = (episode for split in ("train", "valid_u") for episode in read_episodes(work / name / split))
            lines.writelines(json.dumps(row) + "\n" for episode in episodes for row in answers_to(episode, data, config.hedged, rng))
    os.replace(work, out)


def answers_to(episode: Episode, data: ToyDataConfig, hedged: float, rng: np.random.Generator) -> Iterator[dict]:
    """The teacher's, as `sft.answers` takes them."""
    video, query = video_of(episode, data.world)
    visible = episode.target_frames(DEBUG.data.min_target_share)
    for t in rng.choice(visible, min(ANSWERS, len(visible)), replace=False).tolist():
        text = NOTHING if data.grey else answer(video, query, t, tuple(DEBUG.prompt.target_size), rng, hedged)
        yield {"episode_id": episode.episode_id, "response": text, "target_frame": t}


def cold_start(base: Path, work: Path, out: Path, config: ColdStart = ColdStart()) -> list[dict]:
    """Teaches the policy in `base` and exports it to `out`; returns the curve of the held-out answers' loss. `work` is for the data and the run, which goes
    on where it was cut short."""
    data, run = work / "data", work / "cold-start"
    if not data.exists():
        write_demonstrations(data, config)
    run_to_its_end(run, "sft", "debug", *config.overrides(base, data))
    shutil.rmtree(out, ignore_errors=True)
    videoseg("export", str(run), str(out))
    (out / SETTINGS).unlink()  # those of the debug recipe stand for it
    evaluations = [r for r in read_metrics(run / "metrics.jsonl") if "eval/sft/loss" in r]
    return [{"step": r["step"], "held_out_loss": round(r["eval/sft/loss"], 4)} for r in evaluations]
