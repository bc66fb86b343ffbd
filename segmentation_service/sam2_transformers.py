"""SAM2 by the transformers library: one frame encoded once, any number of prompts decoded on the embedding."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import geometry
from .checkpoint import CheckpointError, check_folder
from .prompts import ObjectPrompt

BOX_CORNER_LABELS = (2, 3)
"""SAM's prompt encoder takes a box as two labelled points: its upper left and its lower right corner."""


@dataclass(frozen=True)
class FrameEmbedding:
    """What SAM2 knows of one frame: feature maps of shape (1, C, h, w) from fine to coarse, and the frame's own size."""

    features: tuple[torch.Tensor, ...]
    frame_hw: tuple[int, int]


class TransformersSam2:
    """A frozen `Sam2Model` and its image processor. Implements `segmenter.Sam2Backend`.

    Encoder and mask decoder run in `dtype`; the prompt encoder and all positional encodings stay float32, because
    bfloat16 has eight bits of precision and would move a coordinate by two to four of SAM2's 1024 pixels.

    Boxes and points are decoded with `multimask_output=False`: a box is hardly ambiguous, and with a box SAM2's
    authors ask for the single mask too. For a lone point SAM2 itself falls back from the single mask to the best of its
    three others where the single one is unstable (`dynamic_multimask_via_stability` of the checkpoint's config).
    """

    def __init__(self, model, image_processor, device: str = "cpu", dtype: torch.dtype = torch.float32, max_prompts_per_batch: int = 64):
        self.image_size = int(model.prompt_encoder.input_image_size)
        size = image_processor.size
        if (size["height"], size["width"]) != (self.image_size, self.image_size):
            raise CheckpointError(
                f"the preprocessor resizes frames to {size['height']}x{size['width']}, the model expects {self.image_size}x{self.image_size}",
                "make preprocessor_config.json and config.json of the checkpoint agree",
            )
        self.device, self.dtype, self.max_prompts_per_batch = torch.device(device), dtype, max_prompts_per_batch
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.model.vision_encoder.to(dtype)
        self.model.mask_decoder.to(dtype)
        self.model.no_memory_embedding.data = self.model.no_memory_embedding.data.to(dtype)
        self.image_processor = image_processor

    @classmethod
    def load(cls, checkpoint: str, device: str = "auto", dtype: str = "auto", max_prompts_per_batch: int = 64) -> TransformersSam2:
        """Load a folder or hub id. Raises CheckpointError unless every weight is there, fits, and has a place."""
        device, dtype = resolve_device(device, dtype)
        model, processor = _load_strictly(checkpoint)
        return cls(model, processor, device, getattr(torch, dtype), max_prompts_per_batch)

    @torch.inference_mode()
    def encode(self, frame_HW3: np.ndarray) -> FrameEmbedding:
        """Encode one RGB frame, uint8 (H, W, 3) of any size (SAM2 stretches it to its own square)."""
        frame_HW3 = np.require(frame_HW3, requirements="CW")  # frames out of Ray's object store are read-only, which torch warns of
        pixels = self.image_processor(images=frame_HW3, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        features = self.model.get_image_embeddings(pixels.to(self.device, self.dtype))
        return FrameEmbedding(tuple(features), frame_HW3.shape[:2])

    @torch.inference_mode()
    def decode(self, embedding: FrameEmbedding, prompts: Sequence[ObjectPrompt]) -> np.ndarray:
        """One mask a prompt at the frame's own size: bool (N, H, W). Every prompt must have something inside the frame.

        Prompts of one form (box or not, number of points) make one batch of at most `max_prompts_per_batch`. Forms are
        not mixed: SAM2 attends to padding points too, so a padded prompt would get another mask than the same prompt alone.
        """
        masks_NHW = np.zeros((len(prompts), *embedding.frame_hw), dtype=bool)
        by_form: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            by_form[prompt.box is not None, len(prompt.points)].append(i)
        for indices in by_form.values():
            for start in range(0, len(indices), self.max_prompts_per_batch):
                chunk = indices[start : start + self.max_prompts_per_batch]
                masks_NHW[chunk] = self._decode_batch(embedding, [prompts[i] for i in chunk])
        return masks_NHW

    def _decode_batch(self, embedding: FrameEmbedding, prompts: Sequence[ObjectPrompt]) -> np.ndarray:
        model = self.model
        points_NP2, labels_NP = prompt_points(prompts)
        points_NP2 = geometry.scale_points(points_NP2, embedding.frame_hw, (self.image_size, self.image_size))
        sparse, dense = model.prompt_encoder(
            input_points=torch.as_tensor(points_NP2, dtype=torch.float32, device=self.device)[None],
            input_labels=torch.as_tensor(labels_NP, device=self.device)[None],
            input_boxes=None,
            input_masks=None,
        )
        logits, _, _, _ = model.mask_decoder(
            image_embeddings=embedding.features[-1],
            image_positional_embeddings=model.get_image_wide_positional_embeddings().to(self.dtype),
            sparse_prompt_embeddings=sparse.to(self.dtype),
            dense_prompt_embeddings=dense.to(self.dtype),
            multimask_output=False,
            high_resolution_features=list(embedding.features[:-1]),
        )
        logits = F.interpolate(logits[0].float(), size=embedding.frame_hw, mode="bilinear", align_corners=False)
        return (logits[:, 0] > 0).cpu().numpy()


def prompt_points(prompts: Sequence[ObjectPrompt]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of one form as SAM2's labelled points: float (N, P, 2) in frame pixels and int64 (N, P), box corners first."""
    points = [((p.box[:2], p.box[2:]) if p.box is not None else ()) + p.points for p in prompts]
    labels = [(BOX_CORNER_LABELS if p.box is not None else ()) + p.labels for p in prompts]
    return np.array(points, dtype=np.float64), np.array(labels, dtype=np.int64)


def resolve_device(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """Names of device and dtype with "auto" resolved: CUDA where this process sees a GPU, and bfloat16 on CUDA only."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("segmentation.device is cuda, but this process sees no CUDA GPU; use auto or cpu, or give the replica a GPU")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype


def _load_strictly(checkpoint: str):
    """(Sam2Model in float32, image processor) of a folder or hub id, or CheckpointError."""
    check_folder(checkpoint)
    from safetensors import SafetensorError
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

    path = str(Path(checkpoint).expanduser()) if Path(checkpoint).expanduser().is_dir() else checkpoint
    damaged = "restore or re-download the checkpoint"
    try:
        values, _ = Sam2Config.get_config_dict(path)
        if values.get("model_type") not in ("sam2", "sam2_video"):
            raise CheckpointError(f"checkpoint {checkpoint} is a {values.get('model_type')!r} model, not SAM2", "give a SAM2 checkpoint")
        # A video checkpoint's configuration holds the image model's under the same names.
        config = Sam2Config(**{k: values[k] for k in ("vision_config", "prompt_encoder_config", "mask_decoder_config") if k in values})
        processor = Sam2ImageProcessor.from_pretrained(path)
        with _quiet_transformers():
            # Wrong shapes are let through here, to be reported below by name.
            model, report = Sam2Model.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} cannot be loaded ({reason[:500]})", damaged) from error
    faults = []
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # A mismatch comes as (key, shape in the file, shape in the model).
        names = sorted(name if isinstance(name, str) else f"{name[0]} {list(name[1])} for {list(name[2])}" for name in report.get(fault) or ())
        if names:
            faults.append(f"{len(names)} {fault.replace('_', ' ')} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    if faults:
        # Left alone, transformers would fill the gaps with random weights and go on.
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} does not match its config.json: {'; '.join(faults)}", damaged)
    return model, processor


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no report of odd keys while loading: what is wrong becomes one error of ours."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
