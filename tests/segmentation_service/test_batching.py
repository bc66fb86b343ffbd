"""How requests become batches: what waits goes together, each is answered when it is ready, and nobody waits for ever."""

import threading
import time
from types import SimpleNamespace

import pytest
from served import ask

from segmentation_service.batching import PROBE_SECONDS, BatchThread
from segmentation_service.service_request import ServiceError


class ScriptedService:
    """Holds every batch at a gate, so that a test decides what waits meanwhile. An answer is the request's frame number."""

    def __init__(self, batch_size=4, work_seconds=600.0):
        self.config = SimpleNamespace(batch_size=batch_size, batch_wait_seconds=0.0, work_seconds=work_seconds)
        self.batches, self.gate, self.started, self.alive_at, self.probes = [], threading.Semaphore(0), threading.Semaphore(0), time.monotonic(), 0
        self.fault = None

    def answers(self, requests):
        self.batches.append([r.frame for r in requests])
        self.started.release()
        for i, request in enumerate(requests):
            assert self.gate.acquire(timeout=20)
            if request.frame == 99:
                raise RuntimeError("broken")
            yield i, request.frame if request.frame < 50 else ServiceError(422, "no")

    def probe(self):
        self.probes += 1
        if self.fault:
            raise RuntimeError(self.fault)

    def stats(self):
        return {"decoded": 7}


def occupied(service):
    """A thread that is at work on request 0."""
    batches = BatchThread(service)
    first = batches.submit(ask(frame=0))
    assert service.started.acquire(timeout=20)
    return batches, first


def test_what_came_while_the_model_was_busy_makes_one_batch():
    service = ScriptedService()
    batches, first = occupied(service)
    rest = [batches.submit(ask(frame=t)) for t in range(1, 7)]
    service.gate.release(20)
    assert first.result(20) == 0 and [f.result(20) for f in rest] == [1, 2, 3, 4, 5, 6]
    assert service.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert batches.stats() == {"requests": 7, "batches": 3, "waiting": 0, "decoded": 7}


def test_an_answer_does_not_wait_for_the_rest_of_its_batch():
    service = ScriptedService()
    batches, first = occupied(service)
    rest = [batches.submit(ask(frame=t)) for t in (1, 2)]
    service.gate.release(2)
    assert rest[0].result(20) == 1 and not rest[1].done()
    service.gate.release()
    assert rest[1].result(20) == 2 and service.batches == [[0], [1, 2]]


def test_a_suspect_goes_alone_and_a_cancelled_request_not_at_all():
    service = ScriptedService()
    batches, first = occupied(service)
    rest = [batches.submit(ask(frame=t), alone=t == 3) for t in range(1, 6)]
    assert rest[1].cancel()
    service.gate.release(20)
    assert [rest[i].result(20) for i in (0, 2, 3, 4)] == [1, 3, 4, 5]
    assert service.batches == [[0], [1], [3], [4, 5]]


def test_a_fault_of_the_service_leaves_nobody_waiting_and_the_next_batch_is_served():
    service = ScriptedService()
    batches, first = occupied(service)
    rest = [batches.submit(ask(frame=t)) for t in (1, 99, 2)]
    service.gate.release(20)
    assert rest[0].result(20) == 1
    for future in rest[1:]:
        with pytest.raises(RuntimeError, match="broken"):
            future.result(20)
    assert batches.submit(ask(frame=4)).result(20) == 4


def test_health_is_proved_by_work_or_by_a_probe():
    service = ScriptedService(work_seconds=100.0)
    batches, first = occupied(service)
    batches.check()  # at work, and it has not been long
    service.alive_at -= 101
    with pytest.raises(RuntimeError, match="has not come on with its work for 101 s"):
        batches.check()
    service.gate.release()
    first.result(20)
    with batches._changed, batches._model:
        pass  # idle from here on
    batches.check()
    assert service.probes == 0, "it has just answered a request"
    batches._proved_at -= PROBE_SECONDS + 1
    batches.check()
    batches.check()
    assert service.probes == 1
    batches._proved_at -= PROBE_SECONDS + 1
    service.fault = "the model is gone"
    with pytest.raises(RuntimeError, match="gone"):
        batches.check()
    with pytest.raises(RuntimeError, match="gone"):
        batches.check()
