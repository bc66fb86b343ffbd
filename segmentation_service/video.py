"""Videos as the service reads them: one frame at a time, by number. A folder of images, frames in memory, or any source like them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png")


class VideoError(ValueError):
    """A video that cannot be read as asked; the message names the frame, its file where there is one, and the fault."""


class Video(Protocol):
    """A source of frames. Reading must be possible in any order; nobody but the source keeps what was read."""

    def __len__(self) -> int:
        """The number of frames."""

    def frame(self, i: int) -> np.ndarray:
        """Frame i, counted from 0: RGB uint8 (H, W, 3)."""


class ImageFolder:
    """The images of a folder in the order of their names. Small to send: it holds names, and each process opens the files itself."""

    def __init__(self, folder: str | Path) -> None:
        """Raises VideoError where there is no such folder, or no image in it."""
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise VideoError(f"{self.folder}: no such folder of frames")
        self.names = tuple(sorted(f.name for f in self.folder.iterdir() if f.suffix.lower() in SUFFIXES))
        if not self.names:
            raise VideoError(f"{self.folder}: holds no {', '.join(SUFFIXES)} files")

    def __len__(self) -> int:
        return len(self.names)

    def frame(self, i: int) -> np.ndarray:
        from PIL import Image

        file = self.folder / self.names[check_frame_number(self, i)]
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a broken PNG can be a SyntaxError
            raise VideoError(f"frame {i}: {file} is not a readable image ({error}); restore the file or drop the video") from error


class FramesInMemory:
    """Frames that are there already: an array (T, H, W, 3), or a list of (H, W, 3)."""

    def __init__(self, frames: Sequence[np.ndarray]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, i: int) -> np.ndarray:
        return self.frames[i]


def open_video(path: str | Path) -> Video:
    """The video at a path: a folder of images, or a video file. Raises VideoError where there is neither."""
    path = Path(path).expanduser()
    if path.is_dir():
        return ImageFolder(path)
    from .video_file import VideoFile

    return VideoFile(path)


def check_frame_number(video: Video, i: int) -> int:
    """`i` as an int. Raises VideoError where the video has no such frame; frames are not counted from the end."""
    count = len(video)
    if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < count:
        raise VideoError(f"frame {i} was asked for, but " + (f"the video has frames 0 to {count - 1}" if count else "the video has no frames"))
    return int(i)


def read_frame(video: Video, i: int) -> np.ndarray:
    """Frame i. Raises VideoError where the source fails, or gives something other than RGB uint8 (H, W, 3)."""
    try:
        frame_HW3 = video.frame(i)
    except VideoError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, EOFError) as error:
        raise VideoError(f"frame {i} of the video cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(frame_HW3, np.ndarray) or frame_HW3.dtype != np.uint8 or frame_HW3.ndim != 3 or frame_HW3.shape[2] != 3 or 0 in frame_HW3.shape:
        kind = f"{frame_HW3.dtype} {frame_HW3.shape}" if isinstance(frame_HW3, np.ndarray) else type(frame_HW3).__name__
        raise VideoError(f"frame {i} of the video is not an RGB uint8 array (H, W, 3), but {kind}")
    return frame_HW3
