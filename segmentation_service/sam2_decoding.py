"""What both programs that run SAM2 share: what an embedding is, and prompts decoded in batches of one form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from . import geometry
from .prompts import ObjectPrompt

BOX_CORNER_LABELS = (2, 3)
"""SAM's prompt encoder takes a box as two labelled points: its upper left and its lower right corner."""

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Labelled points in the model's square, float32 (N, P, 2) and int64 (N, P) -> mask logits (N, 1, h, w)."""


@dataclass(frozen=True)
class FrameEmbedding:
    """What SAM2 knows of one frame: feature maps of shape (1, C, h, w) from fine to coarse, and the frame's own size."""

    features: tuple[torch.Tensor, ...]
    frame_hw: tuple[int, int]


def decode_in_batches(
    prompts: Sequence[ObjectPrompt], frame_hw: tuple[int, int], image_size: int, max_batch: int, device: torch.device, logits_of: Logits
) -> np.ndarray:
    """One mask a prompt at the frame's own size: bool (N, H, W). Every prompt must have something inside the frame.

    Prompts of one form (box or not, number of points) make one batch of at most `max_batch`. Forms are not mixed:
    SAM2 attends to padding points too, so a padded prompt would get another mask than the same prompt alone.
    """
    masks_NHW = np.zeros((len(prompts), *frame_hw), dtype=bool)
    by_form: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_form[prompt.box is not None, len(prompt.points)].append(i)
    for indices in by_form.values():
        for start in range(0, len(indices), max_batch):
            chunk = indices[start : start + max_batch]
            points_NP2, labels_NP = prompt_points([prompts[i] for i in chunk])
            points_NP2 = geometry.scale_points(points_NP2, frame_hw, (image_size, image_size))
            logits_N1hw = logits_of(torch.as_tensor(points_NP2, dtype=torch.float32, device=device), torch.as_tensor(labels_NP, device=device))
            logits_N1HW = F.interpolate(logits_N1hw.float(), size=frame_hw, mode="bilinear", align_corners=False)
            masks_NHW[chunk] = (logits_N1HW[:, 0] > 0).cpu().numpy()
    return masks_NHW


def prompt_points(prompts: Sequence[ObjectPrompt]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of one form as SAM2's labelled points: float (N, P, 2) in frame pixels and int64 (N, P), box corners first."""
    points = [((p.box[:2], p.box[2:]) if p.box is not None else ()) + p.points for p in prompts]
    labels = [(BOX_CORNER_LABELS if p.box is not None else ()) + p.labels for p in prompts]
    return np.array(points, dtype=np.float64), np.array(labels, dtype=np.int64)
