"""The reward service by HTTP, with a real server: the same scores as in this process, and a clear answer to all that is wrong."""

import asyncio
import json
import socket
import threading
from dataclasses import replace

import httpx
import numpy as np
import pytest
from scored import expected, item, items, outcome

from reward_service.client import HttpClient, LocalClient, load
from reward_service.http_api import make_app
from reward_service.score_request import ScoreItem, ScoreRequest
from reward_service.serve_config import RewardServeConfig
from segmentation_service.http_guard import UnsafeServer
from segmentation_service.service_request import ServiceError
from tests.conftest import TOY
from tests.segmentation_service.http_serving import connect, read_answer, serving, write_video

JSON = {"content-type": "application/json"}
HEAD = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def config():
    return RewardServeConfig(max_body_bytes=200_000, max_items=100, body_seconds=60.0)


@pytest.fixture(scope="module")
def url(config):
    client = LocalClient(load(config))
    with serving(client, config, make_app) as url:
        yield url
    client.close()


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_same_scores_as_in_the_process(url, http):
    batch = items()
    request = ScoreRequest(items=batch)
    client = HttpClient(url)
    first, second = client.score(request), asyncio.run(client.score_async(request))
    assert first == second and [outcome(s) for s in first.scores] == [expected(one) for one in batch]
    assert http.post("/v1/score", json={"items": batch}).json() == first.model_dump(mode="json")
    assert client.stats()[0]["items"] == 3 * len(batch)
    client.close()


def test_invalid_items_have_a_reason_and_no_total(http):
    scores = http.post("/v1/score", json={"items": [item(), item(lenght=1), item(length=None), item()]}).json()["scores"]
    assert [s.get("total") for s in scores] == [expected(item())[0], None, None, expected(item())[0]] and scores[0]["valid"] is True
    assert scores[1] == {"invalid": True, "temporary": False, "reason": "the item: unknown key 'lenght'; did you mean 'length'?"}
    assert scores[2]["invalid"] and "pass length" in scores[2]["reason"] and "total" not in scores[2]


def test_a_client_puts_malformed_items_in_their_places(url):
    request = ScoreRequest(items=[item(lenght=1), item(), item(difficulty=object()), item(length=None)])
    scores = HttpClient(url).score(request).scores
    assert [s.reason for s in (scores[0], scores[2])] == [request.items[0].reason, request.items[2].reason]
    assert outcome(scores[1]) == expected(item()) and "pass length" in scores[3].reason


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"", 400, "send a JSON object"),
        (b"{", 400, "not valid JSON"),
        (b'{"items": "\xff"}', 400, "cannot be read as JSON"),
        (b"[" * 100_000, 400, "cannot be read as JSON"),
        (b"null", 400, "send a JSON object"),
        (b"[]", 422, "the request"),
        (b"{}", 422, "items: Field required"),
        (b'{"items": {}}', 422, "items: "),
        (b'{"items": [], "presets": "x"}', 422, "unknown key 'presets'; did you mean 'preset'?"),
        (b'{"items": [], "preset": "vision_reasonor"}', 422, "did you mean 'vision_reasoner'?"),
        (b'{"items": [], "reward": {"wieghts": {}}}', 422, "reward.wieghts: unknown key; did you mean 'weights'?"),
        (b'{"items": [], "reward": []}', 422, "reward: "),
        (json.dumps({"items": [{}] * 101}).encode(), 413, "101 items"),
        (json.dumps({"items": [0] * 5000}).encode(), 422, "5000 entries"),
        (b" " * 200_001, 413, "200001 bytes"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(http, body, status, said):
    answer = http.post("/v1/score", content=body, headers=JSON)
    assert answer.status_code == status and said in answer.json()["error"], answer.text
    assert len(answer.content) < 2000


def test_json_must_say_that_it_is(http):
    answer = http.post("/v1/score", content=b'{"items": []}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]


def test_other_addresses_and_methods(http):
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/v1/score").status_code == 405 and http.get("/").status_code == 404 and http.post("/v1/videos").status_code == 404


def test_the_schema_and_its_page(http):
    schema = http.get("/openapi.json").json()
    assert set(schema["components"]["schemas"]["ScoreItem"]["properties"]) == set(ScoreItem.model_fields)
    page = http.get("/docs").text
    assert "POST /v1/score" in page and "predicted_tracks" in page and "<script" not in page


def test_token(config):
    client = LocalClient(load(config))
    with serving(client, replace(config, token="correct-horse"), make_app) as url:
        for headers in ({}, {"authorization": "Bearer wrong-horse"}, {"authorization": "Basic correct-horse"}):
            answer = httpx.post(f"{url}/v1/score", json={"items": []}, headers=headers, timeout=60)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        with connect(url) as connection:
            connection.sendall(HEAD + b"Authorization: Bearer wrong-horse\r\nContent-Length: 1000\r\n\r\n")
            assert read_answer(connection)[0] == 401, "before the body has come"
        assert HttpClient(url, "correct-horse").score(ScoreRequest(items=[item()])).scores[0].total == expected(item())[0]
        with pytest.raises(ServiceError, match="401: wrong token"):
            HttpClient(url, "wrong-horse").score(ScoreRequest(items=[]))
    client.close()
    with pytest.raises(UnsafeServer, match="VIDEOSEG_TOKEN"):
        make_app(client, replace(config, host="0.0.0.0"))


def test_a_body_of_a_gigabyte_is_refused_unread(url):
    with connect(url) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n{")
        status, headers, answer = read_answer(connection)
    assert status == 413 and "1000000000 bytes" in answer["error"] and headers["connection"] == "close"
    answer = httpx.post(f"{url}/v1/score", content=iter([b" " * 50_000] * 100), headers=JSON, timeout=60)
    assert answer.status_code == 413, "counted as it comes"


def test_a_half_sent_body_is_given_up_and_one_that_breaks_off_costs_nothing(config):
    client = LocalClient(load(config))
    with serving(client, replace(config, body_seconds=0.5), make_app) as url:
        with connect(url) as connection:
            connection.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"items": [')
            status, headers, answer = read_answer(connection)
        assert status == 408 and "0.5 s" in answer["error"] and headers["connection"] == "close"
        with connect(url) as connection:
            connection.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"items": [')
        assert HttpClient(url).score(ScoreRequest(items=[item()])).scores[0].total == expected(item())[0]
        assert client.stats() == [{"requests": 1, "items": 1, "invalid": 0}]
    client.close()


def test_many_clients_at_once(config):
    """Each gets its own scores, or an honest no that it asks again after."""
    client = LocalClient(load(config))
    batches = [[item(length=40 * n + k) for k in range(3)] for n in range(20)]
    with serving(client, replace(config, max_in_flight_per_client=4), make_app) as url:
        answers = {}

        def ask(n):
            answers[n] = HttpClient(url).score(ScoreRequest(items=batches[n]))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [[outcome(s) for s in answers[n].scores] for n in range(20)] == [[expected(one) for one in batch] for batch in batches]
    assert client.stats() == [{"requests": 20, "items": 60, "invalid": 0}]
    client.close()


def test_no_server_is_a_503_once_the_patience_is_at_its_end():
    client = HttpClient("http://127.0.0.1:9", patience_seconds=0.0)
    with pytest.raises(ServiceError, match="503"):
        client.score(ScoreRequest(items=[item()]))
    client.close()


MASK_IOU = {"weights": {"mask_iou": 1.0}, "mask_iou_grading": "graded"}
VIDEO_TERMS = {
    "weights": {"mask_iou": 1.0, "video_quality": 1.0, "temporal_consistency": 1.0},
    "mask_iou_grading": "graded",
    "video_quality_grading": "graded",
    "video_measure": "j",
}


def test_masks_come_from_a_real_segmentation_service(tmp_path):
    from segmentation_service.client import LocalClient as LocalSegmentation
    from segmentation_service.masks import encode_rle
    from segmentation_service.serve_config import ServeConfig
    from segmentation_service.service import SegmentationService
    from segmentation_service.service_request import SegmentRequest

    box = write_video(tmp_path / "disc")
    settings = ServeConfig(roots=[str(tmp_path)], token="of-the-masks")
    settings.segmentation.checkpoint, settings.segmentation.device = str(TOY / "sam2"), "cpu"
    settings.segmentation.propagation.checkpoint, settings.segmentation.propagation.size = str(TOY / "xmem"), 96
    masks = LocalSegmentation(SegmentationService.load(settings))
    y, x = np.mgrid[0:96, 0:128]
    disc = ((x - 40) / 16) ** 2 + ((y - 60) / 16) ** 2 <= 1
    target = {"image_size": [96, 128], "boxes": [list(box)], "points": [[[40, 60]]], "masks": [encode_rle(disc)]}
    batch = [
        {"completion": f'<think>x</think><answer>[{{"bbox_2d": {list(b)}}}]</answer>', "target": target, "length": 1, "video": "disc", "frame": 0}
        for b in (box, (90, 5, 120, 30))
    ]
    with serving(masks, settings) as url:
        client = LocalClient(load(RewardServeConfig(segmentation=url, segmentation_token="of-the-masks")))
        scores = client.score(ScoreRequest(items=[*batch, {**batch[0], "frame": 7}, {**batch[0], "video": "nowhere"}], reward=MASK_IOU)).scores
        of_video = {**batch[0], "target": {**target, "frames": {t: {"masks": [encode_rle(np.roll(disc, 5 * t, axis=1))]} for t in (2, 0)}}}
        video = client.score(ScoreRequest(items=[of_video], reward=VIDEO_TERMS)).scores[0].terms
        client.close()
    assert video["mask_iou"] == scores[0].terms["mask_iou"] and video["video_quality"] > 0.8 and video["temporal_consistency"] > 0.7  # the disc moves by 5
    answer = masks.segment(SegmentRequest(video="disc", frame=0, hypotheses=[[{"box": box}], [{"box": (90, 5, 120, 30)}]]))
    for given, found, rles in zip(batch, scores, answer.masks):
        brought = ScoreRequest(items=[{**given, "predicted_masks": [r.model_dump() for r in rles]}], reward=MASK_IOU)
        assert (found,) == LocalClient(load(RewardServeConfig())).score(brought).scores
    assert scores[0].terms["mask_iou"] > 0.8 > 0.1 > scores[1].terms["mask_iou"]
    assert "422" in scores[2].reason and "frame 7" in scores[2].reason and "404" in scores[3].reason and not scores[3].temporary


def test_a_segmentation_service_that_accepts_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = RewardServeConfig(segmentation=f"http://127.0.0.1:{silent.getsockname()[1]}", segmentation_seconds=0.5)
        client = LocalClient(load(config))
        with serving(client, config, make_app) as url:
            scores = HttpClient(url).score(ScoreRequest(items=[item(video="a", frame=0), item("none", video="a", frame=0)], reward=MASK_IOU)).scores
        client.close()
    assert scores[0].temporary and "no masks from the segmentation service" in scores[0].reason and scores[1].valid


def test_an_answer_that_does_not_come_in_time_is_a_503():
    """The segmentation service says nothing, and would be waited for longer than the server may take."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = RewardServeConfig(segmentation=f"http://127.0.0.1:{silent.getsockname()[1]}", segmentation_seconds=60.0, wait_seconds=0.5)
        client = LocalClient(load(config))
        with serving(client, config, make_app) as url:
            body = {"items": [item(video="a", frame=0)], "reward": MASK_IOU}
            answer = httpx.post(f"{url}/v1/score", json=body, timeout=60)
            assert answer.status_code == 503 and "0.5 s" in answer.json()["error"] and "retry-after" in answer.headers
            assert client.stats() == [{"requests": 0, "items": 0, "invalid": 0}]
            assert HttpClient(url).score(ScoreRequest(items=[item()])).scores[0].total == expected(item())[0]
        client.close()
