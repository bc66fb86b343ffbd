"""Resized uint8 images -> the rows of patches that Qwen-VL vision towers take. Arithmetic only: nothing is resized here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchSpec:
    """Patch geometry and normalisation of one policy: what its image processor is configured with."""

    patch: int
    merge: int
    temporal: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float = 1.0 / 255.0

    @classmethod
    def from_policy(cls, policy_path: str) -> PatchSpec:
        """Read from the image processor's settings in the policy's folder. Raises OSError if there are none."""
        from transformers import AutoImageProcessor

        p = AutoImageProcessor.from_pretrained(policy_path)
        if not (p.do_rescale and p.do_normalize):
            raise ValueError(f"the image processor of {policy_path} does not rescale and normalise; the learner does both")
        return cls(p.patch_size, p.merge_size, p.temporal_patch_size, tuple(p.image_mean), tuple(p.image_std), float(p.rescale_factor))

    @property
    def row_width(self) -> int:
        """Numbers in a row: channels x frames x patch x patch."""
        return 3 * self.temporal * self.patch * self.patch


def image_grid(image_HW3: np.ndarray, spec: PatchSpec) -> tuple[int, int, int]:
    """(1, H / patch, W / patch). Raises ValueError unless the image is uint8 (H, W, 3) in multiples of patch * merge."""
    step = spec.patch * spec.merge
    shape = image_HW3.shape
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or shape[2] != 3 or shape[0] % step or shape[1] % step or 0 in shape:
        raise ValueError(f"image of shape {shape} and type {image_HW3.dtype}: uint8 (H, W, 3) in multiples of {step} is needed")
    return 1, shape[0] // spec.patch, shape[1] // spec.patch


def patchify(
    images: Sequence[np.ndarray], spec: PatchSpec, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """uint8 (H, W, 3) images -> rows (sum of t h w, 3 * temporal * patch * patch) and grid_thw (n, 3) int64.

    Equal to transformers' Qwen2VLImageProcessor with do_resize=False: rows in merge blocks, each image repeated over the
    `temporal` frames of a patch. Bytes are permuted before they become floats, and images of one size are done together.
    """
    grid = torch.tensor([image_grid(image, spec) for image in images], dtype=torch.int64).reshape(-1, 3)
    if not images:
        return torch.empty(0, spec.row_width, device=device, dtype=dtype), grid
    # The processor's own order of operations: mean and std scaled to 0..255, then (x - mean) / std in float32.
    shape = (1, 1, 3, 1, 1, 1)
    mean = (torch.tensor(spec.mean) * (1.0 / spec.rescale)).to(device).view(shape)
    std = (torch.tensor(spec.std) * (1.0 / spec.rescale)).to(device).view(shape)

    rows: list[Tensor | None] = [None] * len(images)
    for height, width in sorted({(h, w) for _, h, w in grid.tolist()}):
        members = [i for i, (_, h, w) in enumerate(grid.tolist()) if (h, w) == (height, width)]
        pixels = torch.from_numpy(np.stack([images[i] for i in members])).to(device)
        blocks = pixels.view(len(members), height // spec.merge, spec.merge, spec.patch, width // spec.merge, spec.merge, spec.patch, 3)
        patches = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(members), height * width, 3, 1, spec.patch, spec.patch)
        values = ((patches.float() - mean) / std).to(dtype)
        values = values.expand(-1, -1, -1, spec.temporal, -1, -1).reshape(len(members), height * width, spec.row_width)
        for i, value in zip(members, values.unbind(0)):
            rows[i] = value
    return torch.cat(rows), grid
