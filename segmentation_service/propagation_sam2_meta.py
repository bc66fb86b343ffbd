"""Propagation by SAM2's memory, run by Meta's package `sam2`: original `.pt` checkpoints, all objects of a group as one batch."""

from __future__ import annotations

import numpy as np
import torch

from .config import PropagationConfig
from .device import autocast
from .propagation_sam2 import distinct, scores
from .resizing import to_input_masks
from .sam2_meta import load_model, to_square


class MetaSam2Method:
    """A frozen `SAM2Base`, under autocast to `dtype`. Implements `propagation.Method`."""

    def __init__(self, model, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.model = model.eval().requires_grad_(False).to(self.device)

    @classmethod
    def load(cls, config: PropagationConfig, device: str | torch.device) -> MetaSam2Method:
        """Raises CheckpointError where `config.checkpoint` cannot be used; see `sam2_meta.load_model`."""
        return cls(load_model(config.checkpoint, config.model_config), device, getattr(torch, config.dtype))

    def start(self, frame_HW3: np.ndarray, masks: list[np.ndarray]) -> MetaSam2Tracker:
        return MetaSam2Tracker(self, frame_HW3, masks)


class MetaSam2Tracker:
    """The model's own steps, with a memory that holds what the next ones read: the first frame, the latest memories, the latest pointers."""

    def __init__(self, method: MetaSam2Method, frame_HW3: np.ndarray, masks: list[np.ndarray]) -> None:
        self.method = method
        self.members, objects_MHW = distinct(masks)
        self.objects, self.seen = len(objects_MHW), 0
        self.memory: dict[str, dict[int, dict]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        size = method.model.image_size
        self._run(frame_HW3, to_input_masks(objects_MHW, (size, size), method.device, smooth=True)[:, None])

    def step(self, frame_HW3: np.ndarray, end: bool = False) -> list[torch.Tensor]:
        """Mask logits, and zero for the background."""
        return scores(self._run(frame_HW3, end=end), self.members)

    @torch.inference_mode()
    def _run(self, frame_HW3: np.ndarray, masks_M1ss: torch.Tensor | None = None, end: bool = False) -> torch.Tensor:
        model = self.method.model
        with autocast(self.method.device, self.method.dtype):
            image = model.forward_image(to_square(frame_HW3, model.image_size, self.method.device))
            features, positions = (image[key][-model.num_feature_levels :] for key in ("backbone_fpn", "vision_pos_enc"))
            output = model.track_step(
                # Frames are numbered as they come, so that backwards is a video like any other.
                frame_idx=self.seen,
                is_init_cond_frame=masks_M1ss is not None,
                current_vision_feats=[self._flat(level) for level in features],
                current_vision_pos_embeds=[self._flat(level) for level in positions],
                feat_sizes=[tuple(level.shape[-2:]) for level in features],
                point_inputs=None,
                mask_inputs=masks_M1ss,
                output_dict=self.memory,
                num_frames=self.seen + model.max_obj_ptrs_in_encoder,
                run_mem_encoder=not end,
            )
        kept = {key: output[key] for key in ("maskmem_features", "maskmem_pos_enc", "obj_ptr")}
        if not end:
            kept["maskmem_features"] = kept["maskmem_features"].to(torch.bfloat16)  # as in both published programs
        self.memory["non_cond_frame_outputs" if self.seen else "cond_frame_outputs"][self.seen] = kept
        self._forget(self.seen)
        self.seen += 1
        return output["pred_masks"][:, 0].float()

    def _flat(self, level_1Chw: torch.Tensor) -> torch.Tensor:
        """(h w, M, C)"""
        return level_1Chw.flatten(2).permute(2, 0, 1).expand(-1, self.objects, -1)

    def _forget(self, t: int) -> None:
        """Leaves of the past what frame t + 1 and later ones read."""
        model, past = self.method.model, self.memory["non_cond_frame_outputs"]
        span = model.num_maskmem * model.memory_temporal_stride_for_eval
        for large in ("maskmem_features", "maskmem_pos_enc"):
            past.get(t + 1 - span, {}).pop(large, None)
        past.pop(t + 1 - max(span, model.max_obj_ptrs_in_encoder), None)
