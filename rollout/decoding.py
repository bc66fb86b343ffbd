"""Frames decoded in a pool of processes, with a time limit for each video: one that hangs or crashes its decoder costs that process.

Threads would decode as fast or faster (FFmpeg and Pillow release the interpreter's lock), but a thread that hangs cannot be ended,
and a fault inside a decoder would end the run. Paths and frame numbers go to a process, and a handle of shared memory comes back.
"""

from __future__ import annotations

import math
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path

import numpy as np

from rollout.frame_cache import FrameCache
from segmentation_service.video import ImageFolder, VideoError, open_video, read_frame

OPEN_VIDEOS = 4  # that a process keeps, each with at most one file handle


class SlowVideo(VideoError):
    """A video that took longer than it may."""


class CrashingVideo(VideoError):
    """A video at which its decoder's process ended, twice."""


@dataclass(frozen=True)
class Frames:
    """`num_frames` counts all frames of the video; `by_number` are those that were asked for, uint8 (H, W, 3), not to be written to."""

    num_frames: int
    by_number: dict[int, np.ndarray]


class Decoders:
    """A pool of processes that decode, and the frames that were decoded last. Processes start when they are first needed."""

    def __init__(self, processes: int = 2, seconds: float = 60.0, cache_bytes: int = 0) -> None:
        """seconds: the longest that one request may take, from when a process begins with it."""
        self.seconds, self.cache = seconds, FrameCache(cache_bytes)
        self._num_frames: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decoder")  # they only wait for their processes
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._running: set[_Process] = set()
        self._closed = False
        for _ in range(processes):
            self._idle.put(None)

    def frames(self, path: str | Path, numbers: Iterable[int]) -> Future[Frames]:
        """The frames of the video at a path (an image folder or a video file). The future raises VideoError where they cannot be read,
        as SlowVideo past the time limit, as CrashingVideo where the decoder broke down at them a second time."""
        return self._threads.submit(self._frames, str(Path(path).absolute()), sorted(set(numbers)))

    def check(self, path: str | Path) -> Future[None]:
        """Looks through a video without decoding it: the headers of all images, or the list of a file's frames. Raises as `frames`."""
        return self._threads.submit(self._ask, str(Path(path).absolute()), None)

    def close(self) -> None:
        """Ends the processes. Requests that wait are cancelled, and those that are being decoded fail with RuntimeError."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._closed = True
        for process in list(self._running):
            process.kill()

    def _frames(self, path: str, numbers: list[int]) -> Frames:
        found = {i: self.cache.get((path, i)) for i in numbers}
        missing = [i for i, frame in found.items() if frame is None]
        if missing or path not in self._num_frames:
            self._num_frames[path], decoded = self._ask(path, missing)
            for i, frame in zip(missing, decoded):
                frame.flags.writeable = False
                self.cache.put((path, i), frame)
                found[i] = frame
        return Frames(self._num_frames[path], found)

    def _ask(self, path: str, numbers: list[int] | None) -> tuple[int, list[np.ndarray]]:
        for _ in range(2):  # a process can also be ended from outside, for want of memory
            process = self._idle.get()
            try:
                if process is None:
                    process = _Process()
                    self._running.add(process)
                if self._closed:  # before it was known to be running
                    raise EOFError
                return process.ask(path, numbers, self.seconds)
            except (EOFError, OSError, SlowVideo) as error:
                if process is not None:
                    process.close()
                    self._running.discard(process)
                    process = None
                if self._closed:
                    raise RuntimeError("the decoders are closed") from error
                if isinstance(error, SlowVideo):
                    raise
            finally:
                self._idle.put(process)
        raise CrashingVideo(f"{path}: the decoder broke down at it, twice; encode it anew or drop the video")


class _Process:
    """One process of the pool. It has a session of its own, since Ctrl-C is its owner's business, and ends with its owner."""

    def __init__(self) -> None:
        """Raises EOFError where the process is killed before it can be asked."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from rollout.decoding import serve; serve({theirs.fileno()})"],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        try:
            self._connection.recv()
        except EOFError as error:
            killed = self._process.wait() < 0
            self.close()
            if killed:
                raise
            raise RuntimeError("a process that decodes videos did not start; see what it printed above") from error

    def ask(self, path: str, numbers: list[int] | None, seconds: float) -> tuple[int, list[np.ndarray]]:
        self._connection.send((path, numbers))
        if not self._connection.poll(seconds):
            raise SlowVideo(f"{path}: not decoded within {seconds:g} s; encode it anew, drop the video, or allow more time")
        reply = self._connection.recv()
        if isinstance(reply, str):
            raise VideoError(reply)
        num_frames, shapes = reply
        if not shapes:
            return num_frames, []
        with os.fdopen(recv_handle(self._connection), "rb") as memory:
            return num_frames, [np.fromfile(memory, np.uint8, math.prod(shape)).reshape(shape) for shape in shapes]

    def close(self) -> None:
        self.kill()
        self._process.stdin.close()
        self._connection.close()

    def kill(self) -> None:
        """Also for a thread that is not the one that asks, which then meets the end of the connection."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process inside a file system that hangs dies when that answers
            self._process.wait(5)


def serve(connection_handle: int) -> None:
    """The life of a process of the pool: requests come and replies go over a socket; its standard input ends when its owner does."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    connection, opened = Connection(connection_handle), lru_cache(OPEN_VIDEOS)(open_video)
    connection.send("ready")
    while True:
        try:
            path, numbers = connection.recv()
        except EOFError:
            return
        try:
            video = opened(path)
            if numbers is None and isinstance(video, ImageFolder):
                video.check()
            frames = [read_frame(video, i) for i in numbers or ()]
        except (VideoError, OSError) as error:
            connection.send(str(error))
            continue
        connection.send((len(video), [frame.shape for frame in frames]))
        if frames:
            with open(os.memfd_create("frames"), "w+b") as memory:
                for frame in frames:
                    memory.write(frame)
                memory.seek(0)
                send_handle(connection, memory.fileno(), None)
