"""The reward service over real Ray Serve: the same scores as in this process, and replicas that die in the middle of it."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from scored import expected, item, items, outcome

from reward_service.client import HandleClient, HttpClient
from reward_service.http_api import make_app
from reward_service.score_request import ScoreRequest
from reward_service.serve_config import RewardServeConfig
from segmentation_service.service_request import ServiceError
from tests.segmentation_service.http_serving import serving

CONFIG = RewardServeConfig(replicas=2, cpus_per_replica=0.5, max_items=50, wait_seconds=120.0)


@pytest.fixture(scope="module")
def client(ray_session):
    """Two replicas, started once."""
    from reward_service import serve

    client = HandleClient(serve.start(CONFIG), CONFIG.wait_seconds)
    yield client
    client.close()
    serve.stop()


def test_scores_are_those_of_the_plain_function(client):
    batch = items()
    assert [outcome(s) for s in client.score(ScoreRequest(items=batch)).scores] == [expected(one) for one in batch]
    scores = client.score(ScoreRequest(items=[item(lenght=3), item(), item(length=None)])).scores
    assert "lenght" in scores[0].reason and outcome(scores[1]) == expected(item()) and "pass length" in scores[2].reason
    with pytest.raises(ServiceError, match="413: 51 items"):
        client.score(ScoreRequest(items=[item()] * 51))
    with pytest.raises(ServiceError, match="422: reward.weigths"):
        client.score(ScoreRequest(items=[], reward={"weigths": {}}))


def test_a_replica_killed_under_load_loses_no_score_and_counts_none_twice(client):
    """By HTTP, as others would ask: every batch is answered once, with its own scores."""
    before = {s["pid"] for s in client.stats()}
    batches = [[item(length=100 + n), item(length=None), item(length=n)] for n in range(150)]
    with serving(client, CONFIG, make_app) as url, ThreadPoolExecutor(16) as threads:
        http = HttpClient(url)
        futures = [threads.submit(http.score, ScoreRequest(items=batch)) for batch in batches]
        futures[20].result()
        os.kill(min(before), signal.SIGKILL)
        answers = [future.result() for future in futures]
    assert [[outcome(s) for s in answer.scores] for answer in answers] == [[expected(one) for one in batch] for batch in batches]
    while len(after := {s["pid"] for s in client.stats()}) < 2 or min(before) in after:
        time.sleep(0.2)  # until pytest's time limit
    assert max(before) in after
