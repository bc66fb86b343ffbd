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
    """roots: folders below which a video may be named, absolutely or relative to one of them; uploads: where `upload:ID` lies."""

    def __init__(self, roots: Sequence[str | Path], uploads: str | Path | None = None) -> None:
        self.roots = tuple(Path(root).expanduser().absolute() for root in roots)
        self.uploads = None if uploads is None else Path(uploads).expanduser().absolute()

    def open(self, reference: str) -> OpenVideo:
        """Raises ServiceError 404 where there is no such video, which is also said of all that lies elsewhere; 422 where it is no video."""
        path, root = self._find(reference)
        try:
            return OpenVideo(reference, path, root, open_video(path))
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
            path = Path(os.path.normpath(root / name))
            if not path.is_relative_to(root):
                continue  # before anything is asked of the file system
            try:
                # Without the normalisation above, since `..` after a symbolic link leads from where it points to.
                real, real_root = (root / name).resolve(strict=True), root.resolve(strict=True)
            except (OSError, RuntimeError, ValueError):  # missing, a loop, or a name with a zero byte
                continue
            if real.is_relative_to(real_root):
                return real, real_root
        raise ServiceError(404, f"there is no video {reference[:200]!r}")


@dataclass(frozen=True)
class OpenVideo:
    """A video that was found, under the name by which it was asked for. Frames of a folder may not be links that leave its root."""

    reference: str
    path: Path
    root: Path
    video: Video

    def __len__(self) -> int:
        return len(self.video)

    def identity(self, frame: int) -> Hashable:
        """Changes whenever the file that holds the frame does: of a folder the image, else the video."""
        file = self._file(frame)
        stat = file.stat()
        return str(file), stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, frame

    def frame(self, i: int) -> np.ndarray:
        """Raises VideoError where it cannot be read; the message has the reference, not the path."""
        try:
            return self.video.frame(i)
        except (VideoError, OSError) as error:
            raise VideoError(_without_path(error, self.path, self.reference)) from error

    def pixels(self, i: int) -> int | None:
        """Height times width of a frame, told before its pixels are decoded; None where that cannot be told."""
        if not isinstance(self.video, ImageFolder):
            return None
        from PIL import Image

        try:
            with Image.open(self._file(i)) as image:
                return image.width * image.height
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None  # reading it will tell what is wrong

    def _file(self, i: int) -> Path:
        if not isinstance(self.video, ImageFolder):
            return self.path
        file = (self.path / self.video.names[i]).resolve()
        if not file.is_relative_to(self.root):
            raise VideoError(f"frame {i} of {self.reference!r} is a link that leaves the folders of videos")
        return file


def _without_path(error: Exception, path: Path, reference: str) -> str:
    return str(error).replace(str(path), reference)
