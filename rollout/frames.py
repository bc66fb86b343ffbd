"""Frames of a video, decoded: folders of images so far."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png")


class VideoError(ValueError):
    """A video that cannot be read; the message names the file and the remedy."""


@lru_cache(maxsize=4096)
def frame_files(folder: Path) -> tuple[Path, ...]:
    """The image files of a folder in the order of their names: file i is frame i. An image file is a video of one frame."""
    if folder.suffix.lower() in SUFFIXES and folder.is_file():
        return (folder,)
    if not folder.is_dir():
        raise VideoError(f"{folder}: no such folder of frames; check the data set's root and its `video` column")
    files = tuple(sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES))
    if not files:
        raise VideoError(f"{folder}: holds no {', '.join(SUFFIXES)} files")
    return files


def load_frames(folder: str | Path, frame_ids: Iterable[int]) -> dict[int, np.ndarray]:
    """The asked frames as uint8 RGB (H, W, 3), keyed by id. Raises `VideoError` naming the file that is missing or broken."""
    files = frame_files(Path(folder))
    frames = {}
    for t in sorted(set(frame_ids)):
        if not 0 <= t < len(files):
            raise VideoError(f"{folder}: frame {t} was asked for, but there are frames 0 to {len(files) - 1}")
        try:
            with Image.open(files[t]) as image:
                frames[t] = np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise VideoError(f"{files[t]}: not a readable image ({error}); restore the file or drop the video") from error
    return frames


def check_frames(folder: str | Path) -> None:
    """Looks at every file of a folder of frames without decoding it: its header, and for JPEG its end marker.

    About a tenth of a millisecond a file. Raises `VideoError` naming the file that is broken or cut short.
    """
    for file in frame_files(Path(folder)):
        try:
            with Image.open(file) as image:
                jpeg = image.format == "JPEG"
            with file.open("rb") as handle:
                handle.seek(-min(64, file.stat().st_size), 2)
                complete = not jpeg or b"\xff\xd9" in handle.read()
        except (UnidentifiedImageError, OSError) as error:
            raise VideoError(f"{file}: not a readable image ({error}); restore the file or drop the video") from error
        if not complete:
            raise VideoError(f"{file}: the JPEG is cut short; restore the file or drop the video")
