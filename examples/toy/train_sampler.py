"""Trains the toy policy to answer the frame sampler's questions, so that HTFS can be tried on toy videos.

    python -m examples.toy.train_sampler --out runs/toy-sampler/model

It starts from examples/toy/models/policy, vision tower frozen, and sees the prompts that HTFS builds (examples/toy/sampler.yaml) about
the shapes of videos in which one at least is in view in part only. The teacher answers from the truth. The result is a Hugging Face folder
with `training.json` beside the weights. A training that was cut short goes on from its last evaluation.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset

from cluster.sample_frames import load_settings
from examples.toy.sampler_teacher import Teacher, partly_visible
from examples.toy.train_policy import HELD_OUT, Example, collate, fit, images_of, publish, save_state
from rollout.htfs import HTFS, HTFSConfig, Look
from rollout.htfs_vllm import look_prompt, size_within
from rollout.prompts import ImageChat, resize
from rollout.toy_data import toy_episode
from rollout.toy_world import ToyVideo, WorldConfig, make_video

POLICY = Path(__file__).parent / "models/policy"
SETTINGS = Path(__file__).parent / "sampler.yaml"
WORLD = WorldConfig(objects=(2, 3), touching=0.0)  # of a single shape nothing is ever out of view
LEVEL = "easy"  # queries that name their target's colour and kind
PARTLY_STEPS = 300  # at first about shapes in view in part only, of which there is most to say; then about all, so that the query has to be read
LOOSE = 30  # percent of a look by which the intervals that lead to the next one are too wide, at most: models err, too


def looks_of(video: ToyVideo, config: HTFSConfig, rng: np.random.Generator, partly: bool) -> list[tuple[Look, str]]:
    """What HTFS asks about the named shapes of a video, with the teacher's answers; nothing where none is in view in part only.
    `partly`: it asks about such shapes alone."""
    teacher, answered = Teacher(video, config), []
    named = [q for q in video.queries if q.level == LEVEL]
    queries = [q for q in named if partly_visible(teacher.visible(q))]
    queries = named if queries and not partly else queries

    def ask(looks: list[Look]) -> list[list[str]]:
        replies = [teacher.reply(look) for look in looks]
        answered.extend((look, reply) for look, reply in zip(looks, replies) if reply)
        return [[loosened(reply or "none", rng)] for reply in replies]

    HTFS(config, ask, "teacher").sample([toy_episode(video, number, query, "train") for number, query in enumerate(queries)])
    return answered


def loosened(reply: str, rng: np.random.Generator) -> str:
    """An interval with both ends moved outwards; other replies as they are."""
    if "-" not in reply:
        return reply
    first, last = map(int, reply.split("-"))
    return f"{max(0, first - rng.integers(LOOSE))}-{min(100, last + rng.integers(LOOSE))}"


def examples_of(video: ToyVideo, chat: ImageChat, config: HTFSConfig, rng: np.random.Generator, partly: bool) -> list[Example]:
    """The looks of `looks_of`, as the model sees them."""
    size = size_within((video.config.height, video.config.width), config.max_pixels, chat.step)
    shown = cache(lambda t: resize(video.frame(t), size))
    examples = []
    for look, reply in looks_of(video, config, rng, partly):
        prompt = look_prompt(chat, look, [shown(t) for t in look.frame_ids])
        ids = chat.tokenizer(reply + "<|im_end|>", add_special_tokens=False)["input_ids"]
        examples.append(Example(prompt.token_ids, np.array(ids, np.int32), prompt.images))
    return examples


class Stream(IterableDataset):
    """Batches of examples, from the step after `done` to the last."""

    def __init__(self, config: HTFSConfig, batch: int, steps: int, seed: int, done: int = 0):
        self.config, self.batch, self.steps, self.seed, self.done = config, batch, steps, seed, done

    def __iter__(self):
        torch.set_num_threads(1)
        chat = ImageChat(str(POLICY))
        for step in range(self.done + 1, self.steps + 1):
            rng = np.random.default_rng([self.seed, step, 1])
            batch: list[Example] = []
            while len(batch) < self.batch:
                batch += examples_of(make_video(int(rng.integers(HELD_OUT)), WORLD), chat, self.config, rng, partly=step <= PARTLY_STEPS)
            yield batch[: self.batch]


@torch.no_grad()
def evaluate(model, config: HTFSConfig, count: int) -> dict[str, float]:
    """On looks at held-out videos: the loss, and the share of answers of which every token is the likeliest one."""
    chat, rng, examples, seed = ImageChat(str(POLICY)), np.random.default_rng(0), [], HELD_OUT
    while len(examples) < count:
        examples += examples_of(make_video(seed, WORLD), chat, config, rng, partly=False)
        seed += 1
    losses, right = [], []
    for start in range(0, count, 50):
        batch = examples[start : start + 50]
        inputs = collate(batch, chat.tokenizer.pad_token_id, model.config.image_token_id)
        out = model(**inputs, **images_of(model, batch))
        labels = inputs["labels"][:, 1:]
        losses.append(out.loss.item())
        right += ((out.logits[:, :-1].argmax(-1) == labels) | (labels < 0)).all(1).tolist()
    return {"held_out_loss": round(float(np.mean(losses)), 4), "exact": round(float(np.mean(right)), 4)}


def prepare(work: Path) -> None:
    """The toy policy in `work`, with the state of step 0."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(POLICY, work)
    (work / "training.json").unlink()
    save_state(work / "state.pt", {"step": 0, "optimizers": None, "curve": [], "seconds": 0.0})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)

    config = load_settings(str(SETTINGS), []).htfs
    work = args.out.with_name(args.out.name + ".partial")
    if not (work / "state.pt").exists():
        prepare(work)
    state = fit(work, lambda done: Stream(config, args.batch, args.steps, args.seed, done), args.steps, args.lr, 100, lambda model, step: evaluate(model, config, 200))
    recipe = {k: v for k, v in vars(args).items() if k != "out"}
    publish(work, args.out, {"recipe": recipe | {"partly_steps": PARTLY_STEPS}, "world": asdict(WORLD), "htfs": asdict(config), "curve": state["curve"]})


if __name__ == "__main__":
    main()
