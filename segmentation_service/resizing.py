"""Frames and masks brought to the size at which a network sees them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in [0, 1]: what the encoders of SAM2 and XMem were trained with."""


def resized(hw: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width with the short side brought to `size`, and the other in proportion, rounded down; unchanged where `size` is 0."""
    if not size:
        return hw
    short, long = min(hw), max(hw)
    other = size * long // short
    return (size, other) if hw[0] == short else (other, size)


def to_pixels(frame_HW3: np.ndarray, device: torch.device) -> torch.Tensor:
    """RGB uint8 as float32 (3, H, W) in [0, 1]."""
    # Frames out of Ray's object store are read-only, which torch warns of.
    return torch.from_numpy(np.require(frame_HW3, requirements="CW")).to(device).permute(2, 0, 1).float() / 255


def normalised(pixels_3HW: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] less the mean, divided by the deviation, of each channel."""
    mean_311, deviation_311 = (torch.tensor(values, device=pixels_3HW.device)[:, None, None] for values in (MEAN, DEVIATION))
    return (pixels_3HW - mean_311) / deviation_311


def to_input_masks(masks_MHW: np.ndarray, hw: Sequence[int], device: torch.device, smooth: bool = False) -> torch.Tensor:
    """bool (M, H, W) as float32 (M, h, w) of zeros and ones; none that held a pixel is empty.

    smooth: a pixel belongs to the mask if half of it does; else it takes the value of the nearest pixel.
    """
    masks = torch.from_numpy(masks_MHW).to(device).float()
    if masks.shape[1:] == tuple(hw):
        return masks
    if smooth:
        small = (F.interpolate(masks[None], tuple(hw), mode="bilinear", align_corners=False, antialias=True)[0] >= 0.5).float()
    else:
        small = F.interpolate(masks[None], tuple(hw), mode="nearest")[0]
    # Either way steps over small objects; nothing would then be tracked in their place.
    lost = ~small.flatten(1).any(1)
    if lost.any():
        small[lost] = F.adaptive_max_pool2d(masks[lost], tuple(hw))
    return small
