"""The service over real Ray Serve: the same answers as in this process, full queues, and replicas that die in the middle of it."""

import asyncio
import dataclasses
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import BOX, FRAMES, OTHER_BOX, POINT, ask, make_config, same, write_video

from segmentation_service.client import HandleClient, LocalClient
from segmentation_service.service import SegmentationService
from segmentation_service.service_request import ServiceError

pytestmark = pytest.mark.usefixtures("one_thread")

REQUESTS = [
    ask("red", 1, (BOX, POINT), (), (OTHER_BOX,)),
    ask("green", 2, (BOX,), (OTHER_BOX,)),
    ask("green", 2, (POINT, BOX), propagate=(0, 3)),
    ask("deep/blue", 0, (POINT,), propagate=True),
    ask("nowhere"),
    ask("../xmem.pth"),
    ask("red", FRAMES),
    ask("red", 0, *[(BOX,)] * 7),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("serve"), batch_size=4, max_queued_requests=16, max_hypotheses=6)


@pytest.fixture(scope="module")
def client(ray_session, config):
    """Two replicas, started once."""
    from segmentation_service import serve

    client = HandleClient(serve.start(config), wait_seconds=120)
    yield client
    client.close()
    serve.stop()


@pytest.fixture(scope="module")
def expected(config):
    """The answers of a service in this process."""
    local = LocalClient(SegmentationService.load(config))
    return [outcome(local, request) for request in REQUESTS]


def outcome(client, request):
    try:
        return client.segment(request)
    except ServiceError as error:
        return error


def right(answer, reference):
    if isinstance(reference, ServiceError):
        return isinstance(answer, ServiceError) and (answer.status, answer.message) == (reference.status, reference.message)
    return not isinstance(answer, ServiceError) and same(answer, reference)


def test_answers_are_those_of_the_plain_class(client, expected):
    assert [getattr(e, "status", 200) for e in expected] == [200, 200, 200, 200, 404, 404, 422, 413]
    assert [right(outcome(client, request), reference) for request, reference in zip(REQUESTS, expected)] == [True] * len(REQUESTS)


def test_an_event_loop_may_ask_too(client, expected):
    async def ask_all():
        return await asyncio.gather(*(client.segment_async(request) for request in REQUESTS), return_exceptions=True)

    assert all(map(right, asyncio.run(ask_all()), expected))


def test_who_does_not_get_an_answer_in_time_is_told_so_and_others_go_on(client, expected):
    hasty = HandleClient(client._handle, wait_seconds=1e-3)
    assert {outcome(hasty, REQUESTS[3]).status for _ in range(3)} == {503}
    hasty.close()
    assert right(outcome(client, REQUESTS[3]), expected[3])


def test_a_dead_replica_loses_no_request_and_is_replaced(client, expected):
    retries = client.retries
    for _ in range(5):  # the one that dies may have no request at that moment
        before = {s["pid"] for s in client.stats()}
        assert len(before) == 2
        with ThreadPoolExecutor(16) as threads:
            futures = [threads.submit(outcome, client, REQUESTS[i % len(REQUESTS)]) for i in range(60)]
            futures[8].result()
            os.kill(min(before), signal.SIGKILL)
            answers = [future.result() for future in futures]
        assert [i for i, answer in enumerate(answers) if not right(answer, expected[i % len(REQUESTS)])] == []
        while len(after := {s["pid"] for s in client.stats()}) < 2 or min(before) in after:
            time.sleep(0.2)  # until pytest's time limit
        assert max(before) in after
        if client.retries > retries:
            break
    assert client.retries > retries, "a replica should have had requests"


def test_replicas_count_their_work(client):
    before = client.stats()
    for _ in range(8):
        client.segment(REQUESTS[0])
    after = client.stats()
    assert sum(s["requests"] for s in after) == sum(s["requests"] for s in before) + 8
    # Whichever replica answers, all but its first answer come from its cache.
    assert sum(s["cache_hits"] for s in after) >= sum(s["cache_hits"] for s in before) + 6
    assert sum(s["cache_bytes"] for s in after) > 0


def test_a_full_queue_is_an_honest_503(client, config):
    """Two replicas hold 16 requests, and 16 more may wait. The video is long: 96 requests are there well before the first is done."""
    write_video(Path(config.roots[0]) / "long", seed=3, frames=100)
    request = ask("long", 0, propagate=True)
    reference = LocalClient(SegmentationService.load(config)).segment(request)
    with ThreadPoolExecutor(96) as threads:
        answers = list(threads.map(lambda _: outcome(client, request), range(96)))
    refused = [a for a in answers if isinstance(a, ServiceError)]
    assert {a.status for a in refused} == {503} and all(a.retry_after for a in refused)
    assert len(refused) < 96 and all(same(a, reference) for a in answers if not isinstance(a, ServiceError))


def test_settings_that_cannot_work_are_refused_before_anything_starts(config, tmp_path):
    from segmentation_service.serve import application

    for values, message in (
        (dict(roots=[str(tmp_path / "nowhere")]), "roots: .*nowhere is no folder"),
        (dict(roots=[]), "neither roots nor uploads"),
        (dict(batch_size=0), "batch_size must be at least 1; got 0"),
        (dict(segmentation=dataclasses.replace(config.segmentation, checkpoint=str(tmp_path))), "config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            application(dataclasses.replace(config, **values))
