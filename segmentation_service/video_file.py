"""Video files (mp4, webm, mkv, avi and what else FFmpeg reads) by frame number, exactly: frame i is the i-th that a player shows."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .video import VideoError, check_frame_number

FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,ivf,h264,hevc"
"""Containers by FFmpeg's names (mov is mp4 too, matroska webm). Playlists are none: they would read whatever files they name."""


class VideoFile:
    """A file's first video stream, upright, as RGB. Small to send: each process opens the file itself. Not thread-safe.

    The file is scanned once for the times of its frames, without decoding them where the container tells. Reading in rising order
    decodes each frame once; any other read starts at the key frame before it, and the frames that it passes are kept as decoded, up
    to cache_bytes of them, so that falling order is cheap as well. Only frames that are asked for become RGB.
    """

    def __init__(self, file: str | Path, cache_bytes: int = 64 * 2**20) -> None:
        """Raises VideoError where the file is missing, is no video, or has no frame. Sets `stored_hw`, the size before it is set upright, and `fps`, the
        mean rate in frames a second as the file tells it (None: it does not)."""
        self._container: Any = None
        self._rest()
        self.file = Path(file).expanduser()
        self.cache_bytes = cache_bytes
        self.counted = False
        if not self.file.is_file():
            raise VideoError(f"{self.file}: no such video file, and no folder of frames")
        self.times, self.key_times = self._scan()
        if not self.times:
            raise VideoError(f"{self.file}: has no video frame that can be decoded; encode it anew or drop the video")

    def __len__(self) -> int:
        return len(self.times)

    def frame(self, i: int) -> np.ndarray:
        """Frame i, uint8 (H, W, 3). Raises VideoError where there is none, or it cannot be decoded."""
        check_frame_number(self, i)
        try:
            if i not in self._kept:
                key = self._key_before(i)
                if self._frames is None or self._next > i or key > self._key_before(self._next):
                    self._seek(key)
                # Some files land behind the key frame that was asked for; at their beginning they cannot.
                if not self._read_to(i):
                    self._seek(0)
                    self._read_to(i)
            if i in self._kept:
                self._kept.move_to_end(i)
                return self._upright_rgb(self._kept[i])
        except (OSError, ValueError, RuntimeError) as error:  # FFmpeg's errors are of these kinds
            self._rest()
            raise VideoError(f"frame {i}: {self.file} cannot be decoded there ({error}); encode it anew or drop the video") from error
        self._rest()
        raise VideoError(f"frame {i}: {self.file} is damaged at this place; encode it anew or drop the video")

    def close(self) -> None:
        """Lets go of the file and of kept frames; the next read opens it again."""
        self._rest()

    def __del__(self) -> None:
        self._rest()  # containers of PyAV are cycles, which would hold their file until they are collected

    def __getstate__(self) -> dict[str, Any]:
        copy = object.__new__(VideoFile)
        copy.__dict__ = {**self.__dict__, "_container": None}
        copy._rest()
        return copy.__dict__

    def _rest(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = None
        self._frames: Iterator[Any] | None = None
        self._next = 0  # the first frame that `_frames` can still give
        self._damaged = False  # since the last key frame
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._kept_bytes = 0
        self._converter: tuple[tuple, Any] | None = None

    def _open(self) -> Any:
        import av

        try:
            container = av.open(str(self.file), options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
        except (OSError, ValueError, RuntimeError) as error:
            raise VideoError(f"{self.file}: not a readable video ({error.strerror if isinstance(error, OSError) else error}); give a video file or a folder of images") from error
        if not _moving(container):
            container.close()
            raise VideoError(f"{self.file}: holds no video stream")
        return container

    def _scan(self) -> tuple[list[int], list[int]]:
        """Times of all frames and of the key frames, in the stream's ticks and in the order in which they are shown."""
        with self._open() as container:
            stream = _moving(container)[0]
            self.stored_hw = (stream.codec_context.height, stream.codec_context.width)
            self.fps = float(rate) if (rate := stream.average_rate or stream.guessed_rate) else None
            try:
                packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            except (OSError, ValueError, RuntimeError) as error:
                raise VideoError(f"{self.file}: breaks off or is damaged ({error}); restore the file or drop the video") from error
            times = sorted(p.pts for p in packets if p.pts is not None)
            hides_frames = stream.codec_context.name == "vp8"  # some of its packets show nothing
            if len(times) == len(packets) == len(set(times)) and not hides_frames:
                return times, sorted(p.pts for p in packets if p.is_keyframe)
        return self._decode_all()

    def _decode_all(self) -> tuple[list[int], list[int]]:
        """Times by decoding, for files whose packets do not tell; what follows a fault is lost. Where not even frames have
        times of their own they are counted, and there is no way to them but from the beginning."""
        times, keys = [], []
        with self._open() as container:
            try:
                for shown in container.decode(_moving(container)[0]):
                    times.append(_time(shown))
                    if shown.key_frame:
                        keys.append(_time(shown))
            except (OSError, ValueError, RuntimeError):
                pass
        if None not in times and all(a < b for a, b in zip(times, times[1:])):
            return times, keys
        self.counted = True
        return list(range(len(times))), []

    def _key_before(self, i: int) -> int:
        """The number of key frames up to frame i: 0 is the beginning of the file, k the k-th key frame."""
        return bisect_right(self.key_times, self.times[min(i, len(self.times) - 1)])

    def _seek(self, key: int) -> None:
        kept, kept_bytes, converter = self._kept, self._kept_bytes, self._converter
        self._rest()
        self._kept, self._kept_bytes, self._converter = kept, kept_bytes, converter
        self._container = self._open()
        stream = _moving(self._container)[0]
        if key > 1:
            self._container.seek(self.key_times[key - 1], stream=stream)
        self._frames = self._container.decode(stream)

    def _read_to(self, i: int) -> bool:
        """Keeps the sound frames up to i; whether i was among them."""
        for shown in self._frames:
            time = self._next if self.counted else _time(shown)
            place = bisect_right(self.times, time) - 1
            self._next = place + 1
            # What a decoder makes up for damaged data is no frame of the video, nor is what it builds upon that.
            self._damaged = shown.is_corrupt or (self._damaged and not shown.key_frame)
            if place >= 0 and self.times[place] == time and not self._damaged:
                self._keep(place, shown)
            if place >= i:
                break
        return i in self._kept

    def _keep(self, i: int, frame: Any) -> None:
        if i in self._kept:
            self._kept_bytes -= _size(self._kept.pop(i))
        self._kept[i] = frame
        self._kept_bytes += _size(frame)
        while len(self._kept) > 1 and self._kept_bytes > self.cache_bytes:
            self._kept_bytes -= _size(self._kept.popitem(last=False)[1])

    def _upright_rgb(self, frame: Any) -> np.ndarray:
        """uint8 (H, W, 3) by FFmpeg's own filters, as its command line converts: chroma lies where the file says that it lies."""
        kind = (frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range)
        if self._converter is None or self._converter[0] != kind:
            self._converter = kind, _rgb_filter(frame)
        graph = self._converter[1]
        graph.push(frame)
        return np.ascontiguousarray(np.rot90(graph.pull().to_ndarray(), frame.rotation // 90))


def _rgb_filter(frame: Any) -> Any:
    import av.filter

    graph = av.filter.Graph()
    graph.threads = 1  # more of them cost more than they win
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("scale", "flags=bicubic"), graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")).configure()
    return graph


def _moving(container: Any) -> list[Any]:
    """The video streams but for covers of sound files, which FFmpeg lists as videos of one frame."""
    from av.stream import Disposition

    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _size(frame: Any) -> int:
    return sum(plane.buffer_size for plane in frame.planes)


def _time(frame: Any) -> int:
    return frame.pts if frame.pts is not None else frame.dts
