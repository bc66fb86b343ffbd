"""The segmentation service's figures, each side by side in one run: JSON, and a table on the screen.

    videoseg bench segmentation --json OUT        (or python benchmarks/segmentation.py --json OUT)

Questions, all by default (`--only NAME ...`):

    xmem           XMem against a plain one (plain_xmem.py): 1 and 3 objects at 240x432 (r = 5), 3 objects at 480x854 (r = 1, 16 frames in memory)
    memory_read    reading XMem's memory against the dense form, same memory
    objects        frames a second of XMem for 1, 3 and 8 objects at 240x432 (r = 5)
    hypotheses     the cost of G = 1, 2, 4, 8, 16 hypotheses of one object relative to one, and of eight against eight runs (240x432, r = 5)
    sam2           G = 8 answers about one frame: one call an answer, as peers do it, against one call for the group
    length         peak memory against the length of the video: 60, 600, 2,500 and 6,000 frames through the toy XMem

XMem has official dimensions and random weights but in `length`, SAM2 those of the smallest published one. Each candidate runs in turns with
the others after a warm-up; ratios are taken within a round. An existing OUT is completed: questions that it answers are not asked again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from plain_xmem import PlainMemory, PlainXMem
from side_by_side import in_turns, machine, publish, ratio
from segmentation_service.config import PropagationConfig
from segmentation_service.propagation import Propagator
from segmentation_service.segmenter import ObjectPrompt, Segmenter
from segmentation_service.xmem import XMem, XMemConfig, XMemDims, XMemGroupTracker, XMemTracker
from segmentation_service.xmem.memory import XMemMemory

ROOT = Path(__file__).resolve().parent.parent
TOY_XMEM = ROOT / "examples/toy/models/xmem"
LENGTHS = (60, 600, 2500, 6000)


class Moving:
    """A video of squares that drift, made as it is read: any length in no memory. Implements `segmentation_service.video.Video`."""

    def __init__(self, length: int, hw: tuple[int, int], objects: int = 1) -> None:
        self.length, self.hw, self.objects = length, hw, objects
        self.noise = np.random.default_rng(0).integers(0, 60, (*hw, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.length

    def masks(self, i: int) -> np.ndarray:
        """bool (N, H, W)."""
        h, w = self.hw
        masks = np.zeros((self.objects, h, w), bool)
        side = h // (2 + self.objects)
        for n in range(self.objects):
            x = (n * 37 + 2 * i) % (w - side)
            y = n * (h - side) // max(1, self.objects)
            masks[n, y : y + side, x : x + side] = True
        return masks

    def frame(self, i: int) -> np.ndarray:
        frame = self.noise.copy()
        for n, mask in enumerate(self.masks(i)):
            frame[mask] = (60 + 190 * (n % 2), 60 + 12 * n, 250 - 15 * n)
        return frame

    def image(self, i: int) -> torch.Tensor:
        return (torch.from_numpy(self.frame(i)).permute(2, 0, 1).float() / 255 - 0.45) / 0.226


def official_xmem() -> XMem:
    """An XMem of the published dimensions with random weights that keep activations in range."""
    torch.manual_seed(0)
    network = XMem(XMemDims())
    return network.eval().requires_grad_(False)


def xmem(rounds: int) -> dict:
    network = official_xmem()
    prepared, weights = network.for_inference(), dict(network.state_dict())
    result = {}
    for name, hw, objects, frames, warm, config in (
        ("one_object_240x432", (240, 432), 1, 16, 1, XMemConfig()),
        ("three_objects_240x432", (240, 432), 3, 16, 1, XMemConfig()),
        ("three_objects_480x854_r1_16_in_memory", (480, 854), 3, 19, 16, XMemConfig(mem_every=1, enable_long_term=False)),
    ):
        video = Moving(frames, hw, objects)
        images, first = [video.image(i) for i in range(frames)], torch.from_numpy(video.masks(0)).float()

        def start(tracker):
            tracker.step(images[0], first)
            for image in images[1:warm]:
                tracker.step(image)
            return tracker

        if warm == 1:  # whole clips
            def clip(make):
                tracker = start(make())
                for image in images[1:]:
                    tracker.step(image)

            runs = {"plain": lambda: clip(lambda: PlainXMem(weights, config)), "ours": lambda: clip(lambda: XMemTracker(prepared, config))}
            times = in_turns(runs, rounds)
        else:  # single frames once the memory is full; the memory grows by one frame a round on both sides
            trackers = {"plain": start(PlainXMem(weights, config)), "ours": start(XMemTracker(prepared, config))}
            left = {side: iter(images[warm:] * 3) for side in trackers}
            times = in_turns({side: lambda side=side: trackers[side].step(next(left[side])) for side in trackers}, rounds)
        result[name] = {"times": times, "plain_over_ours": ratio(times, "plain", "ours")}
    return result


def memory_read(rounds: int) -> dict:
    """16 memory frames of 480x854 (30 x 54 positions at stride 16), three objects, every position a query."""
    torch.manual_seed(0)
    config, (h, w), objects = XMemConfig(max_mid_term_frames=17), (30, 54), 3
    plain, ours = PlainMemory(config), XMemMemory(config)
    for _ in range(16):
        key, shrinkage, selection = torch.randn(1, 64, h, w), 1 + torch.rand(1, 1, h, w), torch.rand(1, 64, h, w)
        values = torch.randn(objects, 512, h, w)
        plain.write(key[0].flatten(1), shrinkage[0].flatten(1), selection[0].flatten(1), values.flatten(2))
        ours.write(key, shrinkage, selection, values)
    key, selection = torch.randn(1, 64, h, w), torch.rand(1, 64, h, w)
    runs = {"plain": lambda: plain.read(key[0].flatten(1), selection[0].flatten(1)), "ours": lambda: ours.read(key, selection)}
    difference = (runs["plain"]().unflatten(2, (h, w)) - runs["ours"]()).abs().max().item()
    times = in_turns(runs, rounds)
    return {"times": times, "plain_over_ours": ratio(times, "plain", "ours"), "max_difference": difference}


def objects(rounds: int) -> dict:
    prepared, frames, result = official_xmem().for_inference(), 11, {}
    videos = {n: Moving(frames, (240, 432), n) for n in (1, 3, 8)}

    def clip(video):
        tracker = XMemTracker(prepared, XMemConfig())
        tracker.step(video.image(0), torch.from_numpy(video.masks(0)).float())
        for i in range(1, frames):
            tracker.step(video.image(i))

    times = in_turns({f"{n}_objects": lambda v=v: clip(v) for n, v in videos.items()}, rounds)
    for name, time in times.items():
        result[name] = {"frames_per_second": round(frames / time["seconds"], 2), "times": time}
    return result


def hypotheses(rounds: int) -> dict:
    prepared, frames = official_xmem().for_inference(), 6
    video = Moving(frames, (240, 432), 16)
    images, masks = [video.image(i) for i in range(frames)], torch.from_numpy(video.masks(0)).float()

    def group(count):
        tracker = XMemGroupTracker(prepared, XMemConfig())
        tracker.step(images[0], [masks[g : g + 1] for g in range(count)])
        for image in images[1:]:
            tracker.step(image)

    def alone():
        for g in range(8):
            tracker = XMemTracker(prepared, XMemConfig())
            tracker.step(images[0], masks[g : g + 1])
            for image in images[1:]:
                tracker.step(image)

    candidates = {f"G={g}": lambda g=g: group(g) for g in (1, 2, 4, 8, 16)}
    times = in_turns({**candidates, "eight_runs": alone}, rounds)
    return {
        "times": times,
        "relative_to_one": {name: ratio(times, name, "G=1") for name in candidates},
        "eight_together_over_eight_runs": ratio(times, "G=8", "eight_runs"),
    }


def sam2(rounds: int) -> dict:
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

    from segmentation_service.sam2_transformers import TransformersSam2

    torch.manual_seed(0)
    smallest = Sam2Model(Sam2Config()).eval()  # the defaults are the dimensions of sam2.1-hiera-tiny
    result = {}
    for name, segmenter, hw in (
        ("smallest_published_1024", Segmenter("random", TransformersSam2(smallest, Sam2ImageProcessor(), torch.device("cpu"), torch.float32, 64)), (480, 854)),
        ("toy", Segmenter(str(ROOT / "examples/toy/models/sam2")), (96, 128)),
    ):
        video = Moving(1, hw, 8)
        frame = video.frame(0)
        answers = [[ObjectPrompt(box, ((box[0] + 5, box[1] + 5),), (1,))] for box in map(_box, video.masks(0))]

        def naive():
            for answer in answers:
                segmenter.segment_group(frame, [answer])

        times = in_turns({"one_call_an_answer": naive, "one_call_a_group": lambda: segmenter.segment_group(frame, answers)}, rounds if hw[0] > 400 else 20)
        result[name] = {"times": times, "naive_over_ours": ratio(times, "one_call_an_answer", "one_call_a_group")}
    return result


def _box(mask_HW: np.ndarray) -> tuple[int, int, int, int]:
    y, x = np.nonzero(mask_HW)
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


def length(rounds: int) -> dict:
    """Each length in a process of its own, whose largest resident size is what counts."""
    result = {}
    for frames in LENGTHS:
        print(f"  {frames} frames", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, __file__, "--frames", str(frames)], check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        result[str(frames)] = json.loads(done.stdout)
    result["6000_over_2500"] = {k: round(result["6000"][k] / result["2500"][k], 3) for k in ("peak_mb", "above_start_mb")}
    return result


def run_through(frames: int) -> dict:
    """The child of `length`: one object through a video of so many frames, forwards."""
    import resource
    import time

    import psutil

    propagator = Propagator.load(PropagationConfig(checkpoint=str(TOY_XMEM), size=0))
    video = Moving(frames, (96, 128))
    for _ in propagator.propagate(video, 0, [video.masks(0)], range(10)):
        pass  # what any video needs, before counting
    before = psutil.Process().memory_info().rss / 2**20
    start = time.perf_counter()
    seen = sum(masks.shape[0] for _, _, masks in propagator.propagate(video, 0, [video.masks(0)]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"frames": seen, "peak_mb": round(peak, 1), "above_start_mb": round(peak - before, 1), "frames_per_second": round(seen / (time.perf_counter() - start), 1)}


QUESTIONS = {"xmem": xmem, "memory_read": memory_read, "objects": objects, "hypotheses": hypotheses, "sam2": sam2, "length": length}


def table(record: dict) -> str:
    """The figures that matter, one a line."""
    lines = []

    def line(question: str, what: str, value: object) -> None:
        lines.append(f"{question:12}  {what:58}  {value}")

    for question, result in record.items():
        for name, value in result.items():
            if name in ("machine", "times"):
                continue
            if not isinstance(value, dict):
                line(question, name, value)
            elif "median" in value:
                line(question, name, f"{value['median']} ({value['min']} to {value['max']})")
            else:
                for key, inner in value.items():
                    if key != "times":
                        line(question, f"{name} {key}", f"{inner['median']} ({inner['min']} to {inner['max']})" if isinstance(inner, dict) else inner)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write or complete; without it the JSON goes to the screen")
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), help="these questions only")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1, what an actor has)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--frames", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.frames:
        print(json.dumps(run_through(args.frames)))
        return
    record = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.only or QUESTIONS:
        if name in record:
            continue
        print(f"--- {name}", file=sys.stderr, flush=True)
        with torch.inference_mode():
            record[name] = {"machine": machine(args.threads), **QUESTIONS[name](args.rounds)}
        if args.json:
            publish(record, args.json)
    if not args.json:
        publish(record, None)
    print(table(record), file=sys.stderr)


if __name__ == "__main__":
    main()
