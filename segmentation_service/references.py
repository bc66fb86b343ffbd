"""From what a request calls a video to the video: paths under allowed folders and uploads, and nothing else of the file system."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .service_request import ServiceError
from .video import ImageFolder, Video, VideoError, open_video

UPLOAD = "upload:"
UPLOAD_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class References:
    """roots: folders below which a video may be named, absolutely or relative to one of them; uploads: where `upload:ID` lies.

    max_pixels: the most that a frame of them may have.
    """

    def __init__(self, roots: Sequence[str | Path], uploads: str | Path | None = None, max_pixels: int = 3840 * 2160) -> None:
        self.roots = tuple(Path(root).expanduser().absolute() for root in roots)
        self.uploads = None if uploads is None else Path(uploads).expanduser().absolute()
        self.max_pixels = max_pixels

    def open(self, reference: str) -> OpenVideo:
        """Raises ServiceError 404 where there is no such video, which is also said of all that lies elsewhere; 422 where it is no video."""
        path, root = self._find(reference)
        try:
            return OpenVideo(reference, path, root, open_video(path), self.max_pixels)
        except (VideoError, OSError) as error:
            raise ServiceError(422, _without_path(error, path, reference)) from error

    def _find(self, reference: str) -> tuple[Path, Path]:
        """Where the video lies, symbolic links followed, and the folder that it may not leave."""
        if reference.startswith(UPLOAD):
            name = reference.removeprefix(UPLOAD)
            candidates = [(self.uploads, name)] if self.uploads is not None and UPLOAD_ID.fullmatch(name) else []
        else:
            candidates = [(root, reference) for root in self.roots]
        for root, name in candidates:
            # `..` is taken out of the name, not looked up: what is not below the root is refused before the file system is asked.
            path = Path(os.path.normpath(root / name))
            if not path.is_relative_to(root) or os.path.normpath(name).startswith(".."):
                continue
            try:
                real, real_root = path.resolve(strict=True), root.resolve(strict=True)
            except (OSError, RuntimeError, ValueError):  # missing, a loop, or a name with a zero byte
                continue
            if real.is_relative_to(real_root):
                return real, real_root
        raise ServiceError(404, f"there is no video {reference[:200]!r}")


@dataclass(frozen=True)
class OpenVideo:
    """A `Video` that was found, under the name by which it was asked for; errors name it so, and do not tell where it lies."""

    reference: str
    path: Path
    root: Path
    video: Video
    max_pixels: int

    def __len__(self) -> int:
        return len(self.video)

    def identity(self, frame: int) -> Hashable:
        """Changes whenever the file that holds the frame does: of a folder the image, else the video."""
        file = self._file(frame)
        stat = file.stat()
        return str(file), stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, frame

    def frame(self, i: int) -> np.ndarray:
        """Raises VideoError where it cannot be read or its image is a link that leaves the root, ServiceError 413 where it is too large."""
        try:
            self._check_pixels(i, *self._size_in_header(self._file(i)))
            frame_HW3 = self.video.frame(i)
        except (VideoError, OSError) as error:
            raise VideoError(_without_path(error, self.path, self.reference)) from error
        self._check_pixels(i, *frame_HW3.shape[:2])
        return frame_HW3

    def _file(self, i: int) -> Path:
        if not isinstance(self.video, ImageFolder):
            return self.path
        file = (self.path / self.video.names[i]).resolve()
        if not file.is_relative_to(self.root):
            raise VideoError(f"frame {i} of {self.reference} is a link that leaves the folders of videos")
        return file

    def _size_in_header(self, file: Path) -> tuple[int, int]:
        """Height and width before anything is decoded, since a small file can hold a huge image; (0, 0) where only decoding can tell."""
        if not isinstance(self.video, ImageFolder):
            return getattr(self.video, "stored_hw", (0, 0))
        from PIL import Image

        try:
            with Image.open(file) as image:
                return image.height, image.width
        except Image.DecompressionBombError:
            return self.max_pixels, 2
        except (OSError, SyntaxError, ValueError):
            return 0, 0  # decoding it will tell what is wrong

    def _check_pixels(self, i: int, height: int, width: int) -> None:
        if height * width > self.max_pixels:
            raise ServiceError(413, f"frame {i} of {self.reference} has more than the {self.max_pixels} pixels that this service takes")


def _without_path(error: Exception, path: Path, reference: str) -> str:
    return str(error).replace(str(path), reference)
