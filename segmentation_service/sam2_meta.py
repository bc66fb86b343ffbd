"""SAM2 by Meta's package `sam2`: original `.pt` checkpoints, one frame encoded once, any number of prompts decoded on the embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .checkpoint import CheckpointError, find_meta_config
from .device import autocast, resolve_device
from .prompts import ObjectPrompt
from .resizing import normalised, to_pixels
from .sam2_decoding import FrameEmbedding, decode_in_batches
from .weights import misfit, read_weights

STABLE_SINGLE_MASKS = dict(dynamic_multimask_via_stability=True, dynamic_multimask_stability_delta=0.05, dynamic_multimask_stability_thresh=0.98)
"""What `sam2.build_sam` adds to every configuration: an unstable single mask gives way to the best of the three others."""


class MetaSam2:
    """A frozen `SAM2Base`. Implements `segmenter.Sam2Backend`.

    Encoder and mask decoder run under autocast, as Meta's own programs do; prompts and all positional encodings stay float32
    (`TransformersSam2` says why, and why `multimask_output` is off).
    """

    def __init__(self, model, device: str = "cpu", dtype: torch.dtype = torch.float32, max_prompts_per_batch: int = 64):
        self.device, self.dtype, self.max_prompts_per_batch = torch.device(device), dtype, max_prompts_per_batch
        self.model = model.eval().requires_grad_(False).to(self.device)

    @classmethod
    def load(
        cls, checkpoint: str, model_config: str | None = None, device: str = "auto", dtype: str = "auto", max_prompts_per_batch: int = 64
    ) -> MetaSam2:
        """Load a `.pt` file; model_config as in `find_meta_config`. Raises CheckpointError unless every weight is there, fits, and has a place."""
        device, dtype = resolve_device(device, dtype)
        return cls(load_model(checkpoint, model_config), device, getattr(torch, dtype), max_prompts_per_batch)

    @torch.inference_mode()
    def encode(self, frame_HW3: np.ndarray) -> FrameEmbedding:
        """Encode one RGB frame, uint8 (H, W, 3) of any size (SAM2 stretches it to its own square)."""
        with autocast(self.device, self.dtype):
            features = self.model.forward_image(to_square(frame_HW3, self.model.image_size, self.device))["backbone_fpn"]
        *fine, coarse = features[-self.model.num_feature_levels :]
        if self.model.directly_add_no_mem_embed:
            coarse = coarse + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return FrameEmbedding((*fine, coarse), frame_HW3.shape[:2])

    @torch.inference_mode()
    def decode(self, embedding: FrameEmbedding, prompts: Sequence[ObjectPrompt]) -> np.ndarray:
        """One mask a prompt at the frame's own size: bool (N, H, W). Every prompt must have something inside the frame."""
        model = self.model
        *fine, coarse = embedding.features

        def logits_of(points_NP2: torch.Tensor, labels_NP: torch.Tensor) -> torch.Tensor:
            sparse, dense = model.sam_prompt_encoder(points=(points_NP2, labels_NP), boxes=None, masks=None)
            positions = model.sam_prompt_encoder.get_dense_pe()
            with autocast(self.device, self.dtype):
                logits, _, _, _ = model.sam_mask_decoder(
                    image_embeddings=coarse,
                    image_pe=positions,
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=False,
                    repeat_image=True,
                    high_res_features=fine or None,
                )
            return logits

        return decode_in_batches(prompts, embedding.frame_hw, model.image_size, self.max_prompts_per_batch, self.device, logits_of)


def to_square(frame_HW3: np.ndarray, size: int, device: torch.device) -> torch.Tensor:
    """A frame as SAM2 sees it: normalised float32 (1, 3, size, size)."""
    pixels_13HW = to_pixels(frame_HW3, device)[None]
    return normalised(F.interpolate(pixels_13HW, (size, size), mode="bilinear", align_corners=False, antialias=True))


def load_model(checkpoint: str, model_config: str | None = None):
    """A `SAM2Base` in float32 on the CPU, of a `.pt` file. The file is read without running what it may hold; a configuration,
    which names classes to make, is code and must be one's own."""
    config_file = find_meta_config(checkpoint, model_config)
    remedy = "give a checkpoint of Meta's SAM2, and in model_config the YAML of its architecture"
    weights = read_weights(checkpoint, "SAM2", remedy)
    weights = weights.get("model", weights)
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.load(config_file).model
        extra = OmegaConf.merge(STABLE_SINGLE_MASKS, config.get("sam_mask_decoder_extra_args") or {})
        model = instantiate(config, sam_mask_decoder_extra_args=extra)
    except (OSError, AttributeError, HydraException, OmegaConfBaseException) as error:
        raise CheckpointError(f"{config_file} is not the configuration of a SAM2 ({' '.join(str(error).split())[:300]})", remedy) from error
    wrong = misfit(weights, model.state_dict())
    if wrong:
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} does not match {config_file.name}: {wrong}", remedy)
    model.load_state_dict(weights)
    return model
