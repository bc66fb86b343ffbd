"""Decoded frames kept by a process, up to a number of bytes: those used longest ago go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np


class FrameCache:
    """Frames by key. `bytes` is what they hold now, `hits` and `misses` count the look-ups. Threads may share one."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._frames: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._frames)

    def get(self, key: Hashable) -> np.ndarray | None:
        with self._lock:
            frame = self._frames.get(key)
            if frame is None:
                self.misses += 1
            else:
                self.hits += 1
                self._frames.move_to_end(key)
            return frame

    def put(self, key: Hashable, frame: np.ndarray) -> None:
        """The frame must own its memory, or more is held than is counted. One that exceeds all there is is not kept."""
        with self._lock:
            if (old := self._frames.pop(key, None)) is not None:
                self.bytes -= old.nbytes
            if frame.nbytes > self.max_bytes:
                return
            self._frames[key] = frame
            self.bytes += frame.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._frames.popitem(last=False)[1].nbytes
