"""Held-out evaluation during training: one greedy answer per episode, scored as in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.scoring import ScoredGroup


def held_out_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Means over episodes: reward, box, mask and video IoU (boxes also by difficulty class), F and J&F of the video, length, share of well-formed answers.

    Episodes whose video broke in tracking are left out, as every evaluation leaves them out. Raises RuntimeError if another
    could not be scored: a mean over some of the episodes cannot be compared.
    """
    groups = [g for g in groups if g.broken is None]
    failures = [g.failure for g in groups if g.failure]
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(groups)} held-out episodes could not be scored: {failures[0]}")
    columns: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        columns.setdefault(name, []).append(value)

    for g in groups:
        add("reward/mean", g.scores[0].total)
        add("iou/box", g.box_ious[0])
        add(f"iou/box/{g.difficulty_class}", g.box_ious[0])
        if g.mask_ious:
            add("iou/mask", g.mask_ious[0])
        if g.video_ious:
            add("iou/video", g.video_ious[0])
        if g.video_fs:
            add("f/video", g.video_fs[0])
            add("j_and_f", (g.video_ious[0] + g.video_fs[0]) / 2)
        add("length/response", len(g.completions[0].token_ids))
        add("well_formed", g.answers[0].well_formed)
    return {name: float(np.mean(values)) for name, values in columns.items()}
