"""Stopping a run from outside: the first Ctrl-C (or SIGTERM) ends it with a checkpoint, the second one at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import psutil

T = TypeVar("T")


class Stop:
    """Listens for SIGINT and SIGTERM while it is open (a context manager). The second signal ends the process with status 130."""

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.reason = ""
        self._event = asyncio.Event()

    def __enter__(self) -> Stop:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._signal, number)
        return self

    def __exit__(self, *exc: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def _signal(self, number: int) -> None:
        if self.requested:
            print("stopped at once: `videoseg resume` goes on from the last checkpoint", file=sys.stderr, flush=True)
            for child in psutil.Process().children(recursive=True):  # a local Ray: its agents would outlive this process
                child.kill()
            os._exit(130)
        self.reason = signal.Signals(number).name
        print(f"{self.reason}: stopping with a checkpoint; once more to stop at once", file=sys.stderr, flush=True)
        self._event.set()

    async def abandoning(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None if a stop was asked for and it did not finish within the grace period.

        Only for work that may be dropped at any point, such as rollouts.
        """
        task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self.grace_seconds:
                await asyncio.wait({task}, timeout=self.grace_seconds)
            return task.result() if task.done() else None
        finally:
            for one in (task, stopped):
                one.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)
