"""Propagation by Cutie, the package `rf-cutie`: one memory a set of objects, the frames encoded once for all sets."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from .checkpoint import CheckpointError
from .config import PropagationConfig
from .device import autocast
from .resizing import resized, to_input_masks, to_pixels
from .weights import misfit, read_weights

WHOLE_VIDEOS = dict(use_long_term=True, mem_every=5)
"""What Cutie's evaluation sets for videos of any length; its other settings stay as the package has them."""

STRIDE, SMALLEST = 16, 96
"""Pixels to an element of memory, of which it reads 30; and a short side that gives enough."""


class CutieMethod:
    """A frozen Cutie on the device on which to run. Implements `propagation.Method`."""

    def __init__(self, network, config: PropagationConfig) -> None:
        self.config = config
        self.network = network.eval().requires_grad_(False)
        self.device = next(network.parameters()).device

    @classmethod
    def load(cls, config: PropagationConfig, device: str | torch.device) -> CutieMethod:
        """Raises CheckpointError where the package is missing or the file of `config.checkpoint` cannot be used."""
        return cls(load_cutie(config.checkpoint).to(device), config)

    def start(self, frame_HW3: np.ndarray, masks: list[np.ndarray]) -> CutieTracker:
        return CutieTracker(self, frame_HW3, masks)


class CutieTracker:
    """One `InferenceCore` a set, all of which look at the same features of a frame."""

    def __init__(self, method: CutieMethod, frame_HW3: np.ndarray, masks: list[np.ndarray]) -> None:
        from cutie.inference.image_feature_store import ImageFeatureStore
        from cutie.inference.inference_core import InferenceCore

        self.method = method
        height, width = resized(frame_HW3.shape[:2], method.config.size)
        config = method.network.cfg
        if math.ceil(height / STRIDE) * math.ceil(width / STRIDE) < config.top_k:
            raise ValueError(f"frames of {height}x{width} are too small for Cutie; set segmentation.propagation.size to {SMALLEST} or more")
        features = ImageFeatureStore(method.network, no_warning=True)
        self.cores = [InferenceCore(method.network, config, image_feature_store=features) for _ in masks]
        self._run(frame_HW3, masks)

    def step(self, frame_HW3: np.ndarray, end: bool = False) -> list[torch.Tensor]:
        """Probabilities after soft aggregation."""
        return self._run(frame_HW3, end=end)

    @torch.inference_mode()
    def _run(self, frame_HW3: np.ndarray, masks: list[np.ndarray] | None = None, end: bool = False) -> list[torch.Tensor]:
        device = self.method.device
        image_3hw = to_pixels(frame_HW3, device)
        hw = resized(frame_HW3.shape[:2], self.method.config.size)
        if hw != frame_HW3.shape[:2]:
            image_3hw = F.interpolate(image_3hw[None], hw, mode="bilinear", align_corners=False)[0]
        scores = []
        with autocast(device, getattr(torch, self.method.config.dtype)):
            for s, core in enumerate(self.cores):
                given = {} if masks is None else dict(mask=to_input_masks(masks[s], hw, device), objects=list(range(1, len(masks[s]) + 1)), idx_mask=False)
                scores.append(core.step(image_3hw, **given, end=end, delete_buffer=core is self.cores[-1]).float())
        return scores


def load_cutie(checkpoint: str):
    """A `CUTIE` in float32 on the CPU, with its configuration as `cfg`; base or small, as the weights tell."""
    remedy = "give the file of a Cutie, such as cutie-base-mega.pth"
    weights = read_weights(checkpoint, "Cutie", remedy)
    try:
        import cutie.config
        from cutie.model.cutie import CUTIE
        from cutie.model.utils import resnet
    except ImportError as error:
        raise CheckpointError(f"Cutie checkpoint {checkpoint} needs the package rf-cutie ({error})", "pip install 'videoseg-r1[cutie]'") from error
    from omegaconf import OmegaConf

    folder = Path(cutie.config.__file__).parent
    base, small = (OmegaConf.load(folder / "model" / f"{size}.yaml") for size in ("base", "small"))
    small.pop("defaults")
    deep = any(key.startswith("pixel_encoder.") and ".conv3." in key for key in weights)  # ResNet-50 has bottlenecks, ResNet-18 not
    config = OmegaConf.merge(OmegaConf.load(folder / "eval_config.yaml"), {"model": base if deep else OmegaConf.merge(base, small)}, WHOLE_VIDEOS)
    # Its encoders would first be filled with ImageNet's weights, from the internet.
    with mock.patch.object(resnet.model_zoo, "load_url"), mock.patch.object(resnet, "load_weights_add_extra_dim"):
        network = CUTIE(config)
    expected = network.state_dict()
    wrong = misfit({key: tensor for key, tensor in weights.items() if key in expected}, expected)
    if wrong:
        raise CheckpointError(f"Cutie checkpoint {checkpoint} does not fit: {wrong}", remedy)
    network.load_state_dict(weights, strict=False)
    network.cfg = config
    return network
