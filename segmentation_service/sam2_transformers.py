"""SAM2 by the transformers library: one frame encoded once, any number of prompts decoded on the embedding."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .checkpoint import CheckpointError, check_folder, check_model_type
from .device import resolve_device
from .prompts import ObjectPrompt
from .sam2_decoding import FrameEmbedding, decode_in_batches
from .weights import faults


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
        model, processor = load_strictly(checkpoint)
        return cls(model, processor, device, getattr(torch, dtype), max_prompts_per_batch)

    @torch.inference_mode()
    def encode(self, frame_HW3: np.ndarray) -> FrameEmbedding:
        """Encode one RGB frame, uint8 (H, W, 3) of any size (SAM2 stretches it to its own square)."""
        features = self.model.get_image_embeddings(processed(self.image_processor, frame_HW3).to(self.device, self.dtype))
        return FrameEmbedding(tuple(features), frame_HW3.shape[:2])

    @torch.inference_mode()
    def decode(self, embedding: FrameEmbedding, prompts: Sequence[ObjectPrompt]) -> np.ndarray:
        """One mask a prompt at the frame's own size: bool (N, H, W). Every prompt must have something inside the frame."""
        model = self.model

        def logits_of(points_NP2: torch.Tensor, labels_NP: torch.Tensor) -> torch.Tensor:
            sparse, dense = model.prompt_encoder(input_points=points_NP2[None], input_labels=labels_NP[None], input_boxes=None, input_masks=None)
            logits, _, _, _ = model.mask_decoder(
                image_embeddings=embedding.features[-1],
                image_positional_embeddings=model.get_image_wide_positional_embeddings().to(self.dtype),
                sparse_prompt_embeddings=sparse.to(self.dtype),
                dense_prompt_embeddings=dense.to(self.dtype),
                multimask_output=False,
                high_resolution_features=list(embedding.features[:-1]),
            )
            return logits[0]

        return decode_in_batches(prompts, embedding.frame_hw, self.image_size, self.max_prompts_per_batch, self.device, logits_of)


def processed(image_processor, frame_HW3: np.ndarray) -> torch.Tensor:
    """A frame as SAM2 sees it: normalised float32 (1, 3, size, size)."""
    frame_HW3 = np.require(frame_HW3, requirements="CW")  # frames out of Ray's object store are read-only, which torch warns of
    return image_processor(images=frame_HW3, input_data_format="channels_last", return_tensors="pt")["pixel_values"]


def load_strictly(checkpoint: str, video: bool = False):
    """(`Sam2Model`, or with video `Sam2VideoModel`, in float32; image processor) of a folder or hub id, or CheckpointError."""
    check_folder(checkpoint, video)
    from safetensors import SafetensorError
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2VideoModel

    path = str(Path(checkpoint).expanduser()) if Path(checkpoint).expanduser().is_dir() else checkpoint
    damaged = "restore or re-download the checkpoint"
    try:
        values, _ = Sam2Config.get_config_dict(path)
        check_model_type(checkpoint, values.get("model_type"), video)
        model_class, config = (Sam2VideoModel, _video_config(values)) if video else (Sam2Model, _image_config(values))
        processor = Sam2ImageProcessor.from_pretrained(path)
        with _quiet_transformers():
            # Wrong shapes are let through here, to be reported below by name.
            model, report = model_class.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} cannot be loaded ({reason[:500]})", damaged) from error
    # A mismatch comes as (key, shape in the file, shape in the model).
    wrong = faults(
        {
            fault: sorted(name if isinstance(name, str) else f"{name[0]} {list(name[1])} for {list(name[2])}" for name in report.get(f"{fault}_keys") or ())
            for fault in ("missing", "unexpected", "mismatched")
        }
    )
    if wrong:
        # Left alone, transformers would fill the gaps with random weights and go on.
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} does not match its config.json: {wrong}", damaged)
    return model, processor


def _image_config(values: dict):
    """The configuration of the image model; a video checkpoint's holds it under the same names."""
    from transformers import Sam2Config

    return Sam2Config(**{k: values[k] for k in ("vision_config", "prompt_encoder_config", "mask_decoder_config") if k in values})


def _video_config(values: dict):
    from transformers import Sam2VideoConfig
    from transformers.models.sam2_video import Sam2VideoMaskDecoderConfig

    # As an object: transformers 5.19 makes a prompt encoder's configuration of a dictionary here.
    return Sam2VideoConfig.from_dict({**values, "mask_decoder_config": Sam2VideoMaskDecoderConfig(**values.get("mask_decoder_config") or {})})


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
