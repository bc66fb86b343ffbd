"""Frames per second of reading video files: one after another, in random order, and once more; ours beside readers that the field uses.

    videoseg bench decoding --json docs/decoding-benchmark.json          # decord, OpenCV and torchcodec, those that are installed
    videoseg bench decoding --only soak                                  # 2,000 random reads: do memory and file handles grow?

Clips are made for the occasion: a picture that moves, 120 frames of 360x640, in each codec. Which frame a reader gave is told by
comparing it with all frames of the clip.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil
from PIL import Image

from side_by_side import in_turns, machine, publish
from rollout.decoding import Decoders
from segmentation_service.video_file import VideoFile

H, W, FRAMES, READS, STEP = 360, 640, 120, 20, 3
CLIPS = {
    "h264.mp4": dict(codec="libx264", b_frames=3, gop=48, options={"preset": "veryfast"}),
    "h264-one-key-frame.mp4": dict(codec="libx264", b_frames=3, gop=1000, options={"preset": "veryfast", "sc_threshold": "0"}),
    "vp9.webm": dict(codec="libvpx-vp9", gop=48, options={"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.avi": dict(codec="mpeg4", gop=12),
    "mjpeg.avi": dict(codec="mjpeg", pixels="yuvj420p"),
}


def picture(i: int, texture_HWT3: np.ndarray) -> np.ndarray:
    return texture_HWT3[:, STEP * i : STEP * i + W]


def write(file: Path, codec: str, gop: int = 12, b_frames: int = 0, pixels: str = "yuv420p", options: dict[str, str] | None = None) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 100, 3), np.uint8)).resize((W + STEP * FRAMES, H), Image.Resampling.BICUBIC)
    texture = np.clip(np.asarray(coarse, np.int16) + rng.integers(-6, 7, (H, W + STEP * FRAMES, 1)), 0, 255).astype(np.uint8)
    with av.open(str(file), "w") as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size, stream.max_b_frames, stream.bit_rate = H, W, pixels, gop, b_frames, 4_000_000
        stream.codec_context.time_base = Fraction(1, 25)
        for i in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture(i, texture)), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


class OpenCV:
    def __init__(self, file: Path) -> None:
        import cv2

        self.cv2, self.video, self.next = cv2, cv2.VideoCapture(str(file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), 0

    def frame(self, i: int) -> np.ndarray:
        if i != self.next:
            self.video.set(self.cv2.CAP_PROP_POS_FRAMES, i)
        self.next = i + 1
        return self.cv2.cvtColor(self.video.read()[1], self.cv2.COLOR_BGR2RGB)


class Decord:
    def __init__(self, file: Path) -> None:
        import decord

        self.video = decord.VideoReader(str(file), num_threads=1)

    def frame(self, i: int) -> np.ndarray:
        return self.video[i].asnumpy()


class TorchCodec:
    def __init__(self, file: Path) -> None:
        from torchcodec.decoders import VideoDecoder

        self.video = VideoDecoder(str(file), dimension_order="NHWC", num_ffmpeg_threads=1)

    def frame(self, i: int) -> np.ndarray:
        return self.video[i].numpy()


PEERS = {"decord": Decord, "opencv": OpenCV, "torchcodec": TorchCodec}


def readers(file: Path) -> dict[str, Callable]:
    """Those that are installed here and can open the file."""
    found: dict[str, Callable] = {"ours": VideoFile}
    for name, reader in PEERS.items():
        try:
            reader(file).frame(0)
            found[name] = reader
        except Exception as error:  # whatever a peer raises says that it cannot
            print(f"{name} cannot read {file.name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def read(reader: Callable, file: Path, places: list[int]) -> int:
    video = reader(file)
    return sum(video.frame(i).nbytes for i in places)


def speeds(file: Path, rounds: int) -> dict:
    """Frames a second, opening the file included, each reader with one thread; `others`: of the frames that were asked for at random, how many came as another one."""
    order = random.Random(0).sample(range(FRAMES), READS)
    found = readers(file)
    result = {}
    for what, places in (("sequential", list(range(FRAMES))), ("random", order)):
        result[what] = in_turns({name: partial(read, reader, file, places) for name, reader in found.items()}, rounds)
        result[what] = {name: per_second(timed, len(places), cpu=True) for name, timed in result[what].items()}
    requests = [sorted(order[i : i + 5]) for i in range(0, READS, 5)]
    fresh = copies(file)
    with closing(Decoders(2)) as pool, closing(Decoders(2, cache_bytes=2**30)) as keeping:
        candidates = {
            "2 threads": lambda: in_threads(next(fresh), requests),
            "pool of 2 processes": lambda: in_pool(pool, next(fresh), requests),
            "pool, the same again from its cache": partial(in_pool, keeping, file, requests),
        }
        result["random, in requests of 5"] = {name: per_second(timed, READS) for name, timed in in_turns(candidates, rounds).items()}
    truth = thumbnails(file)
    return result | {"others": {name: others(reader(file), order, truth) for name, reader in found.items()}}


def copies(file: Path) -> Iterator[Path]:
    """The file under names that nobody has opened before."""
    for number in itertools.count():
        copy = file.with_name(f"{number}-{file.name}")
        copy.symlink_to(file)
        yield copy


def in_pool(pool: Decoders, file: Path, requests: list[list[int]]) -> None:
    for future in [pool.frames(file, numbers) for numbers in requests]:
        future.result()


def in_threads(file: Path, requests: list[list[int]]) -> None:
    """As the pool does it: a worker keeps the video open from one request to the next."""
    local = threading.local()

    def begin() -> None:
        local.video = VideoFile(file)

    with ThreadPoolExecutor(2, initializer=begin) as threads:
        list(threads.map(lambda numbers: [local.video.frame(i) for i in numbers], requests))


def per_second(timed: dict, frames: int, cpu: bool = False) -> dict:
    rates = {"median": timed["seconds"], "min": timed["max"], "max": timed["min"]} | ({"per_cpu_second": timed["cpu_seconds"]} if cpu else {})
    return {name: round(frames / max(seconds, 1e-4), 1) for name, seconds in rates.items()}


def thumbnail(frame_HW3: np.ndarray) -> np.ndarray:
    return frame_HW3[::8, ::2].astype(np.int16)


def thumbnails(file: Path) -> list[np.ndarray]:
    """All frames as a plain pass over the file gives them."""
    with av.open(str(file)) as container:
        return [thumbnail(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def others(video, places: list[int], truth: list[np.ndarray]) -> int:
    wrong = 0
    for i in places:
        frame = thumbnail(video.frame(i))
        wrong += int(np.argmin([np.abs(frame - t).mean() for t in truth])) != i
    return wrong


def soak(files: list[Path], reads: int = 2000) -> dict:
    """Random reads over all clips, by the pool and by readers of this process: resident MB and file handles after each tenth.

    This process hands its free memory back before it is measured; what the decoder's allocator keeps is in its figure.
    """
    order, series = random.Random(1), {"here": [], "decoder": []}
    with closing(Decoders(1, cache_bytes=64 * 2**20)) as pool:
        videos = {file: VideoFile(file, cache_bytes=16 * 2**20) for file in files}
        for count in range(1, reads + 1):
            file, i = order.choice(files), order.randrange(FRAMES)
            np.testing.assert_array_equal(pool.frames(file, [i]).result().by_number[i], videos[file].frame(i))
            if count % (reads // 10) == 0:
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                for name, p in zip(series, (psutil.Process(), *psutil.Process().children())):
                    series[name].append({"reads": count, "resident_mb": round(p.memory_info().rss / 2**20, 1), "file_handles": p.num_fds()})
                print(series["here"][-1], series["decoder"][-1], file=sys.stderr, flush=True)
    return series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reads", type=int, default=2000, help="of the soak (default 2000)")
    parser.add_argument("--only", nargs="+", choices=[*CLIPS, "soak"], help="these clips only, or the soak")
    args = parser.parse_args()
    chosen = args.only or [*CLIPS, "soak"]
    record: dict = {"machine": machine(1), "frames": [FRAMES, H, W], "frames_per_second": {}}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, options in CLIPS.items():
            if name in chosen or "soak" in chosen:
                files.append(Path(folder) / name)
                write(files[-1], **options)
        for file in files:
            if file.name in chosen:
                print(f"--- {file.name}", file=sys.stderr, flush=True)
                record["frames_per_second"][file.name] = speeds(file, args.rounds)
        if "soak" in chosen:
            record["soak"] = soak(files, args.reads)
    publish(record, args.json)


if __name__ == "__main__":
    main()
