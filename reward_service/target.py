"""The ground truth a completion is scored against."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Mapping, Optional, Sequence

import numpy as np


class MissingInput(ValueError):
    """An active reward term lacks an input it needs: an error of the configuration, never a reward of 0."""


@dataclass(frozen=True, eq=False)
class FrameTarget:
    """Truth on one shown frame, for key-frame and video terms.

    boxes: one [x1, y1, x2, y2] an object, None where it is absent. masks: (N, H, W) bool or N masks or RLEs (None where
    absent), or one mask (H, W) of the union. accuracy_iou=video needs one an object, in the order of the target's boxes.
    ignore: as of `Target`, for terms over the annotated frames.
    """

    boxes: Sequence[Optional[Sequence[float]]] = ()
    masks: object = None
    ignore: object = None


@dataclass(frozen=True, eq=False)
class Target:
    """Truth of one query on its target frame, in pixels of the original frame.

    image_size: (H, W). boxes: N x [x1, y1, x2, y2], integer corners inclusive. points: per object a list of [x, y], the
    first inside its mask. masks: (N, H, W) bool, or N masks (H, W) or COCO RLE dicts. frames: shown frame id ->
    FrameTarget (or a dict with its fields), in the order shown. frame: id of the target frame, by which terms on the target
    frame find its masks where the predicted ones are {frame id: masks}. N = 0 is legal: nothing to find.
    ignore: a mask (H, W) or RLE, or several, of pixels that count in no overlap of masks on the target frame: neither in the
    intersection nor in the union (label 255 of ReasonSeg). Terms on boxes and points do not know it.
    Raises ValueError naming what does not fit.
    """

    image_size: tuple[int, int]
    boxes: Sequence[Sequence[float]] = ()
    points: Optional[Sequence[Sequence[Sequence[float]]]] = None
    masks: object = None
    frames: Optional[Mapping[int, FrameTarget]] = None
    frame: Optional[int] = None
    ignore: object = None
    _cache: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        size = tuple(self.image_size)
        if len(size) != 2 or any(int(v) != v or v < 1 for v in size):
            raise ValueError(f"image_size={self.image_size!r}: expected (height, width) of at least one pixel")
        for box in self.boxes:
            if len(box) != 4 or not all(math.isfinite(v) for v in box):
                raise ValueError(f"target box {box!r}: expected four finite numbers [x1, y1, x2, y2]")
        if self.points is not None:
            if len(self.points) != len(self.boxes):
                raise ValueError(f"{len(self.points)} lists of points for {len(self.boxes)} boxes: give one list an object")
            for point in (p for points in self.points for p in points):
                if np.shape(point) != (2,) or not all(math.isfinite(v) for v in point):
                    raise ValueError(f"target point {point!r}: points are per object, [[[x, y], ...], ...]")
        if self.masks is not None and len(self.masks) != len(self.boxes):
            raise ValueError(f"{len(self.masks)} masks for {len(self.boxes)} boxes: give one mask an object")
        for name, value in (("image_size", (int(size[0]), int(size[1]))), ("frames", self._frame_targets())):
            object.__setattr__(self, name, value)

    def _frame_targets(self):
        if self.frames is None:
            return None
        return {k: v if isinstance(v, FrameTarget) else FrameTarget(**v) for k, v in self.frames.items()}

    def __getstate__(self):  # what is computed lazily stays behind when a target travels
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"_cache": {}}

    def __len__(self):
        return len(self.boxes)

    def cached(self, key, compute):
        """`compute()` once per key: the completions of a group share what depends on the target alone."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def boxes_N4(self) -> np.ndarray:
        return self.cached("boxes", lambda: np.array(self.boxes, dtype=np.float64).reshape(-1, 4))

    def points_N2(self) -> np.ndarray:
        """First point of each object; MissingInput when one has none."""
        if len(self) and (self.points is None or not all(len(p) for p in self.points)):
            raise MissingInput("the point term needs a point of each object in target.points; set weights.point=0 to do without")
        return self.cached("points", lambda: np.array([p[0] for p in self.points or ()], dtype=np.float64).reshape(-1, 2))

    def masks_NHW(self, for_term: str) -> np.ndarray:
        """bool (N, H, W); MissingInput when there are objects and no masks."""
        if self.masks is None and len(self):
            raise MissingInput(f"the {for_term} term needs target.masks; set its weight to 0 to do without")
        return self.cached("masks", lambda: mask_stack([] if self.masks is None else self.masks, self.image_size, "target.masks"))

    def union_HW(self, for_term: str) -> np.ndarray:
        masks = self.masks_NHW(for_term)
        return self.cached("union", lambda: masks.any(axis=0))

    def ignored_HW(self, frame=None) -> Optional[np.ndarray]:
        """bool (H, W): pixels to leave out of overlaps of masks on the target frame, or on one of `frames`; None where all count."""
        given, what = (self.ignore, "target.ignore") if frame is None else (self.frames[frame].ignore, f"target.frames[{frame!r}].ignore")
        if given is None:
            return None
        ignored = union_of(given, what, self.image_size)
        if ignored.shape != self.image_size:
            raise ValueError(f"{what} is {ignored.shape}, the target frame is {self.image_size} (height, width)")
        return ignored

    def frame_union(self, frame) -> np.ndarray:
        """bool (H, W): union of the objects on a shown frame; its own size is allowed, all zero where none is there."""
        given = self.frames[frame].masks
        if given is None:
            raise MissingInput(f"the keyframe and video_iou terms need masks in target.frames[{frame!r}]")
        return self.cached(("frame", frame), lambda: union_of(given, f"target.frames[{frame!r}].masks", self._frames_hw()))

    def video_union_HW(self, frame) -> np.ndarray:
        """bool (H, W), of the target frame's size: union of the objects on another frame, zero where all are out of view."""
        given = self.frames[frame].masks
        if given is None:
            raise MissingInput(f"the video_quality and temporal_consistency terms need masks in target.frames[{frame!r}]")
        union = union_of(given, what := f"target.frames[{frame!r}].masks", self.image_size)
        if union.shape != self.image_size:
            raise ValueError(f"{what} are {union.shape}, the target frame is {self.image_size} (height, width)")
        return union

    def frame_boxes(self, frame) -> Sequence[Optional[Sequence[float]]]:
        """Boxes of a shown frame; MissingInput when it has none although there are objects (one that is out of view is None)."""
        boxes, masks = self.frames[frame].boxes, self.frames[frame].masks
        if not len(boxes) and (len(self) or (masks is not None and self.frame_union(frame).any())):
            raise MissingInput(f"the keyframe, iou and video_iou terms need a box, or None, of each object in target.frames[{frame!r}].boxes")
        return boxes

    def frame_masks_NHW(self, frame) -> np.ndarray:
        """bool (N, H, W): the objects of the target on another frame, in the order of `boxes`, zero where one is out of view."""
        given = self.frames[frame].masks
        if given is None:
            raise MissingInput(f"the iou term (accuracy_iou=video) needs masks in target.frames[{frame!r}]")
        if isinstance(given, dict) or len(given) != len(self):
            raise ValueError(f"target.frames[{frame!r}].masks: give one mask, or None, for each of the {len(self)} objects of target.boxes")
        return mask_stack(given, self.image_size, f"target.frames[{frame!r}].masks")

    def _frames_hw(self):
        """Size of the masks of the shown frames, for a frame on which nothing is present."""
        for frame in self.frames.values():
            if frame.masks is not None and (isinstance(frame.masks, dict) or any(m is not None for m in frame.masks)):
                return union_of(frame.masks, "target.frames", self.image_size).shape
        return self.image_size


def without(masks: np.ndarray, ignored_HW: Optional[np.ndarray]) -> np.ndarray:
    """Masks (..., H, W) without the pixels to ignore: what both sides of an overlap go through."""
    return masks if ignored_HW is None else masks & ~ignored_HW


def mask_stack(masks, size_hw, what: str) -> np.ndarray:
    """Masks in any accepted form -> bool (N, H, W). None stands for an empty mask. ValueError on another size."""
    if isinstance(masks, np.ndarray) and masks.ndim == 3:
        if masks.shape[1:] != tuple(size_hw):
            raise ValueError(f"{what} are {masks.shape[1:]}, the target frame is {tuple(size_hw)} (height, width)")
        return masks.astype(bool, copy=False)
    out = np.zeros((len(masks), *size_hw), dtype=bool)
    for n, mask in enumerate(masks):
        if mask is None:
            continue
        mask = _decoded(mask)
        if mask.shape != tuple(size_hw):
            raise ValueError(f"{what}[{n}] is {mask.shape}, the target frame is {tuple(size_hw)} (height, width)")
        out[n] = mask
    return out


def union_of(masks, what: str, empty_hw) -> np.ndarray:
    """One mask (H, W), or several in any accepted form -> bool (H, W) of their union; zeros of `empty_hw` for none."""
    if isinstance(masks, dict) or (isinstance(masks, np.ndarray) and masks.ndim == 2):
        return _decoded(masks)
    present = [_decoded(m) for m in masks if m is not None]
    if not present:
        return np.zeros(empty_hw, dtype=bool)
    if len({m.shape for m in present}) > 1:
        raise ValueError(f"{what} differ in size: {sorted({m.shape for m in present})}")
    return np.logical_or.reduce(present)


def _decoded(mask) -> np.ndarray:
    if isinstance(mask, dict):
        from segmentation_service.masks import decode_rle

        mask = decode_rle(mask)
    return np.asarray(mask).astype(bool, copy=False)
