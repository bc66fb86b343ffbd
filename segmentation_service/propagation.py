"""Masks on one frame of a video carried to its other frames: many hypotheses in one pass a direction, frames read as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from .config import METHODS, PRECISIONS, PropagationConfig
from .masks import decode_rle, encode_rle
from .video import Video, VideoError, check_frame_number, read_frame
from .xmem import XMem

WEIGHTS = {
    "xmem": "an XMem, such as XMem.pth or the folder examples/toy/models/xmem",
    "sam2": "a SAM2 for videos, such as facebook/sam2.1-hiera-large or sam2.1_hiera_large.pt",
    "cutie": "the file of a Cutie, such as cutie-base-mega.pth",
}
"""What `checkpoint` must name for each method."""

Hypothesis = np.ndarray | Sequence[dict]
"""Masks of the objects of one answer: bool (N, H, W), or N run-length masks. N may be 0."""

Progress = Callable[[int, int], None]
"""Called with (frames done, frames to do) after every frame that the tracker has seen; the target frame does not count."""


class Tracker(Protocol):
    """One direction through one video, for several sets of objects."""

    def step(self, frame_HW3: np.ndarray, end: bool = False) -> list[torch.Tensor]:
        """Scores (1 + M, h, w) of each set on the next frame, of any size; a pixel belongs to the largest, the first being the
        background. end: no frame follows, so nothing need be remembered."""


class Method(Protocol):
    """A frozen network that carries masks; what tracks a video belongs to the video."""

    def start(self, frame_HW3: np.ndarray, masks: list[np.ndarray]) -> Tracker:
        """A tracker that has seen the first frame with the masks of each set, bool (M, H, W): at least one set, and no empty mask."""


class Propagator:
    """Groups of hypotheses about one video, whatever the method. Not thread-safe.

    A hypothesis is taken as a set of masks: the order in which it names its objects does not matter, an object named twice
    is one, and an object with an empty mask is nowhere in the video. Equal sets are tracked once, an empty one not at all.
    Objects of one hypothesis compete for pixels on all frames but the target frame, whose masks are returned as given.

    method: what carries the masks; an XMem is taken as it is, on the device on which to run.
    """

    def __init__(self, method: Method | XMem, config: PropagationConfig | None = None) -> None:
        self.config = _checked(config or PropagationConfig())
        if isinstance(method, XMem):
            from .propagation_xmem import XMemMethod

            method = XMemMethod(method, self.config)
        self.method = method

    @classmethod
    def load(cls, config: PropagationConfig, device: str | torch.device = "cpu") -> Propagator:
        """With the weights of `config.checkpoint`. Raises CheckpointError where they cannot be used, ValueError where none are named."""
        _checked(config)
        if config.checkpoint is None:
            raise ValueError(f"segmentation.propagation.checkpoint is null; set it to {WEIGHTS[config.method]}")
        if config.method == "xmem":
            from .propagation_xmem import XMemMethod as chosen
        elif config.method == "cutie":
            from .propagation_cutie import CutieMethod as chosen
        elif config.checkpoint.endswith(".pt"):
            from .propagation_sam2_meta import MetaSam2Method as chosen
        else:
            from .propagation_sam2 import Sam2Method as chosen
        return cls(chosen.load(config, device), config)

    def propagate(
        self,
        video: Video,
        target_frame: int,
        hypotheses: Sequence[Hypothesis],
        frames: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(frame, g, masks) for every hypothesis g on every frame of `frames` (None: all of the video), each once.

        masks: bool (N_g, H, W) at the frame's own size, in the order of the hypothesis's objects. They come as they are
        computed: the target frame, frames after it in rising order, those before it in falling order; empty hypotheses
        first. No more than the target frame and the current one are held, and none is read past the last wanted one.

        Raises VideoError, at once, where a frame number is wrong or the target frame cannot be read, and later where
        another cannot be read or is of another size; ValueError where masks do not fit the target frame.
        """
        job = self._prepare(video, target_frame, hypotheses, frames)
        return self._by_hypothesis(job, progress)

    def propagate_rle(
        self,
        video: Video,
        target_frame: int,
        hypotheses: Sequence[Hypothesis],
        frames: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> list[dict[int, list[dict]]]:
        """As `propagate`, collected: for each hypothesis {frame: one COCO RLE an object}, frames in rising order.

        A mask is encoded once for all hypotheses that share it.
        """
        job = self._prepare(video, target_frame, hypotheses, frames)
        of_set: list[dict[int, list[dict]]] = [{} for _ in job.sets]
        for frame, s, masks_MHW in self._by_set(job, progress):
            of_set[s][frame] = [encode_rle(mask_HW) for mask_HW in masks_MHW]
        empty = encode_rle(np.zeros(job.hw, dtype=bool))
        return [
            {t: [dict(empty if place is None else of_set[s][t][place]) for place in places] for t in sorted(job.wanted)}
            for s, places in zip(job.set_of, job.places)
        ]

    def _prepare(self, video: Video, target_frame: int, hypotheses: Sequence[Hypothesis], frames: Collection[int] | None) -> _Job:
        target = check_frame_number(video, target_frame)
        wanted = range(len(video)) if frames is None else frozenset(check_frame_number(video, t) for t in frames)
        target_HW3 = read_frame(video, target)
        hw = target_HW3.shape[:2]
        sets: dict[tuple[bytes, ...], int] = {}
        set_of, places = [], []
        for g, hypothesis in enumerate(hypotheses):
            packed = [np.packbits(mask_HW).tobytes() if mask_HW.any() else None for mask_HW in _masks_of(hypothesis, g, target, hw)]
            distinct = tuple(sorted({mask for mask in packed if mask is not None}))
            set_of.append(sets.setdefault(distinct, len(sets)) if distinct else None)
            places.append([None if mask is None else distinct.index(mask) for mask in packed])
        return _Job(video, target, target_HW3, wanted, list(sets), set_of, places)

    def _by_hypothesis(self, job: _Job, progress: Progress | None) -> Iterator[tuple[int, int, np.ndarray]]:
        for g, s in enumerate(job.set_of):
            if s is None:
                for t in sorted(job.wanted):
                    yield t, g, np.zeros((len(job.places[g]), *job.hw), dtype=bool)
        for frame, s, masks_MHW in self._by_set(job, progress):
            for g in (g for g, own in enumerate(job.set_of) if own == s):
                masks_NHW = np.zeros((len(job.places[g]), *job.hw), dtype=bool)
                for n, place in enumerate(job.places[g]):
                    if place is not None:
                        masks_NHW[n] = masks_MHW[place]
                yield frame, g, masks_NHW

    def _by_set(self, job: _Job, progress: Progress | None) -> Iterator[tuple[int, int, np.ndarray]]:
        """(frame, set, masks of its objects) for all sets on all wanted frames."""
        if not job.wanted:
            return
        ends = ((1, max(job.wanted)), (-1, min(job.wanted)))
        passes = job.passes(self.config.max_objects)
        done, total = 0, len(passes) * sum(max(0, step * (last - job.target)) for step, last in ends)
        for sets in passes:
            masks = [job.unpack(s) for s in sets]
            if job.target in job.wanted:
                yield from ((job.target, s, masks_MHW) for s, masks_MHW in zip(sets, masks))
            for step, last in ends:
                for frame, probs in self._track(job, masks, step, last):
                    if frame in job.wanted:
                        yield from ((frame, s, _to_masks(p, job.hw)) for s, p in zip(sets, probs))
                    done += 1
                    if progress is not None:
                        progress(done, total)

    def _track(self, job: _Job, masks: list[np.ndarray], step: int, last: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """(frame, scores (1 + M, h, w) of each set) from the target frame's neighbour to `last`, if that lies in the direction of `step`."""
        if step * (last - job.target) <= 0:
            return
        tracker = self.method.start(job.target_HW3, masks)
        for t in range(job.target + step, last + step, step):
            yield t, tracker.step(job.read(t), end=t == last)


@dataclass(frozen=True)
class _Job:
    """One call: what was asked, with its hypotheses sorted into distinct sets of objects."""

    video: Video
    target: int
    target_HW3: np.ndarray
    wanted: Collection[int]
    sets: list[tuple[bytes, ...]]
    """The masks of each set, packed eight pixels a byte: a policy's wildest group has two thousand."""
    set_of: list[int | None]
    """The set of each hypothesis; None where no object is left."""
    places: list[list[int | None]]
    """Where each object of each hypothesis stands in its set; None where its mask is empty."""

    @property
    def hw(self) -> tuple[int, int]:
        return self.target_HW3.shape[:2]

    def read(self, t: int) -> np.ndarray:
        frame_HW3 = read_frame(self.video, t)
        if frame_HW3.shape[:2] != self.hw:
            raise VideoError(f"frame {t} is {_size(frame_HW3.shape)} and frame {self.target} {_size(self.hw)}; all frames of a video have one size")
        return frame_HW3

    def unpack(self, s: int) -> np.ndarray:
        """Masks of a set: bool (M, H, W)."""
        height, width = self.hw
        rows = np.stack([np.frombuffer(mask, np.uint8) for mask in self.sets[s]])
        return np.unpackbits(rows, axis=1, count=height * width).reshape(-1, height, width).astype(bool)

    def passes(self, max_objects: int) -> list[list[int]]:
        """Sets that go through the video together: all, or as many in turn as have `max_objects` objects. None is split."""
        passes: list[list[int]] = []
        room = 0
        for s, masks in enumerate(self.sets):
            if not passes or len(masks) > room:
                passes.append([])
                room = max_objects
            passes[-1].append(s)
            room -= len(masks)
        return passes


def _checked(config: PropagationConfig) -> PropagationConfig:
    for name, choices in (("method", METHODS), ("dtype", PRECISIONS)):
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"segmentation.propagation.{name} must be one of {', '.join(choices)}; got {value!r}")
    return config


def _to_masks(scores_Nhw: torch.Tensor, hw: tuple[int, int]) -> np.ndarray:
    """bool (M, H, W), no two of which overlap. Scores are resized and then compared, so that edges stay smooth."""
    if tuple(scores_Nhw.shape[1:]) != hw:
        scores_Nhw = F.interpolate(scores_Nhw[None], hw, mode="bilinear", align_corners=False)[0]
    index_HW = scores_Nhw.argmax(0).cpu().numpy()
    return index_HW == np.arange(1, len(scores_Nhw))[:, None, None]


def _masks_of(hypothesis: Hypothesis, g: int, target: int, hw: tuple[int, int]) -> Iterator[np.ndarray]:
    """Its masks (H, W), one at a time, checked against the size of the target frame."""
    if isinstance(hypothesis, np.ndarray) and (hypothesis.dtype != bool or hypothesis.ndim != 3):
        raise ValueError(f"hypothesis {g}: masks are bool (objects, H, W) or run-length masks; got {hypothesis.dtype} {hypothesis.shape}")
    for n, mask in enumerate(hypothesis):
        try:
            mask_HW = mask if isinstance(hypothesis, np.ndarray) else decode_rle(mask)
        except ValueError as error:
            raise ValueError(f"hypothesis {g}, object {n}: {error}") from error
        if mask_HW.shape != hw:
            raise ValueError(f"hypothesis {g}, object {n}: the mask is {_size(mask_HW.shape)} and frame {target}, on which it lies, {_size(hw)}")
        yield mask_HW


def _size(hw: Sequence[int]) -> str:
    return f"{hw[0]}x{hw[1]}"
