"""What a group's reward costs with accuracy_iou=mask and =video: toy models, one thread, seconds of that thread's CPU time.

    OMP_NUM_THREADS=1 videoseg bench video_reward --answers 8 --frames 24 --rounds 10
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import numpy as np
import torch

from examples.toy.train_sam2 import HELD_OUT_SEEDS, make_prompt
from reward_service import Answer, FrameTarget, RewardConfig, Target, parse_answer, score_group
from rollout.toy_world import WorldConfig, make_video
from segmentation_service.config import PropagationConfig
from segmentation_service.masks import encode_rle, mask_to_box, mask_to_point
from segmentation_service.prompts import ObjectPrompt
from segmentation_service.segmenter import Segmenter
from segmentation_service.video import FramesInMemory


def group_about(seed: int, answers: int, frames: int) -> tuple[FramesInMemory, int, Target, list[list[ObjectPrompt]], list[Answer]]:
    """A toy video, its middle frame as target frame, one shape to find, and answers that name it with boxes all unequal."""
    video, t = make_video(seed, WorldConfig(frames=(frames, frames), objects=(1, 1))), frames // 2
    masks = [video.masks(i)[0] for i in range(frames)]
    rng = np.random.default_rng(seed)
    prompts = [[make_prompt(masks[t], "box_point", rng, jitter=2.0)] for _ in range(answers)]
    said = [json.dumps([{"bbox_2d": list(map(int, p.box)), "point_2d": list(map(int, p.points[0]))}]) for (p,) in prompts]
    target = Target(
        masks[t].shape,
        [mask_to_box(masks[t])],
        [[mask_to_point(masks[t])]],
        masks=masks[t][None],
        frames={i: FrameTarget(masks=[encode_rle(mask)]) for i, mask in enumerate(masks)},
    )
    shown = FramesInMemory([video.frame(i) for i in range(frames)])
    return shown, t, target, prompts, [parse_answer(f"<think>a</think><answer>{text}</answer>") for text in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    propagation = PropagationConfig(checkpoint="examples/toy/models/xmem", size=144)
    segmenter = Segmenter("examples/toy/models/sam2", device="cpu", propagation=propagation)
    seconds: dict[str, list[float]] = {"segment": [], "propagate": [], "score by mask": [], "score by video": []}
    terms: list[list[float]] = []
    for seed in range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + args.rounds):
        video, t, target, prompts, answers = group_about(seed, args.answers, args.frames)
        marks = [time.process_time()]
        masks = segmenter.segment_group(video.frame(t), prompts)
        marks.append(time.process_time())
        tracks = segmenter.propagate_group(video, t, masks)
        marks.append(time.process_time())
        scored = []
        for accuracy, predicted in (("mask", masks), ("video", tracks)):
            config = RewardConfig(accuracy_iou=accuracy, iou_grading="graded")
            scored.append(score_group(answers, target, config, lengths=[0] * len(answers), predicted_masks=predicted))
            marks.append(time.process_time())
        for name, a, b in zip(seconds, marks, marks[1:]):
            seconds[name].append(b - a)
        terms.append([float(np.mean([s.terms["iou"] for s in scores])) for scores in scored])
    print(json.dumps({name: round(median(values), 4) for name, values in seconds.items()}))
    print("mean iou term, mask and video:", np.mean(terms, 0).round(3).tolist())


if __name__ == "__main__":
    main()
