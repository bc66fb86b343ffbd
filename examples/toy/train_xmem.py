"""Trains the toy XMem: an `XMem` of the published layout, made narrow, on short clips of the toy world.

    OMP_NUM_THREADS=1 python -m examples.toy.train_xmem --out examples/toy/models/xmem

Writes a folder: model.safetensors, config.json with the dimensions, and training.json with the recipe and the learning curve.
Runs on one CPU core. Every `--save-every` steps the state of the training goes to a file beside the folder; the same command
continues from it, and a larger or smaller `--steps` then moves its end. Batches depend on seed and step alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from examples.toy.train_sam2 import CROWDED, HELD_OUT_SEEDS, SMALLEST, TRAIN_SEEDS, one_cycle
from rollout.toy_world import ToyVideo, WorldConfig, make_video
from segmentation_service.config import PropagationConfig
from segmentation_service.masks import mask_iou
from segmentation_service.propagation import Propagator
from segmentation_service.resizing import normalised, resized
from segmentation_service.video import FramesInMemory
from segmentation_service.xmem import XMem, XMemConfig, XMemDims, load_xmem
from segmentation_service.xmem.network import ImageFeatures
from segmentation_service.xmem.reading import memory_rows, query_rows, soft_aggregate

DIMS = XMemDims(
    key=32, value=48, hidden=24, key_planes=(12, 16, 24), key_blocks=(1, 1, 2), value_planes=(12, 24, 48), value_blocks=(1, 1, 1),
    decoder=(48, 32, 32), update=32,
)  # fmt: skip
SLOTS = 3  # objects tracked in a clip, at most; others in view are background
STEPS_BETWEEN = (1, 1, 2, 3, 5, 8)  # frames from one of a clip to the next, drawn once a clip
TEST_FRAMES = 24
DISTANCES = ((1, 7), (8, 15), (16, 23))  # frames from the given mask, for the record
SIZES = (96, 144)
"""Short side of the images in the first and the second half of the training. At 96, the frames' own, a position of the stride-16
grid is as large as a small shape; the second is what the weights are for."""

# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Batch:
    """B clips of T frames. images: normalised (T, B, 3, H, W). labels: (T, B, H, W), 0 the background, 1 to SLOTS the objects.
    present: bool (SLOTS, B), the slots that hold an object."""

    images: torch.Tensor
    labels: torch.Tensor
    present: torch.Tensor


def make_clip(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(frames uint8 (T, H, W, 3), labels (T, H, W), number of objects N >= 1); all N are visible on the first frame."""
    while True:
        gap = int(rng.choice(STEPS_BETWEEN))
        frames = gap * (length - 1) + 1
        video = make_video(TRAIN_SEEDS + int(rng.integers(2**29)), WorldConfig(frames=(max(frames, 12), max(frames, 36)), objects=CROWDED.objects))
        times = int(rng.integers(video.num_frames - frames + 1)) + gap * np.arange(length)
        if rng.random() < 0.5:
            times = times[::-1]
        masks_TNHW = np.stack([video.masks(int(t)) for t in times])
        tracked = rng.permutation(np.flatnonzero(masks_TNHW[0].sum((1, 2)) >= SMALLEST))[: int(rng.integers(1, SLOTS + 1))]
        if len(tracked):
            labels_THW = (masks_TNHW[:, tracked] * np.arange(1, len(tracked) + 1)[:, None, None]).sum(1)
            return np.stack([video.frame(int(t)) for t in times]), labels_THW, len(tracked)


def make_batch(rng: np.random.Generator, clips: int, length: int, size: int) -> Batch:
    """Clips with their frames brought to the short side `size` as for the tracker, and their labels to the nearest pixel."""
    made = [make_clip(rng, length) for _ in range(clips)]
    pixels = torch.from_numpy(np.concatenate([frames for frames, *_ in made])).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(np.concatenate([labels for _, labels, _ in made]))[:, None]
    hw = resized(pixels.shape[2:], size)
    images = normalised(F.interpolate(pixels, hw, mode="bilinear", align_corners=False)).unflatten(0, (clips, length)).transpose(0, 1)
    labels = F.interpolate(labels.float(), hw, mode="nearest").long()[:, 0].unflatten(0, (clips, length)).transpose(0, 1)
    present = torch.tensor([[slot < count for *_, count in made] for slot in range(SLOTS)])
    return Batch(images.contiguous(), labels.contiguous(), present)


# --------------------------------------------------------------------------------------------------------- learning


def unroll(network: XMem, batch: Batch, rng: np.random.Generator, top_k: int) -> list[torch.Tensor]:
    """Probabilities (1 + SLOTS, B, H, W) on every frame but the first, by the tracker's own steps, with gradients.

    Each frame after the first is a memory frame by the toss of a coin, so that both rhythms of the sensory memory are learned.
    """
    length, clips = batch.images.shape[:2]
    slot_O, clip_O = batch.present.nonzero(as_tuple=True)
    together = network.encode_image(batch.images.flatten(0, 1))
    features = [ImageFeatures(*frame) for frame in zip(*(x.unflatten(0, (length, clips)) for x in vars(together).values()))]
    grid = together.key.shape[2:]
    hidden_OChw = together.key.new_zeros((len(slot_O), network.dims.hidden, *grid))
    memory: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows (B, Q, 2 C_k + 1) and values (O, C_v, Q) of each memory frame

    def remember(t: int, probs: torch.Tensor, hidden_OChw: torch.Tensor) -> torch.Tensor:
        own = probs[1 + slot_O, clip_O]
        masks_O2HW = torch.stack([own, probs[1:].sum(0)[clip_O] - own], 1)
        shared = of_objects(network.value_encoder.shared_parts(batch.images[t], features[t].f16), clip_O)
        value_OVhw, hidden_OChw = network.value_encoder(shared, masks_O2HW, hidden_OChw, deep=True)
        rows = memory_rows(as_rows(features[t].key), as_rows(features[t].shrinkage))
        memory.append((rows.unflatten(0, (clips, -1)), value_OVhw.flatten(2)))
        return hidden_OChw

    given = (batch.labels[0] == torch.arange(1, SLOTS + 1)[:, None, None, None]).float()
    hidden_OChw = remember(0, soft_aggregate(given), hidden_OChw)
    outputs = []
    for t in range(1, length):
        is_memory_frame = bool(rng.random() < 0.5) and t < length - 1
        queries = query_rows(as_rows(features[t].key), as_rows(features[t].selection)).unflatten(0, (clips, -1))
        scores_BQN = queries @ torch.cat([rows for rows, _ in memory], 1).mT
        least = scores_BQN.topk(min(top_k, scores_BQN.shape[2]), dim=2).values[..., -1:]
        weights_BQN = scores_BQN.masked_fill(scores_BQN < least, -math.inf).softmax(2)
        readout = torch.cat([values for _, values in memory], 2) @ weights_BQN[clip_O].mT
        shared = of_objects(network.decoder.shared_parts(features[t]), clip_O)
        logits_O1hw, hidden_OChw = network.decoder(shared, readout.unflatten(2, grid), hidden_OChw, light=not is_memory_frame)
        full = F.interpolate(logits_O1hw, scale_factor=4, mode="bilinear", align_corners=False)
        probs = soft_aggregate(torch.zeros_like(given).index_put((slot_O, clip_O), full[:, 0].sigmoid()))
        if is_memory_frame:
            hidden_OChw = remember(t, probs, hidden_OChw)
        outputs.append(probs)
    return outputs


def as_rows(x_BChw: torch.Tensor) -> torch.Tensor:
    return x_BChw.flatten(2).mT.flatten(0, 1)


def of_objects(shared, clip_O: torch.Tensor):
    """What was computed once a clip, repeated for each object of the clip."""
    return tuple(of_objects(part, clip_O) for part in shared) if isinstance(shared, tuple) else shared[clip_O]


def loss_of(outputs: list[torch.Tensor], batch: Batch, hardest: float) -> tuple[torch.Tensor, float]:
    """(loss, mean IoU): cross-entropy of the `hardest` share of the pixels of each frame, and dice of each object."""
    losses, ious = [], []
    slot_O, clip_O = batch.present.nonzero(as_tuple=True)
    for probs, labels_BHW in zip(outputs, batch.labels[1:]):
        wrong_BP = -probs.gather(0, labels_BHW[None])[0].clamp_min(1e-7).log().flatten(1)
        entropy = wrong_BP.topk(max(1, round(hardest * wrong_BP.shape[1])), dim=1).values.mean()
        truth_OP = (labels_BHW[clip_O] == 1 + slot_O[:, None, None]).flatten(1).float()
        own_OP = probs[1 + slot_O, clip_O].flatten(1)
        dice = 1 - (2 * (own_OP * truth_OP).sum(1) + 1) / (own_OP.sum(1) + truth_OP.sum(1) + 1)
        losses.append(entropy + dice.mean())
        with torch.no_grad():
            found = (probs.argmax(0)[clip_O] == 1 + slot_O[:, None, None]).flatten(1)
            shared, either = (found & (truth_OP > 0)).sum(1), (found | (truth_OP > 0)).sum(1)
            ious.append(float(torch.where(either > 0, shared / either.clamp(min=1), 1.0).mean()))
    return torch.stack(losses).mean(), float(np.mean(ious))


# -------------------------------------------------------------------------------------------------------- measuring


def held_out(count: int) -> list[ToyVideo]:
    """Videos of TEST_FRAMES frames that no training has seen."""
    return [make_video(HELD_OUT_SEEDS + i, WorldConfig(frames=(TEST_FRAMES, TEST_FRAMES))) for i in range(count)]


def evaluate(propagator: Propagator, videos: list[ToyVideo]) -> dict:
    """Mean J of the objects that are visible on the first frame, over all later frames, from their true masks on the first.

    Also by number of objects tracked, and by distance from the first frame. Where an object is out of view, an empty mask has J = 1.
    """
    scores: list[tuple[int, int, float]] = []  # objects, distance, J
    for video in videos:
        truth_TNHW = np.stack([video.masks(t) for t in range(video.num_frames)])
        seen = truth_TNHW[0].sum((1, 2)) >= SMALLEST
        truth_TNHW = truth_TNHW[:, seen]
        frames = FramesInMemory([video.frame(t) for t in range(video.num_frames)])
        for t, _, masks_NHW in propagator.propagate(frames, 0, [truth_TNHW[0]]):
            if t > 0:
                scores += [(len(masks_NHW), t, mask_iou(a, b)) for a, b in zip(masks_NHW, truth_TNHW[t])]

    def mean(keep) -> float:
        return round(float(np.mean([j for count, t, j in scores if keep(count, t)])), 4)

    return {
        "J": mean(lambda count, t: True),
        "J_by_objects": {str(n): mean(lambda count, t: count == n) for n in sorted({count for count, *_ in scores})},
        "J_by_distance": {f"{low}-{high}": mean(lambda count, t: low <= t <= high) for low, high in DISTANCES},
    }


# ---------------------------------------------------------------------------------------------------------- running


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    network = XMem(DIMS)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{parameters / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    step, cpu_seconds, curve, recent = 0, 0.0, [], []
    state_file = Path(args.out).with_name(f".{Path(args.out).name}.training.pt")
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if (state["seed"], state["clips"], state["frames"], state["lr"]) != (args.seed, args.clips, args.frames, args.lr):
            raise SystemExit(f"{state_file} is of a training with other settings; give those, or remove it to start again")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step, cpu_seconds, curve = state["step"], state["cpu_seconds"], state["curve"]
        print(f"continuing at step {step}", flush=True)
    test_videos = held_out(args.eval_videos)
    started = time.process_time() - cpu_seconds

    while step < args.steps:
        progress = step / args.steps
        rng = np.random.default_rng([args.seed, 1, step])
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(progress, args.lr)
        # For its last third with the statistics that inference will use.
        network.train(progress < 2 / 3)
        size = SIZES[progress >= 0.5]
        batch = make_batch(rng, args.clips, args.frames, size)
        # All pixels at first, then, as XMem was trained, the hardest 15 percent.
        loss, iou = loss_of(unroll(network, batch, rng, XMemConfig().top_k), batch, 1 - 0.85 * min(1.0, progress / 0.3))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent = (recent + [iou])[-50:]
        if step % 25 == 0:
            print(f"step {step}  {time.process_time() - started:.0f} s  loss {loss.item():.3f}  training IoU {np.mean(recent):.3f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            curve.append({"step": step, "size": size, **evaluate(Propagator(frozen(network), PropagationConfig(size=size)), test_videos)})
            print(f"step {step}  {time.process_time() - started:.0f} s  held-out {curve[-1]}", flush=True)
            state = {"seed": args.seed, "clips": args.clips, "frames": args.frames, "lr": args.lr, "step": step, "curve": curve,
                     "cpu_seconds": time.process_time() - started, "network": network.state_dict(), "optimizer": optimizer.state_dict()}  # fmt: skip
            partial = state_file.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, state_file)
    save(args, network, {"parameters": parameters, "steps": step, "cpu_seconds": round(time.process_time() - started), "curve": curve})


def frozen(network: XMem) -> XMem:
    """A copy for trackers, which would otherwise fold the network that is being trained."""
    return load_xmem(network.state_dict())


def save(args: argparse.Namespace, network: XMem, record: dict) -> None:
    """Write the folder under a temporary name, measure it as loaded from there, and put it in its place."""
    out = Path(args.out)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, temporary / "model.safetensors")
    (temporary / "config.json").write_text(json.dumps({"model_type": "xmem", "dims": asdict(network.dims)}, indent=1) + "\n", encoding="utf-8")
    propagator = Propagator.load(PropagationConfig(checkpoint=str(temporary), size=SIZES[-1]))
    record |= {
        "recipe": {"seed": args.seed, "clips_per_step": args.clips, "frames_per_clip": args.frames, "peak_lr": args.lr,
                   "frames_between": STEPS_BETWEEN, "objects_per_clip": [1, SLOTS], "short_sides": SIZES,
                   "optimizer": "AdamW (0.9, 0.98), weight decay 0.01, gradient norm 1, one cycle (8% warm-up, cosine)",
                   "loss": "cross-entropy of the hardest pixels (100% falling to 15% by 30% of the steps) + dice, after soft aggregation"},
        "held_out": {"size": SIZES[-1], "videos": args.final_videos, "frames": TEST_FRAMES, **evaluate(propagator, held_out(args.final_videos))},
    }  # fmt: skip
    (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    print(f"{out}: held-out {record['held_out']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="examples/toy/models/xmem", help="folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=6, help="clips a step")
    parser.add_argument("--frames", type=int, default=4, help="frames a clip")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saved states of the training, each measured")
    parser.add_argument("--eval-videos", type=int, default=12, help="held-out videos at each of these")
    parser.add_argument("--final-videos", type=int, default=60, help="held-out videos at the end")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
