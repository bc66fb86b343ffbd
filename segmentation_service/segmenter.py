"""The segmenter: one frame and the prompts of many hypotheses in, masks out, with a single image encoding; and on through the video."""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .checkpoint import check_sam2
from .config import BACKENDS, PropagationConfig
from .embedding_cache import EmbeddingCache, fingerprint
from .masks import encode_rle
from .prompts import ObjectPrompt, clip_prompt
from .video import Video

if TYPE_CHECKING:
    from .propagation import Hypothesis, Progress, Propagator

__all__ = ["ObjectPrompt", "Sam2Backend", "Segmenter", "SegmenterStats"]


class Sam2Backend(Protocol):
    """What a program that runs SAM2 must offer. Frames are RGB uint8 (H, W, 3) of any size."""

    device: Any
    dtype: Any

    def encode(self, frame_HW3: np.ndarray) -> Any:
        """The embedding of a frame; opaque to the caller, and enough for `decode`."""

    def decode(self, embedding: Any, prompts: Sequence[ObjectPrompt]) -> np.ndarray:
        """Masks bool (N, H, W) at the frame's own size. Prompts lie inside the frame and are not empty (`clip_prompt`)."""


@dataclass
class SegmenterStats:
    """Counters since the segmenter was made. prompts = decoded + deduplicated + empty; a frame counts once for all hypotheses of a pass."""

    image_encodings: int = 0
    prompts: int = 0
    decoded: int = 0
    deduplicated: int = 0
    empty: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    frames_propagated: int = 0
    propagate_seconds: float = 0.0


class Segmenter:
    """Frozen SAM2 for groups of hypotheses about one frame, and XMem or another for the rest of the video. Not thread-safe.

    checkpoint: a Hugging Face folder or hub id, or for the backend `sam2` a `.pt` file, whose architecture model_config names;
    backend: one of `config.BACKENDS`, or an object that meets `Sam2Backend` (then checkpoint, device, dtype, max_prompts_per_batch
    and model_config do not matter). propagation: settings, whose network is loaded to the backend's device if they name a
    checkpoint, or a `Propagator`. cache: embeddings of frames that are given a key are kept in it (a backend of one's own must
    then have its network in `model`). Raises CheckpointError where a checkpoint is missing, incomplete, or of another architecture.
    """

    def __init__(
        self,
        checkpoint: str,
        backend: str | Sam2Backend = "transformers",
        device: str = "auto",
        dtype: str = "auto",
        max_prompts_per_batch: int = 64,
        propagation: PropagationConfig | Propagator | None = None,
        model_config: str | None = None,
        cache: EmbeddingCache | None = None,
    ) -> None:
        if not isinstance(backend, str):
            self.backend = backend
        elif backend not in BACKENDS:
            raise ValueError(f"segmentation.backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        else:
            check_sam2(checkpoint, backend, model_config)  # before torch, which takes seconds to import
            if backend == "transformers":
                from .sam2_transformers import TransformersSam2

                self.backend = TransformersSam2.load(checkpoint, device, dtype, max_prompts_per_batch)
            else:
                from .sam2_meta import MetaSam2

                self.backend = MetaSam2.load(checkpoint, model_config, device, dtype, max_prompts_per_batch)
        if isinstance(propagation, PropagationConfig) and propagation.checkpoint is not None:
            from .propagation import Propagator

            propagation = Propagator.load(propagation, self.backend.device)
        self.propagator = None if isinstance(propagation, PropagationConfig) else propagation
        self.cache, self._model = cache, None if cache is None else fingerprint(self.backend)
        self._stats = SegmenterStats()

    def segment_frame(self, frame_HW3: np.ndarray, hypotheses: Sequence[Sequence[ObjectPrompt]], key: Hashable = None) -> list[np.ndarray]:
        """Masks for every object of every hypothesis about one frame.

        frame_HW3: RGB uint8 (H, W, 3). Returns one bool array (N_i, H, W) a hypothesis, in the order of its N_i objects;
        (0, H, W) where it has none. A prompt with nothing in the frame gets an empty mask (rule: `prompts.clip_prompt`)
        and never disturbs the others. Equal prompts, after clipping, are decoded once. The frame is encoded once, or not
        at all where no prompt is left. key: what tells this frame from all others; with a cache, a frame whose key it has seen
        is not encoded again. Raises ValueError where the frame, TypeError where a prompt is of the wrong kind.
        """
        masks_UHW, places = self._unique_masks(frame_HW3, hypotheses, key)
        hw = frame_HW3.shape[:2]
        result = []
        for places_i in places:
            masks_NHW = np.zeros((len(places_i), *hw), dtype=bool)
            for n, place in enumerate(places_i):
                if place is not None:
                    masks_NHW[n] = masks_UHW[place]
            result.append(masks_NHW)
        return result

    def segment_group(self, frame_HW3: np.ndarray, hypotheses: Sequence[Sequence[ObjectPrompt]], key: Hashable = None) -> list[list[dict]]:
        """As `segment_frame`, with each mask as COCO RLE (`masks.decode_rle` reads it); equal masks are encoded once."""
        masks_UHW, places = self._unique_masks(frame_HW3, hypotheses, key)
        empty = encode_rle(np.zeros(frame_HW3.shape[:2], dtype=bool))
        rles = [encode_rle(mask_HW) for mask_HW in masks_UHW]
        return [[dict(empty if place is None else rles[place]) for place in places_i] for places_i in places]

    def propagate_group(
        self,
        video: Video,
        target_frame: int,
        hypotheses: Sequence[Hypothesis],
        frames: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> list[dict[int, list[dict]]]:
        """For each hypothesis {frame: one COCO RLE an object}, on the given frames or on all of the video.

        hypotheses: masks on the target frame, bool (N, H, W) or RLEs as from `segment_group`. They go through the video in
        one pass a direction; rules, errors and progress under `propagation.Propagator`. Raises ValueError where the segmenter was made
        without propagation.
        """
        if self.propagator is None:
            raise ValueError("this segmenter does not propagate masks; set segmentation.propagation.checkpoint to weights of the method, such as XMem.pth")
        start = time.perf_counter()

        def count(done: int, total: int) -> None:
            self._stats.frames_propagated += 1
            if progress is not None:
                progress(done, total)

        result = self.propagator.propagate_rle(video, target_frame, hypotheses, frames, count)
        self._stats.propagate_seconds += time.perf_counter() - start
        return result

    def stats(self) -> dict[str, float]:
        """The counters of `SegmenterStats` as a dictionary, and those of the cache where there is one."""
        return asdict(self._stats) | (self.cache.stats() if self.cache is not None else {})

    def _unique_masks(self, frame_HW3, hypotheses, key) -> tuple[np.ndarray, list[list[int | None]]]:
        """Masks of the distinct prompts (U, H, W), and for each object of each hypothesis its place among them or None."""
        _check_frame(frame_HW3)
        hw = frame_HW3.shape[:2]
        place_of: dict[ObjectPrompt, int] = {}
        places: list[list[int | None]] = []
        for hypothesis in hypotheses:
            places_i: list[int | None] = []
            for prompt in hypothesis:
                if not isinstance(prompt, ObjectPrompt):
                    raise TypeError(f"hypotheses are lists of ObjectPrompt; got a {type(prompt).__name__}: {str(prompt)[:80]}")
                clipped = clip_prompt(prompt, hw)
                places_i.append(None if clipped is None else place_of.setdefault(clipped, len(place_of)))
            places.append(places_i)
        asked = sum(map(len, places))
        empty = sum(place is None for places_i in places for place in places_i)
        self._stats.prompts += asked
        self._stats.empty += empty
        self._stats.decoded += len(place_of)
        self._stats.deduplicated += asked - empty - len(place_of)
        if not place_of:
            return np.zeros((0, *hw), dtype=bool), places
        start = time.perf_counter()
        embedding = self._embedding(frame_HW3, key)
        encoded = time.perf_counter()
        masks_UHW = self.backend.decode(embedding, list(place_of))
        self._stats.encode_seconds += encoded - start
        self._stats.decode_seconds += time.perf_counter() - encoded
        return masks_UHW, places

    def _embedding(self, frame_HW3: np.ndarray, key: Hashable) -> Any:
        kept = self.cache is not None and key is not None
        key = (key, self._model, frame_HW3.shape[:2])
        embedding = self.cache.get(key) if kept else None
        if embedding is None:
            embedding = self.backend.encode(frame_HW3)
            self._stats.image_encodings += 1
            if kept:
                self.cache.put(key, embedding)
        return embedding


def _check_frame(frame_HW3) -> None:
    if not isinstance(frame_HW3, np.ndarray) or frame_HW3.dtype != np.uint8 or frame_HW3.ndim != 3 or frame_HW3.shape[2] != 3 or 0 in frame_HW3.shape:
        kind = f"{frame_HW3.dtype} {frame_HW3.shape}" if isinstance(frame_HW3, np.ndarray) else type(frame_HW3).__name__
        raise ValueError(f"a frame is an RGB uint8 array (H, W, 3); got {kind}")
