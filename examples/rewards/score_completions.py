"""Rewards of completions from your own trainer: no server, no GPU, no framework; needs `pip install .` of this project alone.

    python -m examples.rewards.score_completions

Prints each term of four completions of one prompt. `score_group` takes a group at once; rewards of other systems are a preset away.
"""

from __future__ import annotations

import numpy as np

from reward_service import RewardConfig, Target, score_group

SIZE = (480, 640)  # height, width
BOX = [100, 120, 219, 279]  # x1, y1, x2, y2, corners inclusive
COMPLETIONS = {
    "right": '<think>The dog that turns round is on the left.</think><answer>[{"bbox_2d": [101, 119, 219, 280], "point_2d": [160, 200], "negative_point_2d": [240, 200]}]</answer>',
    "box too large": '<think>The dog that turns round is on the left.</think><answer>[{"bbox_2d": [60, 60, 300, 400], "point_2d": [160, 200], "negative_point_2d": [240, 200]}]</answer>',
    "another object": '<think>The dog that turns round is on the right.</think><answer>[{"bbox_2d": [400, 100, 519, 259], "point_2d": [460, 180]}]</answer>',
    "no answer": "<think>The dog that turns round is",
}


def target() -> Target:
    """The truth about one object; masks are what negative points are measured against."""
    mask_HW = np.zeros(SIZE, bool)
    mask_HW[BOX[1] : BOX[3] + 1, BOX[0] : BOX[2] + 1] = True
    return Target(SIZE, boxes=[BOX], points=[[[160, 200]]], masks=[mask_HW])


def main() -> None:
    config = RewardConfig.preset("videoseg_r1")  # or seg_zero, vision_reasoner, pixelthink, veason_r1, revseg; each field is a setting
    texts = list(COMPLETIONS.values())
    scores = score_group(texts, target(), config, difficulty=4.0, lengths=[len(text.split()) for text in texts])  # lengths: reasoning tokens
    names = [name for name in scores[0].terms if not name.startswith("weighted_")]
    print(f"{'':16}{'total':>8}" + "".join(f"{name:>22}" for name in names))
    for kind, score in zip(COMPLETIONS, scores):
        print(f"{kind:16}{score.total:8.2f}" + "".join(f"{score.terms[name]:22.2f}" for name in names))


if __name__ == "__main__":
    main()
