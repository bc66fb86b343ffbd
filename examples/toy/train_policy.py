"""The toy policy: a small Qwen2.5-VL learns to answer toy queries from a teacher, up to a middling level.

    python -m examples.toy.train_policy --out examples/toy/models/policy

The curriculum starts with one object, then adds objects, then queries that need space and time. What it makes stands for a published
checkpoint; `videoseg sft` is the cold start on top of it (examples/toy/cold_start.py). The result is a Hugging Face folder with `training.json` (recipe, seed, seconds, learning curve on held-out videos) beside the weights. A training that
was cut short goes on from its last evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from examples.toy.cold_start import DEBUG, ColdStart, cold_start
from examples.toy.teacher import NOTHING, answer
from examples.toy.tokenizer import train_tokenizer
from cluster.scoring import mean_box_iou
from learner.patchify import PatchSpec, patchify
from reward_service import Answer, Target, parse_answer
from rollout.order import uniform_frames
from rollout.prompts import PromptBuilder, resize
from rollout.toy_world import COLOURS, SHAPES, ToyVideo, WorldConfig, make_video
from segmentation_service.geometry import scale_boxes
from segmentation_service.masks import mask_to_box

PROMPT = DEBUG.prompt
PATCHES = PatchSpec(14, 2, 2, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))  # Qwen2.5-VL's
HELD_OUT = 10_000_000  # seeds from here on are never trained on; the data set's own seeds lie elsewhere
MIN_PIXELS = 12  # 0.1% of a frame
WORD_SCALE = 10.0  # makes logits of the products of visual tokens and word embeddings


@dataclass(frozen=True)
class Stage:
    steps: int
    world: WorldConfig
    levels: tuple[str, ...]
    reference_frames: int
    hedged: float = 0.0  # share of the teacher's answers that add another shape to the one that is meant


STAGES = (
    Stage(200, WorldConfig(frames=(8, 8), objects=(1, 1)), ("easy",), 0),
    Stage(400, WorldConfig(frames=(8, 8), objects=(1, 3), touching=0.0), ("easy",), 0, hedged=0.3),
    Stage(900, WorldConfig(), ("easy", "mid", "hard"), 4, hedged=0.3),
)
ENDS = tuple(accumulate(stage.steps for stage in STAGES))


def stage_of(step: int) -> Stage:
    """The stage of the step with this number, the first being 1."""
    return next(stage for stage, end in zip(STAGES, ENDS) if step <= end)


@dataclass(frozen=True)
class Example:
    prompt_ids: np.ndarray
    answer_ids: np.ndarray
    images: tuple[np.ndarray, ...]  # a picture that several examples show is the same object
    target_boxes: np.ndarray | None = None  # (n, 4), policy pixels; what the policy's evaluation compares with


def examples_of(video: ToyVideo, builder: PromptBuilder, stage: Stage, rng: np.random.Generator, limit: int, grey: bool = False):
    """Up to `limit` examples that share one target frame of the video; `grey`: frames are, and nothing is the answer."""
    t = int(rng.integers(video.num_frames))
    masks = video.masks(t)
    queries = [q for q in video.queries if q.level in stage.levels and all(masks[i].sum() >= MIN_PIXELS for i in q.targets)]
    if not queries:
        return
    shown = uniform_frames(video.num_frames, stage.reference_frames)
    frames = {i: video.frame(i) for i in {*shown, t}}
    if grey:
        frames = {i: np.full_like(frame, 128) for i, frame in frames.items()}
    images = None
    weights = np.array([{"easy": 1.0, "mid": 1.0, "hard": 1.5}[q.level] for q in queries])
    for i in rng.choice(len(queries), min(limit, len(queries)), replace=False, p=weights / weights.sum()):
        prompt = builder.build(f"{video.seed}", queries[i].text, frames, shown, t)
        text = NOTHING if grey else answer(video, queries[i], t, prompt.policy_hw, rng, stage.hedged)
        ids = builder.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        boxes = [scale_boxes(mask_to_box(masks[k]), masks.shape[1:], prompt.policy_hw) for k in queries[i].targets]
        images = images or prompt.images
        yield Example(prompt.token_ids, np.array(ids, np.int32), images, np.array(boxes))


class Stream(IterableDataset):
    """Batches of examples, from the step after `done` to the last."""

    def __init__(self, tokenizer_path: Path, batch: int, seed: int, done: int = 0):
        self.tokenizer_path, self.batch, self.seed, self.done = tokenizer_path, batch, seed, done

    def __iter__(self):
        torch.set_num_threads(1)
        builder = PromptBuilder(str(self.tokenizer_path), PROMPT)
        for step in range(self.done + 1, ENDS[-1] + 1):
            rng = np.random.default_rng([self.seed, step])
            batch: list[Example] = []
            while len(batch) < self.batch:
                video = make_video(int(rng.integers(HELD_OUT)), stage_of(step).world)
                batch += examples_of(video, builder, stage_of(step), rng, limit=3)
            yield batch[: self.batch]


def collate(batch: list[Example], pad: int, image_token: int) -> dict[str, torch.Tensor]:
    """Right-padded ids, labels on the answers only."""
    ids = [np.concatenate([e.prompt_ids, e.answer_ids]) for e in batch]
    width = max(map(len, ids))
    input_ids, labels, mask = (np.full((len(batch), width), fill) for fill in (pad, -100, 0))
    for row, (example, tokens) in enumerate(zip(batch, ids)):
        input_ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, len(example.prompt_ids) : len(tokens)] = example.answer_ids
    text = {name: torch.from_numpy(value) for name, value in (("input_ids", input_ids), ("labels", labels), ("attention_mask", mask))}
    return text | {"mm_token_type_ids": (text["input_ids"] == image_token).int()}


def images_of(model, batch: list[Example]) -> dict[str, torch.Tensor | dict]:
    """What the frozen vision tower sees in the batch; a picture that several examples share is looked at once."""
    images = {id(image): image for example in batch for image in example.images}
    pixels, grid = patchify(list(images.values()), PATCHES)
    with torch.no_grad():
        seen = dict(zip(images, zip(model.model.get_image_features(pixels, grid).pooler_output, grid)))
    tokens, grids = zip(*(seen[id(image)] for example in batch for image in example.images))
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens)}, "image_grid_thw": torch.stack(grids)}


def build_model(tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained policy; the vocabulary is padded to a multiple of 64 as real checkpoints' are."""
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])))
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64 + 64, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            bos_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(
            depth=3, hidden_size=96, intermediate_size=256, num_heads=4, patch_size=PATCHES.patch, spatial_merge_size=PATCHES.merge,
            temporal_patch_size=PATCHES.temporal, window_size=112, fullatt_block_indexes=[0, 1, 2], out_hidden_size=128,
        ),
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # transformers' std of 0.02 suits wide models; at this width it takes four times as many steps
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0.0, 0.05 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    return model


class Pictures(IterableDataset):
    """Batches of (images, looks, boxes) of one size, see `token_truth`."""

    def __init__(self, batch: int, steps: int, seed: int):
        self.batch, self.steps, self.seed = batch, steps, seed

    def __iter__(self):
        torch.set_num_threads(1)
        rng = np.random.default_rng([self.seed, 1])
        for step in range(self.steps):
            size = PROMPT.target_size if step % 4 else PROMPT.reference_size
            images, looks, boxes = [], [], []
            while len(images) < self.batch:
                video = make_video(int(rng.integers(HELD_OUT)), WorldConfig(frames=(8, 8)))
                for t in rng.choice(video.num_frames, 4, replace=False):
                    look, box = token_truth(video, t, size)
                    images.append(resize(video.frame(t), size))
                    looks.append(look)
                    boxes.append(box)
            yield images, torch.from_numpy(np.stack(looks)), torch.from_numpy(np.stack(boxes))


def token_truth(video: ToyVideo, t: int, size_hw) -> tuple[np.ndarray, np.ndarray]:
    """For every visual token, row by row: (colour, kind) of the shape that covers most of its cell, -1 where there is none, int64
    (tokens, 2), and that shape's box over the size of the picture, float32 (tokens, 4)."""
    rows, columns = (v // (PATCHES.patch * PATCHES.merge) for v in size_hw)
    masks_NHW = video.masks(t)
    height, width = masks_NHW.shape[1:]
    cells = masks_NHW.reshape(len(masks_NHW), rows, height // rows, columns, width // columns).mean((2, 4)).reshape(len(masks_NHW), -1)
    best, covered = cells.argmax(0), cells.max(0) > 0.05
    looks = np.array([(list(COLOURS).index(s.colour), SHAPES.index(s.kind)) for s in video.shapes])
    boxes = np.array([mask_to_box(m) if m.any() else (0, 0, 0, 0) for m in masks_NHW], np.float32) / np.float32([width, height, width, height])
    return np.where(covered[:, None], looks[best], -1), boxes[best] * covered[:, None].astype(np.float32)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum (Jordan et al. 2024), its updates as large as AdamW's (0.2 sqrt(larger side): Liu et al. 2025, arXiv 2502.16982).

    torch.optim.Muon is the same in bfloat16, for which many CPUs take 15 times as long.
    """

    def __init__(self, matrices: list[torch.Tensor], momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(average, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update, alpha=group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonalise(matrix_MN: torch.Tensor) -> torch.Tensor:
    """About U V^T of the singular value decomposition U S V^T: five Newton-Schulz steps with Muon's coefficients."""
    x = matrix_MN / matrix_MN.norm().clamp(min=1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix_MN.shape[0] > matrix_MN.shape[1] else x


class Optimizers:
    """Muon for the matrices inside the network, AdamW for embeddings, convolutions, norms and biases, at one learning rate."""

    def __init__(self, parameters, embedding: torch.Tensor | None = None) -> None:
        parameters = [p for p in parameters if p.requires_grad]
        inner = [p.ndim == 2 and p is not embedding for p in parameters]
        matrices, others = ([p for p, m in zip(parameters, inner) if m is wanted] for wanted in (True, False))
        self.parts = (
            Muon(matrices),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.02),
        )
        self.parameters = parameters

    def step(self, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step(), part.zero_grad()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def learning_rate(peak: float, step: int, last: int) -> float:
    """Warm-up over 50 steps, then a half cosine to a tenth."""
    return peak * min(1.0, step / 50) * (0.55 + 0.45 * math.cos(math.pi * step / last))


def pretrain_vision(model, tokenizer, steps: int, batch: int, lr: float, seed: int) -> list[dict]:
    """Teaches the vision tower to say what is where: a visual token points along the language model's own (frozen) embeddings of
    the colour and the kind of what it sees, and a linear head, thrown away afterwards, reads the box from it.

    Real policies start from towers that are aligned with words; without that the language model does not connect a word with the
    thing that it names for thousands of steps.
    """
    words = [model.get_input_embeddings().weight.detach()[tokenizer.convert_tokens_to_ids(["Ġ" + w for w in names])] for names in (COLOURS, SHAPES)]
    visual = model.model.visual
    head = torch.nn.Linear(visual.config.out_hidden_size, 5)  # whether there is a shape, and its box
    optimizers = Optimizers([*visual.parameters(), *head.parameters()])
    curve, began = [], time.time()
    for step, (images, looks, boxes) in enumerate(DataLoader(Pictures(batch, steps, seed), batch_size=None, collate_fn=tuple, num_workers=1, prefetch_factor=4), 1):
        pixels, grid = patchify(images, PATCHES)
        seen = torch.cat(tuple(model.model.get_image_features(pixels, grid).pooler_output))
        looks, boxes = looks.flatten(0, 1), boxes.flatten(0, 1)
        there = looks[:, 0] >= 0
        out = head(seen)
        logits = [WORD_SCALE * seen[there] @ words_ND.T for words_ND in words]
        distance = (out[:, 1:][there] - boxes[there]).abs().mean()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(out[:, 0], there.float()) + 5.0 * distance
        loss = loss + sum(torch.nn.functional.cross_entropy(l, looks[there, i]) for i, l in enumerate(logits))
        loss.backward()
        optimizers.step(learning_rate(lr, step, steps))
        if step % 50 == 0:
            right = [round((l.argmax(-1) == looks[there, i]).float().mean().item(), 3) for i, l in enumerate(logits)]
            curve.append({"step": step, "colour": right[0], "kind": right[1], "box_error": round(distance.item(), 4), "seconds": round(time.time() - began)})
            print("vision", json.dumps(curve[-1]), flush=True)
    return curve


def save_processors(tokenizer, folder: Path) -> None:
    """Everything of the checkpoint folder but config and weights."""
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    Qwen2VLImageProcessor(
        min_pixels=28 * 28, max_pixels=1024 * 1024, patch_size=PATCHES.patch, merge_size=PATCHES.merge, temporal_patch_size=PATCHES.temporal,
        image_mean=PATCHES.mean, image_std=PATCHES.std,
    ).save_pretrained(folder)  # fmt: skip


@torch.no_grad()
def greedy_answers(model, tokenizer, stage: Stage, count: int, grey: bool = False) -> list[tuple[Answer, Target]]:
    """What the model says about held-out videos of this stage, and what was meant."""
    model.eval()
    builder = PromptBuilder(tokenizer.name_or_path, PROMPT)
    rng, examples, seed = np.random.default_rng(0), [], HELD_OUT
    while len(examples) < count:
        examples += examples_of(make_video(seed, stage.world), builder, stage, rng, limit=1, grey=grey)
        seed += 1
    examples.sort(key=lambda e: len(e.prompt_ids))
    found = []
    for start in range(0, count, 50):
        batch = examples[start : start + 50]
        inputs = collate([replace(e, answer_ids=e.answer_ids[:0]) for e in batch], tokenizer.pad_token_id, builder.image_pad_id)
        width = inputs["input_ids"].shape[1]
        for row, example in enumerate(batch):  # generation wants the padding on the left
            shift = width - len(example.prompt_ids)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                inputs[name][row] = torch.roll(inputs[name][row], shift)
        del inputs["labels"]
        pixels, grid = patchify([image for example in batch for image in example.images], PATCHES)
        out = model.generate(**inputs, pixel_values=pixels, image_grid_thw=grid, do_sample=False, max_new_tokens=110)
        for example, text in zip(batch, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)):
            found.append((parse_answer(text), Target(tuple(PROMPT.target_size), example.target_boxes.tolist())))
    model.train()
    return found


def evaluate(model, tokenizer, stage: Stage, grey: bool = False) -> dict[str, float]:
    """Held-out and greedy: mean box IoU (matched objects) and the share of well-formed answers; `grey`: and of `[]` to grey frames."""
    found = greedy_answers(model, tokenizer, stage, 200)
    result = {"box_iou": np.mean([mean_box_iou(said, truth) for said, truth in found]), "well_formed": np.mean([said.well_formed for said, _ in found])}
    if grey:
        result["nothing_in_grey"] = np.mean([said.strict and said.n_items == 0 for said, _ in greedy_answers(model, tokenizer, stage, 50, grey=True)])
    return {name: round(float(value), 4) for name, value in result.items()}


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Tokenizer, processors and a model whose vision tower has been taught, in `work`, with the state of step 0."""
    shutil.rmtree(work, ignore_errors=True)
    rng = np.random.default_rng(args.seed)
    corpus = []
    for seed in range(300):
        video = make_video(seed)
        for query in video.queries:
            t = int(rng.integers(video.num_frames))
            if all(video.masks(t)[i].any() for i in query.targets):
                corpus += [query.text + "? target", answer(video, query, t, tuple(PROMPT.target_size), rng, hedged=0.5)]
    tokenizer = train_tokenizer(corpus, numbers=113)
    model = build_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    save_processors(tokenizer, work)
    began = time.time()
    vision_curve = pretrain_vision(model, tokenizer, args.vision_steps, 96, args.lr, args.seed)
    model.save_pretrained(work)
    save_state(work / "state.pt", {"step": 0, "optimizers": None, "curve": [], "vision_curve": vision_curve, "seconds": time.time() - began})


def save_state(file: Path, state: dict) -> None:
    torch.save(state, file.with_suffix(".partial"))
    os.replace(file.with_suffix(".partial"), file)


def fit(work: Path, stream: Callable[[int], IterableDataset], steps: int, lr: float, every: int, evaluated: Callable[..., dict]) -> dict:
    """Trains the language model of the checkpoint in `work` from the step that its state holds to the last one; returns the new state.

    `stream` gives the batches after a step; `lr` is the schedule's peak. Every so many steps, and at the end, `evaluated(model, step)` adds to
    the learning curve and everything is saved. The vision tower is frozen.
    """
    state = torch.load(work / "state.pt", weights_only=True)
    tokenizer = AutoTokenizer.from_pretrained(work)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(work)
    model.model.visual.requires_grad_(False)  # it has learned its part
    optimizers = Optimizers(model.parameters(), model.get_input_embeddings().weight)
    if state["optimizers"] is not None:
        optimizers.load_state_dict(state["optimizers"])
    began = time.time() - state["seconds"]
    batches = DataLoader(stream(state["step"]), batch_size=None, num_workers=1, prefetch_factor=4)
    for step, batch in enumerate(batches, state["step"] + 1):
        loss = model(**collate(batch, tokenizer.pad_token_id, model.config.image_token_id), **images_of(model, batch)).loss
        loss.backward()
        optimizers.step(learning_rate(lr, step, steps))
        if step % 25 == 0:
            print(f"step {step}/{steps} loss {loss.item():.4f} {time.time() - began:.0f}s", flush=True)
        if step % every and step != steps:
            continue
        point = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - began)} | evaluated(model, step)
        print(json.dumps(point), flush=True)
        model.save_pretrained(work)
        state |= {"step": step, "optimizers": optimizers.state_dict(), "curve": [*state["curve"], point], "seconds": time.time() - began}
        save_state(work / "state.pt", state)
    return state


def publish(work: Path, out: Path, training: dict) -> None:
    """A trained checkpoint gets its record, `training.json`, and its name."""
    (work / "state.pt").unlink(missing_ok=True)
    (work / "training.json").write_text(json.dumps(training, indent=1))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(work, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vision-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    work = args.out.with_name(args.out.name + ".partial")
    base, trained = work / "base", work / "policy"
    if not (base / "state.pt").exists():
        prepare(args, base)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def evaluated(model, step: int) -> dict:
        stage = stage_of(step)
        return {"stage": STAGES.index(stage)} | evaluate(model, tokenizer, stage)

    state = fit(base, lambda done: Stream(base, args.batch, args.seed, done), ENDS[-1], args.lr, args.eval_every, evaluated)
    settings = ColdStart()
    losses = cold_start(base, work, trained, settings)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained)
    training = {
        "recipe": {k: v for k, v in vars(args).items() if k != "out"},
        "vision_curve": state["vision_curve"],
        "stages": [asdict(stage) for stage in STAGES],
        "curve": state["curve"],
        "cold_start": {"recipe": asdict(settings), "curve": losses, "after": evaluate(model, tokenizer, STAGES[-1], grey=True)},
    }
    publish(trained, args.out, training)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
