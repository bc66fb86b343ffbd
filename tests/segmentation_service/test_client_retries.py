"""What the client of the replicas makes of faults: injected through a handle that fails to order."""

import asyncio
import threading
from collections import Counter

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from served import ask

from segmentation_service import client as client_module
from segmentation_service.client import MAX_DEATHS, HandleClient
from segmentation_service.service_request import SegmentResponse, ServiceError

ANSWER = SegmentResponse(masks=())
DEAD = ActorDiedError()


class FailingHandle:
    """`handle.segment.remote(...)` plays a script for each video: errors are raised, "never" waits, all else is the answer."""

    def __init__(self, **scripts):
        self.scripts, self.calls, self.cancelled = scripts, [], 0
        self.now, self.most = Counter(), Counter()  # requests at work, by the number of results that they have left
        self.segment = self

    def remote(self, request, alone):
        self.calls.append((request.video, alone))
        script = self.scripts[request.video]
        return _Response(self, script.pop(0), len(script))


class _Response:
    def __init__(self, handle, result, left):
        self.handle, self.result, self.left = handle, result, left

    def cancel(self):
        self.handle.cancelled += 1

    def __await__(self):
        return self._play().__await__()

    async def _play(self):
        now, most = self.handle.now, self.handle.most
        now[self.left] += 1
        most[self.left] = max(most[self.left], now[self.left])
        try:
            await asyncio.sleep(1000 if self.result == "never" else 0.01)
        finally:
            now[self.left] -= 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.001)


@pytest.fixture
def connect():
    clients = []

    def connected(handle, **options):
        clients.append(HandleClient(handle, **options))
        return clients[-1]

    yield connected
    for client in clients:
        client.close()


def test_a_request_whose_replica_died_is_sent_again_by_itself(connect):
    handle = FailingHandle(a=[DEAD, ActorUnavailableError("gone", None), ANSWER])
    client = connect(handle)
    assert client.segment(ask("a")) == ANSWER
    assert handle.calls == [("a", False), ("a", True), ("a", True)] and client.retries == 2


def test_one_that_kills_every_replica_is_given_up(connect):
    handle = FailingHandle(a=[DEAD] * 10)
    with pytest.raises(ServiceError, match=f"500: {MAX_DEATHS} replicas died"):
        connect(handle).segment(ask("a"))
    assert len(handle.calls) == MAX_DEATHS


def test_after_two_deaths_requests_go_one_at_a_time(connect):
    names = [f"v{i}" for i in range(6)]
    handle = FailingHandle(**{name: [DEAD, DEAD, ANSWER] for name in names})
    client = connect(handle)

    async def all_of_them():
        await asyncio.gather(*(client.segment_async(ask(name)) for name in names))

    asyncio.run(all_of_them())
    assert len(handle.calls) == 18 and handle.most[2] == 6 and handle.most[0] == 1


def test_a_full_queue_refuses_new_requests_but_not_those_it_took_on(connect):
    full = BackPressureError(5, 5)
    client = connect(FailingHandle(new=[full], taken=[DEAD, full, full, ANSWER]))
    with pytest.raises(ServiceError, match="503: the service is full") as error:
        client.segment(ask("new"))
    assert error.value.retry_after > 0
    assert client.segment(ask("taken")) == ANSWER


def test_no_answer_in_time_is_said_and_the_request_cancelled(connect):
    handle = FailingHandle(a=["never"])
    with pytest.raises(ServiceError, match="503: no answer within 0.05 s") as error:
        connect(handle, wait_seconds=0.05).segment(ask("a"))
    assert error.value.retry_after > 0 and handle.cancelled == 1


def test_other_faults_have_their_status(connect):
    from ray.serve._private.common import DeploymentID

    handle = FailingHandle(
        bad=[ServiceError(422, "no such frame")],
        gone=[DeploymentUnavailableError(DeploymentID("d", "a"))],
        fault=[RayTaskError("segment", "traceback", ValueError("x"))],
    )
    client = connect(handle)
    for video, status in (("bad", 422), ("gone", 503), ("fault", 500)):
        with pytest.raises(ServiceError) as error:
            client.segment(ask(video))
        assert error.value.status == status
    assert len(handle.calls) == 3 and client.retries == 0


def test_cancelling_the_caller_cancels_the_request(connect):
    handle = FailingHandle(a=["never"], b=[DEAD, ANSWER])
    client = connect(handle)

    async def both():
        task = asyncio.create_task(client.segment_async(ask("a")))
        assert await client.segment_async(ask("b")) == ANSWER
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(both())
    for _ in range(1000):
        if handle.cancelled:
            break
        threading.Event().wait(0.01)
    assert handle.cancelled == 1
