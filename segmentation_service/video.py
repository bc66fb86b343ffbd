"""Videos, read one frame at a time, by number: a folder of images, an image, a video file, frames in memory, or any source like them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
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
    """The images of a folder in the order of their names, or an image as a video of one frame. Small to send: it holds names, and each
    process opens the files itself."""

    def __init__(self, folder: str | Path) -> None:
        """Raises VideoError where there is no such folder or image, or no image in the folder."""
        self.folder = Path(folder).expanduser()
        if is_image(self.folder):
            self.folder, self.names = self.folder.parent, (self.folder.name,)
            return
        if not self.folder.is_dir():
            raise VideoError(f"{self.folder}: no such folder of frames")
        self.names = tuple(sorted(f.name for f in self.folder.iterdir() if f.suffix.lower() in SUFFIXES))
        if not self.names:
            raise VideoError(f"{self.folder}: holds no {', '.join(SUFFIXES)} files")

    @property
    def files(self) -> tuple[Path, ...]:
        """File i is frame i."""
        return tuple(self.folder / name for name in self.names)

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

    def check(self) -> None:
        """Looks at every file without decoding it (0.1 ms a file). Raises VideoError naming the one that is no image, or a JPEG cut short."""
        from PIL import Image

        for name in self.names:
            file = self.folder / name
            try:
                with Image.open(file) as image:
                    jpeg = image.format == "JPEG"
                with file.open("rb") as handle:
                    handle.seek(-min(64, file.stat().st_size), 2)
                    whole = not jpeg or b"\xff\xd9" in handle.read()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise VideoError(f"{file} is not a readable image ({error}); restore the file or drop the video") from error
            if not whole:
                raise VideoError(f"{file}: the JPEG is cut short; restore the file or drop the video")


class FramesInMemory:
    """Frames that are there already: an array (T, H, W, 3), or a list of (H, W, 3)."""

    def __init__(self, frames: Sequence[np.ndarray]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, i: int) -> np.ndarray:
        return self.frames[i]


class VideoReference:
    """The video at a path, opened where and when it is first read. It travels as the path alone, and costs nothing until then."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    @cached_property
    def video(self) -> Video:
        """Raises VideoError as `open_video` does."""
        return open_video(self.path)

    def __len__(self) -> int:
        return len(self.video)

    def frame(self, i: int) -> np.ndarray:
        return self.video.frame(i)

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}


def open_video(path: str | Path) -> Video:
    """The video at a path: a folder of images, an image, or a video file. Raises VideoError where there is none of them."""
    path = Path(path).expanduser()
    if path.is_dir() or is_image(path):
        return ImageFolder(path)
    from .video_file import VideoFile

    return VideoFile(path)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read_frames(path: str | Path, numbers: Iterable[int]) -> dict[int, np.ndarray]:
    """These frames of the video at a path, by number: uint8 (H, W, 3). Raises VideoError as `open_video` and `read_frame` do."""
    video = open_video(path)
    return {i: read_frame(video, i) for i in sorted(set(numbers))}


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
