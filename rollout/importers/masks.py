"""Masks in the forms that several benchmarks share: run-length tracks, and palette images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rollout.episodes import IgnoreMask, annotate
from rollout.importers.item import Defect, Track, Truth
from rollout.media import Media
from segmentation_service.masks import decode_rle, encode_rle

OTHER_SIZE = "mask of another size than the frame"
VOID = 255


@dataclass(frozen=True)
class RleTracks:
    """MeViS and ReVOS: for each object a COCO RLE, or null, for every listed frame."""

    tracks: Mapping[str, list]

    def read(self, media: Media, listed: Sequence[int], object_ids: Sequence[str]) -> Truth:
        return Truth(tuple(listed), {o: _attempt(self._track, media, listed, o) for o in object_ids})

    def _track(self, media: Media, listed: Sequence[int], object_id: str) -> Track:
        rles = self.tracks.get(object_id)
        if not isinstance(rles, list):
            raise Defect("unknown object", f"annotation {object_id}")
        if len(rles) != len(listed):
            raise Defect("number of masks is not the number of frames", f"annotation {object_id}: {len(rles)} masks, {len(listed)} frames")
        annotations = []
        for t, rle in zip(listed, rles):
            if rle is not None:
                annotations.append(annotate(t, decoded(rle, media.hw, f"annotation {object_id}, frame {t}")))
        return Track(tuple(listed), tuple(a for a in annotations if a))


@dataclass(frozen=True)
class PalettePngs:
    """Ref-YouTube-VOS and Ref-DAVIS17: a folder with one palette image a frame whose pixels are object numbers; 255 is void."""

    folder: Path

    def read(self, media: Media, listed: Sequence[int], object_ids: Sequence[str]) -> Truth:
        images = ((t, read_png(file, media.hw)) for t, file in mask_files(self.folder, media, listed))
        return numbered_truth(self.folder, images, object_ids)


def numbered_truth(folder: Path, images: Iterable[tuple[int, np.ndarray]], object_ids: Sequence[str], everything: str | None = None) -> Truth:
    """What (frame, object numbers uint8 (H, W)) say about the objects; VOID is to be ignored. everything: the id that stands for whatever has a number.
    folder: of the images, for messages."""
    annotations: dict[str, list] = {o: [] for o in object_ids}
    ignore, frames = [], []
    for t, values_HW in images:
        frames.append(t)
        void_HW = values_HW == VOID
        for o, found in annotations.items():
            if o == everything:
                found.append(annotate(t, (values_HW > 0) & ~void_HW))
            elif o.isdecimal() and 0 < int(o) < VOID:
                found.append(annotate(t, values_HW == int(o)))
        if void_HW.any():
            ignore.append(IgnoreMask(t, encode_rle(void_HW)["counts"]))
    tracks = {o: Track(tuple(frames), tuple(filter(None, found))) for o, found in annotations.items()}
    unknown = {
        o: Defect("unknown object", f"{'nothing' if o == everything else f'object {o}'} is in no mask of {folder}") for o, t in tracks.items() if not t.annotations
    }
    return Truth(tuple(frames), tracks | unknown, tuple(ignore))


def mask_files(folder: Path, media: Media, listed: Iterable[int]) -> list[tuple[int, Path]]:
    """The PNG masks of a folder with the numbers of their frames, those of listed frames. Raises Defect where a mask has no frame."""
    files = {f.stem: f for f in sorted(folder.glob("*.png"))}
    if not files:
        raise Defect("masks missing", str(folder))
    astray = sorted(files.keys() - set(media.names))
    if astray:
        raise Defect("mask on a missing frame", f"{folder}: {len(astray)}, first {astray[0]}")
    return [(t, files[media.names[t]]) for t in sorted(listed) if media.names[t] in files]


def read_png(file: Path, hw: tuple[int, int]) -> np.ndarray:
    """The values of a palette or grey image: uint8 (H, W)."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("P", "L", "1"):
                raise Defect("mask is not a palette image", f"{file}: mode {image.mode}")
            values_HW = np.asarray(image).astype(np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise Defect("unreadable mask", str(file)) from error
    if values_HW.shape != hw:
        raise Defect(OTHER_SIZE, f"{file}: {values_HW.shape}, the frame {hw} (height, width)")
    return values_HW


def decoded(rle: object, hw: tuple[int, int], where: str) -> np.ndarray:
    """The mask of an RLE: bool (H, W) of the frame's size. Raises Defect."""
    try:
        mask_HW = decode_rle(rle)
    except ValueError as error:
        raise Defect("broken mask", f"{where}: {error}") from error
    if mask_HW.shape != hw:
        raise Defect(OTHER_SIZE, f"{where}: {mask_HW.shape}, the frame {hw} (height, width)")
    return mask_HW


def _attempt(track, media: Media, listed: Sequence[int], object_id: str) -> Track | Defect:
    try:
        return track(media, listed, object_id)
    except Defect as defect:
        return defect
