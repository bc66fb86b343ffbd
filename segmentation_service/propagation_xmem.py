"""Propagation by XMem: the sets of a group go through the video as one batch, with one memory of the images for all."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .config import PropagationConfig
from .device import autocast
from .resizing import normalised, resized, to_input_masks, to_pixels
from .xmem import XMem, XMemGroupTracker, load_xmem


class XMemMethod:
    """A frozen XMem on the device on which to run; all videos share its prepared form. Implements `propagation.Method`."""

    def __init__(self, network: XMem, config: PropagationConfig) -> None:
        self.config = config
        self.network = network.for_inference()
        self.device = next(self.network.parameters()).device

    @classmethod
    def load(cls, config: PropagationConfig, device: str | torch.device) -> XMemMethod:
        """Raises CheckpointError where `config.checkpoint` cannot be used."""
        return cls(load_xmem(config.checkpoint, config.xmem).to(device), config)

    def start(self, frame_HW3: np.ndarray, masks: list[np.ndarray]) -> _Tracker:
        tracker = _Tracker(self)
        image_3hw = self.to_image(frame_HW3)
        tracker.run(image_3hw, [to_input_masks(masks_MHW, image_3hw.shape[1:], self.device) for masks_MHW in masks])
        return tracker

    def to_image(self, frame_HW3: np.ndarray) -> torch.Tensor:
        """Normalised (3, h, w), its short side brought to `size`, bilinear and not antialiased as in the published evaluation."""
        image_3HW = normalised(to_pixels(frame_HW3, self.device))
        hw = resized(frame_HW3.shape[:2], self.config.size)
        return image_3HW if hw == frame_HW3.shape[:2] else F.interpolate(image_3HW[None], hw, mode="bilinear", align_corners=False)[0]


class _Tracker:
    def __init__(self, method: XMemMethod) -> None:
        self.method = method
        self.tracker = XMemGroupTracker(method.network, method.config.xmem)

    def step(self, frame_HW3: np.ndarray, end: bool = False) -> list[torch.Tensor]:
        """Probabilities after soft aggregation."""
        return self.run(self.method.to_image(frame_HW3), end=end)

    def run(self, image_3hw: torch.Tensor, masks: list[torch.Tensor] | None = None, end: bool = False) -> list[torch.Tensor]:
        with autocast(self.method.device, getattr(torch, self.method.config.dtype)):
            return self.tracker.step(image_3hw, masks, end=end)
