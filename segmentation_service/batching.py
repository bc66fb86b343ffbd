"""One thread that owns the model: whenever it is free it takes what is waiting as a batch, and answers each request as soon as it can."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from .service import Answer, SegmentationService
from .service_request import SegmentRequest, ServiceError

PROBE_SECONDS = 60.0
"""An idle model is tried this often; one at work proves itself."""


@dataclass(frozen=True)
class _Waiting:
    request: SegmentRequest
    alone: bool
    answer: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class BatchThread:
    """Ray Serve's own batching forms a batch after a fixed wait, also while the model is busy, so that what comes meanwhile ends up
    in many small batches, one after another; and it gives out all answers of a batch with the slowest."""

    def __init__(self, service: SegmentationService) -> None:
        self.service, self.config = service, service.config
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._model = threading.Lock()
        self._proved_at = time.monotonic()  # loading the service tried it
        self._counts = {"requests": 0, "batches": 0}
        self._thread = threading.Thread(target=self._run, name="segmentation", daemon=True)
        self._thread.start()

    def submit(self, request: SegmentRequest, alone: bool = False) -> Future[Answer]:
        """The answer or error to come. alone: not in one batch with others. Cancelled before its turn, it costs nothing."""
        item = _Waiting(request, alone)
        with self._changed:
            self._waiting.append(item)
            self._changed.notify()
        return item.answer

    def check(self) -> None:
        """Raises RuntimeError where the model does not answer, or has been at one piece of work for too long."""
        if not self._thread.is_alive():
            raise RuntimeError("the thread that runs the model has ended")
        now = time.monotonic()
        if self._model.acquire(blocking=False):
            try:
                if now - self._proved_at > PROBE_SECONDS:
                    self.service.probe()
                    self._proved_at = now
            finally:
                self._model.release()
        elif now - self.service.alive_at > self.config.work_seconds:
            raise RuntimeError(f"the model has not come on with its work for {now - self.service.alive_at:.0f} s")

    def stats(self) -> dict[str, float]:
        """Requests and batches so far, requests that wait, and the counters of the segmenter and its cache."""
        return {**self._counts, "waiting": len(self._waiting), **self.service.stats()}

    def _run(self) -> None:
        while True:
            batch = [item for item in self._take() if item.answer.set_running_or_notify_cancel()]
            with self._model:
                self._answer(batch)

    def _take(self) -> list[_Waiting]:
        """The next batch: at least one request, and with it those that came before the model was free or come within the wait."""
        size = self.config.batch_size
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            first = self._waiting[0]
            if not first.alone:
                left = first.since + self.config.batch_wait_seconds - time.monotonic()
                self._changed.wait_for(lambda: len(self._waiting) >= size, max(0.0, left))
            batch = [self._waiting.popleft()]
            while not first.alone and len(batch) < size and self._waiting and not self._waiting[0].alone:
                batch.append(self._waiting.popleft())
        return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        self._counts["requests"] += len(batch)
        self._counts["batches"] += bool(batch)
        try:
            for i, answer in self.service.answers([item.request for item in batch]):
                batch[i].answer.set_result(answer)
                if not isinstance(answer, ServiceError):
                    self._proved_at = time.monotonic()
        except Exception as error:  # a fault of ours: nobody may be left waiting for it
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(error)
