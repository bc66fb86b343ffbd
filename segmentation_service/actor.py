"""The segmenter as a Ray actor: a shell round `Segmenter` for use inside the trainer's placement group."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import ray

from .config import SegmentationConfig
from .prompts import ObjectPrompt
from .segmenter import Segmenter
from .video import Video

if TYPE_CHECKING:
    from .propagation import Hypothesis


@ray.remote
class SegmenterActor:
    """One replica. Calls run one after another, each a whole group, so that batches do not depend on timing.

    Place it with `SegmenterActor.options(num_cpus=..., num_gpus=..., ...)`. A checkpoint that cannot be used raises
    CheckpointError from `ready()`, which a dying actor could not report with its type.
    """

    def __init__(self, config: SegmentationConfig) -> None:
        self._error: ValueError | None = None
        try:
            self._segmenter = Segmenter(
                config.checkpoint, config.backend, config.device, config.dtype, config.max_prompts_per_batch, config.propagation, config.model_config
            )
        except ValueError as error:  # CheckpointError among them
            self._error = error
            return
        import torch

        # A fixed number, for the same reason: sums over another number of threads round differently.
        torch.set_num_threads(config.cpus_per_replica)

    def ready(self) -> dict[str, str]:
        """Device and dtype in use, once the weights are loaded. Raises CheckpointError or ValueError where they could not be."""
        backend = self._loaded().backend
        return {"device": str(backend.device), "dtype": str(backend.dtype).removeprefix("torch.")}

    def segment_group(self, frame_HW3: np.ndarray, hypotheses: Sequence[Sequence[ObjectPrompt]]) -> list[list[dict]]:
        """One COCO RLE for every object of every hypothesis about the frame; see `Segmenter.segment_group`."""
        return self._loaded().segment_group(frame_HW3, hypotheses)

    def propagate_group(
        self, video: Video, target_frame: int, hypotheses: Sequence[Hypothesis], frames: Collection[int] | None = None
    ) -> list[dict[int, list[dict]]]:
        """COCO RLEs by frame for every hypothesis; see `Segmenter.propagate_group`. An `ImageFolder` is read where the actor runs."""
        return self._loaded().propagate_group(video, target_frame, hypotheses, frames)

    def stats(self) -> dict[str, float]:
        """Image encodings, prompts asked, decoded, deduplicated and empty, frames propagated, and seconds; see `SegmenterStats`."""
        return self._loaded().stats()

    def _loaded(self) -> Segmenter:
        if self._error is not None:
            raise self._error
        return self._segmenter
