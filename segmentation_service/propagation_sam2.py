"""Propagation by SAM2's memory, run by transformers: each object is tracked by itself, and objects that several sets share once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .config import PropagationConfig
from .device import autocast
from .resizing import to_input_masks
from .sam2_transformers import load_strictly, processed


class Sam2Method:
    """A frozen `Sam2VideoModel` and its image processor, under autocast to `dtype`. Implements `propagation.Method`."""

    def __init__(self, model, image_processor, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.image_processor = image_processor

    @classmethod
    def load(cls, config: PropagationConfig, device: str | torch.device) -> Sam2Method:
        """Raises CheckpointError unless `config.checkpoint` is a folder or hub id with every weight of a SAM2 for videos."""
        model, processor = load_strictly(config.checkpoint, video=True)
        return cls(model, processor, device, getattr(torch, config.dtype))

    def start(self, frame_HW3: np.ndarray, masks: list[np.ndarray]) -> Sam2Tracker:
        return Sam2Tracker(self, frame_HW3, masks)


class Sam2Tracker:
    """One session of transformers' that is given a frame at a time and made to forget what no later frame will look at."""

    def __init__(self, method: Sam2Method, frame_HW3: np.ndarray, masks: list[np.ndarray]) -> None:
        from transformers import Sam2VideoInferenceSession

        self.method = method
        self.members, objects_MHW = distinct(masks)
        height, width = frame_HW3.shape[:2]
        self.session = Sam2VideoInferenceSession(None, height, width, method.device, method.device, method.device, torch.float32)
        size = method.model.image_size
        masks_Mss = to_input_masks(objects_MHW, (size, size), method.device, smooth=True)
        for m, mask_ss in enumerate(masks_Mss):
            self.session.add_mask_inputs(self.session.obj_id_to_idx(m), 0, mask_ss[None, None])
        self.session.obj_with_new_inputs = list(range(len(masks_Mss)))
        self.seen = 0
        self._run(frame_HW3, end=False)

    def step(self, frame_HW3: np.ndarray, end: bool = False) -> list[torch.Tensor]:
        """Mask logits, and zero for the background."""
        return scores(self._run(frame_HW3, end), self.members)

    def _run(self, frame_HW3: np.ndarray, end: bool) -> torch.Tensor:
        pixels_13ss = processed(self.method.image_processor, frame_HW3).to(self.method.device)
        with autocast(self.method.device, self.method.dtype):
            # Frames are numbered as they come, so that backwards is a video like any other.
            output = self.method.model(self.session, frame_idx=self.seen, frame=pixels_13ss, run_mem_encoder=not end)
        self._forget(self.seen)
        self.seen += 1
        return output.pred_masks[:, 0].float()

    def _forget(self, t: int) -> None:
        """Leaves of the past what frame t + 1 and later ones read: the first frame, the latest memories, and the latest pointers."""
        config = self.method.model.config
        del self.session.processed_frames[t]
        for m, outputs in self.session.output_dict_per_obj.items():
            self.session.frames_tracked_per_obj[m].clear()
            past = outputs["non_cond_frame_outputs"]
            for large in ("pred_masks", "high_res_masks"):
                (past if t else outputs["cond_frame_outputs"])[t].pop(large)
            for large in ("maskmem_features", "maskmem_pos_enc"):
                past.get(t + 1 - config.num_maskmem, {}).pop(large, None)
            past.pop(t + 1 - max(config.num_maskmem, config.max_object_pointers_in_encoder), None)


def distinct(masks: Sequence[np.ndarray]) -> tuple[list[list[int]], np.ndarray]:
    """For each set the places of its objects among the distinct ones, and the masks of those: bool (M, H, W)."""
    place_of: dict[bytes, int] = {}
    members, objects = [], []
    for masks_MHW in masks:
        members.append([])
        for mask_HW in masks_MHW:
            place = place_of.setdefault(np.packbits(mask_HW).tobytes(), len(objects))
            if place == len(objects):
                objects.append(mask_HW)
            members[-1].append(place)
    return members, np.stack(objects)


def scores(logits_Mhw: torch.Tensor, members: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """(1 + M_i, h, w) of each set: a pixel is its object's of largest logit, and the background's where none is above zero."""
    background = torch.zeros_like(logits_Mhw[:1])
    return [torch.cat([background, logits_Mhw[places]]) for places in members]
