"""Trains the toy SAM2: a small `Sam2Model` of the official layout on shapes of the toy world, prompted by boxes and points.

    OMP_NUM_THREADS=1 python -m examples.toy.train_sam2 --out examples/toy/models/sam2 --seconds 1500

Writes a Hugging Face folder (config.json, preprocessor_config.json, model.safetensors) and training.json with the recipe
and the learning curve. Runs on one CPU core. `--seconds` counts the time of that core, not the clock on the wall, so a busy
machine only delays the result; the number of steps still depends on the machine, while `--steps` is repeatable on one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2Attention

from rollout.toy_world import WorldConfig, make_video
from segmentation_service import geometry
from segmentation_service.masks import mask_iou, mask_to_box, mask_to_point
from segmentation_service.prompts import ObjectPrompt, clip_prompt
from segmentation_service.sam2_decoding import prompt_points
from segmentation_service.sam2_transformers import TransformersSam2
from segmentation_service.segmenter import Segmenter

KINDS = {"box": 0.3, "box_point": 0.3, "box_point_negative": 0.3, "point": 0.1}
"""Forms of prompts and their share of the training steps. A step has one form, since SAM2 does not mix forms in a batch."""

# Far from the seeds of the episodes, so that the policy never meets a video that SAM2 was trained on.
TRAIN_SEEDS, HELD_OUT_SEEDS = 2_000_000_000, 3_000_000_000
WORLD = WorldConfig(frames=(8, 8))
CROWDED = WorldConfig(frames=(8, 8), objects=(2, 5))  # for training: with one object in view, the prompt does not matter
SMALLEST = 16  # visible pixels; below that nothing can be told from the grain

IMAGE_SIZE = 192  # frames are 96x128: at the official stride of 4 for masks, a mask cell is 2 x 2.7 pixels


def make_model(seed: int) -> Sam2Model:
    """An untrained model of 0.57 million parameters. Strides, stages and heads are the official ones, made narrow."""
    widths = [16, 32, 64, 128]
    config = Sam2Config(
        vision_config=dict(
            backbone_config=dict(
                hidden_size=widths[0],
                image_size=[IMAGE_SIZE, IMAGE_SIZE],
                embed_dim_per_stage=widths,
                num_attention_heads_per_stage=[1, 2, 4, 8],
                blocks_per_stage=[1, 1, 3, 1],
                window_size_per_stage=[8, 4, 12, 6],
                global_attention_blocks=[3, 4],
                window_positional_embedding_background_size=[8, 8],
            ),
            backbone_channel_list=widths[::-1],
            backbone_feature_sizes=[[IMAGE_SIZE // s] * 2 for s in (4, 8, 16)],
            fpn_hidden_size=64,
        ),
        prompt_encoder_config=dict(hidden_size=64, image_size=IMAGE_SIZE, patch_size=16),
        mask_decoder_config=dict(
            hidden_size=64,
            mlp_dim=256,
            num_attention_heads=4,
            iou_head_hidden_dim=64,
            # Only the single-mask token is trained; the fallback to the other three would pick noise.
            dynamic_multimask_via_stability=False,
        ),
    )
    torch.manual_seed(seed)
    model = Sam2Model(config)
    for module in model.modules():
        # transformers draws everything from N(0, 0.02), made for wide layers; PyTorch's own initialisation scales with width.
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Embedding)):
            module.reset_parameters()
        if isinstance(module, torch.nn.Embedding):
            module.weight.data *= 0.3  # fainter than the positional encodings that they are added to
    for attention in model.mask_decoder.modules():
        if isinstance(attention, Sam2Attention):
            # Equal query and key projections make attention start as a similarity, so that a prompt at a place finds the
            # image at that place after some 100 steps; from independent ones it still ignored its prompts after 300.
            attention.q_proj.weight.data *= 3
            attention.k_proj.weight.data.copy_(attention.q_proj.weight)
    # SAM2 has one positional encoding for image and prompts; transformers keeps two copies and draws them apart.
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)
    return model


def make_processor() -> Sam2ImageProcessor:
    return Sam2ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, mask_size={"height": IMAGE_SIZE // 4, "width": IMAGE_SIZE // 4})


# ------------------------------------------------------------------------------------------------------------- data


def scenes(first_seed: int, world: WorldConfig = WORLD, frames_per_video: int = 2) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (frame uint8 (H, W, 3), masks bool (N, H, W)) with N >= 1 objects of at least SMALLEST visible pixels."""
    seed = first_seed
    while True:
        video = make_video(seed, world)
        rng = np.random.default_rng([seed, 7])
        for t in rng.choice(video.num_frames, frames_per_video, replace=False):
            masks_NHW = video.masks(int(t))
            masks_NHW = masks_NHW[masks_NHW.sum((1, 2)) >= SMALLEST]
            if len(masks_NHW):
                yield video.frame(int(t)), masks_NHW
        seed += 1


def make_prompt(mask_HW: np.ndarray, kind: str, rng: np.random.Generator, jitter: float = 1.0) -> ObjectPrompt:
    """A prompt for a mask, as imprecise as a policy's answer: box corners off by up to a quarter of its side at jitter 1."""
    hw = mask_HW.shape
    x1, y1, x2, y2 = mask_to_box(mask_HW)
    box, points, labels = None, [], []
    if "box" in kind:
        spread = jitter * rng.uniform(0, 0.125) * np.array([x2 - x1 + 1, y2 - y1 + 1] * 2)
        moved = np.array([x1, y1, x2, y2]) + (rng.normal(size=4) * spread).clip(-2 * spread, 2 * spread) + jitter * rng.uniform(-1, 1, 4)
        box = geometry.round_boxes([*np.minimum(moved[:2], moved[2:]), *np.maximum(moved[:2], moved[2:])], hw)
    if "point" in kind:
        if rng.random() < 0.5 * jitter:  # anywhere on the object
            y, x = rng.choice(np.argwhere(mask_HW))
            point = np.array([x, y], float)
        else:
            point = np.array(mask_to_point(mask_HW)) + rng.normal(size=2) * jitter
        points.append(geometry.round_points(point, hw))
        labels.append(1)
    if "negative" in kind:
        margin = 12
        around = ~mask_HW
        around[: max(y1 - margin, 0)] = around[y2 + margin + 1 :] = False
        around[:, : max(x1 - margin, 0)] = around[:, x2 + margin + 1 :] = False
        y, x = rng.choice(np.argwhere(around))
        points.append(np.array([x, y]))
        labels.append(0)
    prompt = clip_prompt(ObjectPrompt(None if box is None else tuple(box), tuple(map(tuple, points)), tuple(labels)), hw)
    assert prompt is not None  # every box and point was rounded into the frame
    return prompt


def make_batch(source, processor, kind: str, rng: np.random.Generator, images: int, prompts: int):
    """(pixels (B, 3, S, S), points (B, P, K, 2) in pixels of the model, labels (B, P, K), masks float (B, P, H, W))."""
    frames, points, labels, targets = [], [], [], []
    for _ in range(images):
        frame_HW3, masks_NHW = next(source)
        chosen = np.concatenate([rng.permutation(len(masks_NHW)) for _ in range(math.ceil(prompts / len(masks_NHW)))])[:prompts]
        made = [make_prompt(masks_NHW[i], kind, rng) for i in chosen]
        points_PK2, labels_PK = prompt_points(made)
        frames.append(frame_HW3)
        points.append(geometry.scale_points(points_PK2, frame_HW3.shape[:2], (IMAGE_SIZE, IMAGE_SIZE)))
        labels.append(labels_PK)
        targets.append(masks_NHW[chosen])
    pixels = processor(images=frames, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor(np.stack(points), dtype=torch.float32), torch.tensor(np.stack(labels)), torch.tensor(np.stack(targets)).float()


# --------------------------------------------------------------------------------------------------------- learning


def loss_of(model: Sam2Model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, mean IoU of the batch): binary cross-entropy and dice at the frame's own resolution, and the IoU head's error."""
    pixels, points, labels, targets_BPHW = batch
    out = model(pixel_values=pixels, input_points=points, input_labels=labels, multimask_output=False)
    logits_BPHW = F.interpolate(out.pred_masks.flatten(0, 1), size=targets_BPHW.shape[-2:], mode="bilinear", align_corners=False).view_as(targets_BPHW)
    probabilities = logits_BPHW.sigmoid()
    overlap = (probabilities * targets_BPHW).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (probabilities.sum((-2, -1)) + targets_BPHW.sum((-2, -1)) + 1)
    bce = F.binary_cross_entropy_with_logits(logits_BPHW, targets_BPHW)
    with torch.no_grad():
        hard, truth = logits_BPHW > 0, targets_BPHW > 0.5
        iou = (hard & truth).sum((-2, -1)) / (hard | truth).sum((-2, -1)).clamp(min=1)
    iou_error = F.mse_loss(out.iou_scores[..., 0], iou)
    # Every prompt of this training names an object that is there; SAM2's video model reads this score.
    present = F.softplus(-out.object_score_logits).mean()
    return dice.mean() + 5 * bce + 0.2 * iou_error + 0.01 * present, iou.mean()


def one_cycle(progress: float, peak: float, warm: float = 0.08) -> float:
    """Learning rate at a progress of 0..1: linear warm-up, then a cosine to a hundredth of the peak."""
    if progress < warm:
        return peak * (0.04 + 0.96 * progress / warm)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm)))))


def held_out(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    source = scenes(HELD_OUT_SEEDS, frames_per_video=1)
    return [next(source) for _ in range(count)]


def evaluate(segmenter: Segmenter, scenes_list, jitter: float = 1.0) -> dict[str, float]:
    """Mean IoU over all objects of held-out scenes for each kind of prompt, through the real `Segmenter`."""
    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number, (frame_HW3, masks_NHW) in enumerate(scenes_list):
        rng = np.random.default_rng([HELD_OUT_SEEDS, number])
        hypotheses = [[make_prompt(mask, kind, rng, jitter) for mask in masks_NHW] for kind in KINDS]
        for kind, predicted in zip(KINDS, segmenter.segment_frame(frame_HW3, hypotheses)):
            scores[kind] += [mask_iou(a, b) for a, b in zip(predicted, masks_NHW)]
    return {kind: round(float(np.mean(values)), 4) for kind, values in scores.items()}


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, processor = make_model(args.seed), make_processor()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters", flush=True)
    rng = np.random.default_rng([args.seed, 1])
    source = scenes(TRAIN_SEEDS + 10_000_000 * args.seed, CROWDED)
    test_scenes = held_out(args.eval_scenes)
    # Biases, norms and embeddings are not decayed.
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name and "token.weight" not in name]
    undecayed = [p for p in model.parameters() if not any(p is q for q in decayed)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": undecayed, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98))
    curve: list[dict] = []
    started, step, progress, last_eval, recent = time.process_time(), 0, 0.0, 0.0, []

    def measure() -> None:
        segmenter = Segmenter("in memory", TransformersSam2(model, processor))
        curve.append({"step": step, "progress": round(progress, 3), "held_out_iou": evaluate(segmenter, test_scenes)})
        print(f"step {step}  {time.process_time() - started:.0f} s  held-out IoU {curve[-1]['held_out_iou']}", flush=True)
        model.requires_grad_(True)

    while progress < 1.0:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        batch = make_batch(source, processor, kind, rng, args.images, args.prompts)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(progress, args.lr)
        model.train()
        loss, iou = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent = (recent + [float(iou)])[-50:]
        progress = step / args.steps if args.steps else (time.process_time() - started) / args.seconds
        if step % 50 == 0:
            print(f"step {step}  {time.process_time() - started:.0f} s  loss {loss.item():.3f}  training IoU {np.mean(recent):.3f}", flush=True)
        if progress - last_eval >= 0.1 and progress < 1.0:
            last_eval = progress
            measure()
    measure()
    save(args, model, processor, {"parameters": parameters, "steps": step, "cpu_seconds": round(time.process_time() - started), "curve": curve})


def save(args: argparse.Namespace, model: Sam2Model, processor: Sam2ImageProcessor, record: dict) -> None:
    """Write the folder under a temporary name, measure it as loaded from there, and put it in its place."""
    out = Path(args.out)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.eval().save_pretrained(temporary)
    processor.save_pretrained(temporary)
    segmenter = Segmenter(str(temporary), device="cpu", dtype="float32")
    final_scenes = held_out(args.final_scenes)
    record |= {
        "recipe": {"seed": args.seed, "images_per_step": args.images, "prompts_per_image": args.prompts, "peak_lr": args.lr,
                   "optimizer": "AdamW (0.9, 0.98), weight decay 0.01, gradient norm 1, one cycle (8% warm-up, cosine)",
                   "loss": "dice + 5 BCE at 96x128 + 0.2 IoU-head MSE + 0.01 object score", "prompt_shares": KINDS,
                   "image_size": IMAGE_SIZE, "training_images": record["steps"] * args.images},
        "held_out": {"scenes": len(final_scenes), "objects": sum(len(masks) for _, masks in final_scenes),
                     "iou_jittered_prompts": evaluate(segmenter, final_scenes), "iou_exact_prompts": evaluate(segmenter, final_scenes, jitter=0.0)},
    }  # fmt: skip
    (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(out)
    print(f"{out}: held-out IoU {record['held_out']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="examples/toy/models/sam2", help="folder to write")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=1500, help="CPU time to train")
    length.add_argument("--steps", type=int, default=0, help="how many steps to train, instead of --seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=8, help="images a step")
    parser.add_argument("--prompts", type=int, default=4, help="prompts an image")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--eval-scenes", type=int, default=40, help="held-out scenes at each tenth of the way")
    parser.add_argument("--final-scenes", type=int, default=300, help="held-out scenes at the end")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
