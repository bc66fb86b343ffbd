"""What stands before the application, tried over real connections: token, sizes, slowness, and how many at a time."""

import asyncio
import re
import threading
import time
import types
from dataclasses import replace

import httpx
import pytest
from http_serving import connect, read_answer, serving, wait_until

from segmentation_service.http_client import HttpClient
from segmentation_service.serve_config import ServeConfig
from segmentation_service.service_request import SegmentRequest, SegmentResponse, ServiceError

ASK = SegmentRequest(video="v", frame=0, hypotheses=[[{"box": (0, 0, 1, 1)}]])
ANSWER = SegmentResponse(masks=(({"size": (1, 1), "counts": "1"},),))
HEAD = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Waiting:
    """A client whose answers wait until they are let go; it counts what was begun and what was cancelled."""

    def __init__(self):
        self.free, self.begun, self.cancelled, self.error = threading.Event(), 0, 0, None

    async def segment_async(self, request):
        self.begun += 1
        try:
            while not self.free.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return ANSWER

    def stats(self):
        return []


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    uploads = tmp_path_factory.mktemp("uploads")
    return ServeConfig(roots=["/"], uploads=str(uploads), max_body_bytes=2000, max_upload_bytes=100_000, body_seconds=60.0)


@pytest.fixture
def waiting():
    return Waiting()


@pytest.fixture(scope="module")
def url(config):
    """A server that answers at once."""
    client = Waiting()
    client.free.set()
    with serving(client, config) as url:
        yield url


@pytest.fixture(scope="module")
def impatient(config):
    """The same, but it does not wait for bodies."""
    with serving(Waiting(), replace(config, body_seconds=0.5, upload_body_seconds=0.7)) as url:
        yield url


def post(url):
    return httpx.post(f"{url}/v1/segment", json=ASK.model_dump(mode="json"), timeout=60)


def in_flight(url):
    return httpx.get(f"{url}/v1/stats").json()["in_flight"] - 1


def test_token(config):
    client = Waiting()
    client.free.set()
    with serving(client, replace(config, token="correct-horse")) as url, httpx.Client(base_url=url) as http:
        wrong = ("Bearer", "Bearer wrong-horse", "Bearer correct-horse2", "Bearer correct-hors", "Basic correct-horse", "correct-horse", "Bearer c\xf6rrect")
        for given in (None, "", *wrong):
            for method, path in (("POST", "/v1/segment"), ("POST", "/v1/videos"), ("DELETE", "/v1/videos/x"), ("GET", "/v1/stats"), ("GET", "/nowhere")):
                headers = {} if given is None else {"authorization": given.encode("latin-1")}
                answer = http.request(method, path, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer" and "token" in answer.json()["error"].lower()
        assert httpx.get(f"{url}/healthz").status_code == httpx.get(f"{url}/docs").status_code == 200
        assert HttpClient(url, "correct-horse").segment(ASK) == ANSWER
        with pytest.raises(ServiceError, match="401: wrong token"):
            HttpClient(url, "wrong-horse").segment(ASK)


def test_a_token_from_the_environment(config, monkeypatch):
    monkeypatch.setenv("VIDEOSEG_TOKEN", "of-the-environment")
    client = Waiting()
    client.free.set()
    with serving(client, config) as url:
        assert post(url).status_code == 401 and HttpClient(url, "of-the-environment").segment(ASK) == ANSWER


def test_without_a_token_no_foreign_name_leads_here(url):
    foreign = ("evil.example", "evil.example:80", "[", "127.0.0.1.evil.example")
    for host, status in (*((name, 401) for name in foreign), ("localhost:9", 200), ("[::1]:9", 200), ("127.0.0.1", 200)):
        assert httpx.get(f"{url}/v1/stats", headers={"host": host}).status_code == status


def test_a_body_that_is_announced_too_large_is_refused_unread(url):
    with connect(url) as connection:
        connection.sendall(HEAD + b"Content-Length: 2001\r\nExpect: 100-continue\r\n\r\n")
        status, headers, answer = read_answer(connection)
    assert status == 413 and "2001" in answer["error"] and headers["connection"] == "close"
    for wrong in (b"99999999999999999999999999", b"-1", b"0x10", b"1, 2"):
        with connect(url) as connection:
            connection.sendall(HEAD + b"Content-Length: " + wrong + b"\r\n\r\n")
            assert read_answer(connection)[0] in (400, 413)


def test_a_chunked_body_is_counted_as_it_comes(url):
    with connect(url) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            connection.sendall(b"320\r\n" + b" " * 800 + b"\r\n")
        status, headers, answer = read_answer(connection)
        assert status == 413 and "2000" in answer["error"] and headers["connection"] == "close"
        assert connection.recv(100) == b""
    body = ASK.model_dump_json().encode()
    with connect(url) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for byte in body:
            connection.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert read_answer(connection)[0] == 200


def test_a_client_that_sends_on_reads_why_it_is_refused(url):
    """Without reading on, the server's closing would reset the connection before the client has seen the answer."""
    answer = httpx.post(f"{url}/v1/segment", content=iter([b" " * 1000] * 1000), headers={"content-type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize("body", [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_a_body_that_does_not_come_is_given_up(impatient, body):
    with connect(impatient) as connection:
        connection.sendall(HEAD + body)
        status, headers, answer = read_answer(connection)
    assert status == 408 and "0.5 s" in answer["error"] and headers["connection"] == "close" and in_flight(impatient) == 0


def test_an_upload_that_drips_is_given_up(impatient):
    with connect(impatient) as connection:
        connection.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\nContent-Length: 1000\r\n\r\n")
        dripping = threading.Thread(target=drip, args=(connection,))
        dripping.start()
        status, _, answer = read_answer(connection)
        dripping.join()
    assert status == 408 and "0.7 s" in answer["error"]


def drip(connection):
    try:
        for _ in range(100):
            connection.sendall(b"P")
            time.sleep(0.02)
    except OSError:
        pass


def test_headers_that_do_not_come_close_the_connection(url, monkeypatch):
    monkeypatch.setattr("segmentation_service.http_server.HEADER_SECONDS", 1)
    client = Waiting()
    client.free.set()
    with serving(client, ServeConfig(roots=["/"])) as url:
        for begun in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal"):
            with connect(url) as connection:
                connection.sendall(begun)
                if begun.count(b"GET") == 2:
                    assert read_answer(connection)[0] == 200
                assert connection.recv(100) == b"", "closed by the server"


def test_more_than_announced_is_not_taken_for_a_request(url):
    with connect(url) as connection:
        connection.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}{}{}\r\n\r\n")
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"422", b"400"]


def test_limits_of_requests_at_a_time(config, waiting):
    with serving(waiting, replace(config, max_in_flight=3, max_in_flight_per_client=2)) as url:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(url))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: waiting.begun == 2)
        refused = post(url)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1" and "2 of your requests" in refused.json()["error"]
        assert httpx.get(f"{url}/healthz").status_code == 200
        waiting.free.set()
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [200, 200] and post(url).status_code == 200
    with serving(waiting, replace(config, max_in_flight=1)) as url:
        waiting.free.clear()
        first = threading.Thread(target=lambda: answers.append(post(url)))
        first.start()
        wait_until(lambda: waiting.begun == 4)
        refused = post(url)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1" and "full" in refused.json()["error"]
        waiting.free.set()
        first.join()


def test_a_request_that_takes_too_long_is_given_up(config, waiting):
    with serving(waiting, replace(config, wait_seconds=0.3)) as url:
        answer = post(url)
        assert answer.status_code == 503 and "0.3 s" in answer.json()["error"] and "retry-after" in answer.headers and waiting.cancelled == 1
        assert in_flight(url) == 0


def test_a_request_whose_client_has_left_is_given_up(config, waiting):
    with serving(waiting, config) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/segment", json=ASK.model_dump(mode="json"), timeout=httpx.Timeout(60, read=0.5))
        wait_until(lambda: waiting.cancelled == 1)
        wait_until(lambda: in_flight(url) == 0)


def test_the_client_tries_again_while_the_service_is_full_and_no_longer_than_it_has_patience(config, waiting, monkeypatch):
    monkeypatch.setattr("segmentation_service.http_client.FIRST_PAUSE", 0.01)
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            waiting.error = None

    monkeypatch.setattr("segmentation_service.http_client.time", types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    waiting.free.set()
    waiting.error = ServiceError(503, "full", 2.5)
    with serving(waiting, config) as url:
        assert HttpClient(url).segment(ASK) == ANSWER and pauses == [3.0] * 3  # Retry-After is in whole seconds
        waiting.error = ServiceError(429, "too many", 20)
        with pytest.raises(ServiceError) as given_up:
            HttpClient(url, patience_seconds=10).segment(ASK)
        assert (given_up.value.status, given_up.value.message, given_up.value.retry_after) == (429, "too many", 20) and len(pauses) == 3
        waiting.error, begun = ServiceError(413, "too much"), waiting.begun
        with pytest.raises(ServiceError, match="413: too much"):
            HttpClient(url).segment(ASK)
        with pytest.raises(ServiceError, match="413: too much"):
            asyncio.run(HttpClient(url).segment_async(ASK))
        assert waiting.begun == begun + 2, "asked once each"
    with pytest.raises(ServiceError, match="503: no answer from the server"):
        HttpClient(url, patience_seconds=0).segment(ASK)
