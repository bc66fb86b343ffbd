"""Videos and images as files: the names of the frames and their size. Of images the headers are read, of a video file one frame is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from segmentation_service.video import ImageFolder, Video, VideoError, is_image, open_video, read_frame


class MediaError(ValueError):
    """A folder of frames or an image that is missing or broken. `reason` is one of a few fixed phrases, the message has the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Media:
    """names: of the frames, in their order, see `frame_names`. hw: height and width of every frame,
    pixels, as stored (of a video file: upright). fps: frames a second where the file tells."""

    path: Path
    names: tuple[str, ...]
    hw: tuple[int, int]
    fps: float | None = None


def frame_names(video: Video) -> tuple[str, ...]:
    """Of a folder of frames the files' names without suffix, of a video file the frames' numbers in five digits: what masks of frames are called."""
    return tuple(file.stem for file in video.files) if isinstance(video, ImageFolder) else tuple(f"{t:05d}" for t in range(len(video)))


def read_media(path: Path) -> Media:
    """A folder of frames, an image as a video of one frame, or a video file. Raises `MediaError`."""
    if path.is_file() and not is_image(path):
        return _read_video(path)
    try:
        video = ImageFolder(path)
        files = video.files
    except VideoError as error:
        raise MediaError("no frames" if path.is_dir() else "media missing", str(path)) from error
    names = frame_names(video)
    if len(set(names)) < len(names):
        raise MediaError("two files for one frame", f"{path}, {next(n for n in names if names.count(n) > 1)}")
    sizes = {}
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.setdefault((image.height, image.width), file)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:  # a broken PNG can be a SyntaxError
            raise MediaError("unreadable frame", str(file)) from error
    if len(sizes) > 1:
        raise MediaError("frames of different sizes", ", ".join(f"{file}: {h}x{w}" for (h, w), file in sizes.items()))
    return Media(path, names, next(iter(sizes)))


def _read_video(path: Path) -> Media:
    try:
        video = open_video(path)
        hw = read_frame(video, 0).shape[:2]
    except VideoError as error:
        raise MediaError("unreadable video", str(error)) from error
    return Media(path, frame_names(video), hw, video.fps)
