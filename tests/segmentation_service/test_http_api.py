"""The HTTP interface over the toy SAM2, with a real server: the same masks as in the process, and a clear answer to all that is wrong."""

import asyncio
import io
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from http_serving import connect, serving, wait_until, write_video
from PIL import Image
from pydantic import ValidationError

from segmentation_service.client import LocalClient
from segmentation_service.config import PropagationConfig
from segmentation_service.http_api import make_app
from segmentation_service.http_client import HttpClient
from segmentation_service.http_guard import UnsafeServer
from segmentation_service.references import References
from segmentation_service.segmenter import Segmenter
from segmentation_service.serve_config import ServeConfig
from segmentation_service.service import SegmentationService
from segmentation_service.service_request import SegmentRequest, ServiceError
from tests.conftest import TOY

sys.path.append(str(Path(__file__).parent / "xmem"))  # tiny_xmem.py

BOX = (24, 44, 56, 76)
JSON = {"content-type": "application/json"}
ZIP = {"content-type": "application/zip"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("http")
    write_video(root / "videos/disc")
    write_video(root / "secret")
    (root / "videos/link").symlink_to(root / "secret")
    (root / "uploads").mkdir()
    return root


@pytest.fixture(scope="module")
def config(videos):
    return ServeConfig(
        roots=[str(videos / "videos")], uploads=str(videos / "uploads"), max_objects=20, max_frames=5, max_frame_pixels=20_000,
        max_body_bytes=20_000, max_upload_bytes=200_000, max_uploads_bytes=300_000, body_seconds=60.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def local(config):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield client_in_process(config)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def url(local, config):
    with serving(local, config) as url:
        yield url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def client_in_process(config, propagation=None):
    segmenter = Segmenter(str(TOY / "sam2"), device="cpu", propagation=propagation)
    return LocalClient(SegmentationService(segmenter, References(config.roots, config.uploads, config.max_frame_pixels), config))


def asking(**changes):
    return {"video": "disc", "frame": 0, "hypotheses": [[{"box": BOX}]], **changes}


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def image(hw=(30, 40), value=100, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.full((*hw, 3), value, np.uint8)).save(file, kind)
    return file.getvalue()


def test_same_masks_as_in_the_process(local, url, http):
    request = SegmentRequest(**asking(hypotheses=[[{"box": BOX}, {"points": [(40, 60)], "labels": [1]}], [], [{"box": (0, 0, 20, 20)}]]))
    expected = local.segment(request)
    client = HttpClient(url)
    assert client.segment(request) == asyncio.run(client.segment_async(request)) == expected
    assert [len(masks) for masks in expected.masks] == [2, 0, 1] and expected.masks[0][0].size == (96, 128)
    assert http.post("/v1/segment", json=request.model_dump(mode="json")).json() == expected.model_dump(mode="json")
    client.close()


def test_same_tracks_as_in_the_process(config, tmp_path):
    import torch
    from tiny_xmem import tiny_state_dict

    torch.save(tiny_state_dict(), tmp_path / "xmem.pth")
    local = client_in_process(config, PropagationConfig(checkpoint=str(tmp_path / "xmem.pth"), size=0))
    with serving(local, config) as url:
        client = HttpClient(url)
        for propagate, frames in ((True, [0, 1, 2]), ((2,), [2])):
            request = SegmentRequest(**asking(frame=1, hypotheses=[[{"box": BOX}, {"box": (80, 10, 90, 20)}], []], propagate=propagate))
            answer = client.segment(request)
            assert answer == local.segment(request) and [sorted(track) for track in answer.tracks] == [frames, frames]
            assert [len(track[2]) for track in answer.tracks] == [2, 0]
        client.close()


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"", 400, "send a JSON object"),
        (b"{", 400, "not valid JSON"),
        (b'{"video": "\xff"}', 400, "cannot be read as JSON"),
        (b"[" * 10_000, 400, "cannot be read as JSON"),
        (b"1" * 10_000, 400, "cannot be read as JSON"),
        (b"null", 400, "send a JSON object"),
        (b"[]", 422, "the request"),
        (json.dumps(asking(frame=-1)).encode(), 422, "frame: "),
        (json.dumps(asking(frame=3)).encode(), 422, "frame 3"),
        (json.dumps(asking(frame=10**30)).encode(), 422, "frame 1000000"),
        (json.dumps(asking(hypotheses=[])).encode(), 422, "hypotheses: "),
        (json.dumps(asking(hypotheses=[[{"box": [1, 2, float("nan"), 4]}]])).encode(), 422, "hypotheses.0.0.box.2: Input should be a finite number"),
        (json.dumps(asking(hypotheses=[[{"box": [1, 2, 3, float("inf")]}]])).encode(), 422, "hypotheses.0.0.box.3"),
        (json.dumps(asking(hypotheses=[[{"points": [[1, 2]], "labels": [1, 0]}]])).encode(), 422, "hypotheses.0.0: each point needs a label"),
        (json.dumps(asking(hypotheses=[[{}]])).encode(), 422, "hypotheses.0.0: an object needs a box or a point"),
        (json.dumps(asking(shape="round")).encode(), 422, "shape: Extra inputs"),
        (json.dumps(asking(propagate=True)).encode(), 422, "without weights for propagation"),
        (json.dumps(asking(hypotheses=[[{"box": BOX}] * 21])).encode(), 413, "21 objects"),
        (json.dumps(asking(video="x" * 5000)).encode(), 422, "video: "),
        (json.dumps(asking(video="\ud800")).encode(), 422, "video: "),
    ],
)
def test_what_is_wrong_with_a_request_is_said(http, body, status, said):
    answer = http.post("/v1/segment", content=body, headers=JSON)
    assert answer.status_code == status and said in answer.json()["error"], answer.text
    assert len(answer.content) < 2000


def test_every_wrong_field_is_named_once(http):
    wrong = asking(hypotheses=[[{"box": [1, 2, "x", None]}]], propagate="maybe", shape="round")
    fields = http.post("/v1/segment", json=wrong).json()["fields"]
    assert fields == ["hypotheses.0.0.box.2", "hypotheses.0.0.box.3", "propagate.bool", "propagate.tuple[constrained-int, ...]", "shape"]


def test_json_must_say_that_it_is(http):
    answer = http.post("/v1/segment", content=json.dumps(asking()), headers={"content-type": "text/plain"})
    assert answer.status_code == 400 and "send a JSON object" in answer.json()["error"]


@pytest.mark.parametrize(
    "video",
    ["../secret", "disc/../../secret", "{root}/secret", "{root}/videos/../secret", "link", "/etc", "/proc/self/cwd",
     "disc\0", "%2e%2e/secret", "..\\secret",
     "upload:../videos/disc", "upload:", "upload:.", "upload:/etc", "upload:" + "0" * 32, "nowhere"],
)  # fmt: skip
def test_nothing_else_of_the_file_system_is_read_or_told(http, videos, video):
    answer = http.post("/v1/segment", json=asking(video=video.format(root=videos)))
    assert answer.status_code == 404 and answer.json()["error"].startswith("there is no video"), answer.text
    if "{root}" not in video:
        assert str(videos) not in answer.text


def test_a_video_that_cannot_be_decoded_is_named_without_its_place(http, videos):
    broken = videos / "videos/broken"
    write_video(broken)
    (broken / "001.png").write_bytes((broken / "001.png").read_bytes()[:100])
    (broken / "000.png").write_bytes(b"no image")
    for frame in (0, 1):
        answer = http.post("/v1/segment", json=asking(video="broken", frame=frame))
        assert answer.status_code == 422 and f"frame {frame}" in answer.json()["error"] and str(videos) not in answer.text, answer.text
    assert http.post("/v1/segment", json=asking(video="broken", frame=2)).status_code == 200


def test_other_addresses_and_methods(http):
    assert http.get("/healthz").json() == {"status": "ok"}
    answer = http.get("/v1/segment")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and "error" in answer.json()
    for path in ("/", "/v1", "/v1/segment/", "/v1/videos/..%2f..", "/openapi.json/..", "//etc/passwd"):
        answer = http.get(path)
        assert answer.status_code in (404, 405) and "error" in answer.json()


def test_the_schema_and_its_page(http):
    schema = http.get("/openapi.json").json()
    assert {"/v1/segment", "/v1/videos", "/v1/videos/{video}", "/healthz"} <= set(schema["paths"])
    assert {"400", "401", "404", "413", "422", "429", "503"} <= set(schema["paths"]["/v1/segment"]["post"]["responses"])
    assert set(schema["components"]["schemas"]["SegmentRequest"]["properties"]) == set(SegmentRequest.model_fields)
    page = http.get("/docs")
    assert "text/html" in page.headers["content-type"] and "<script" not in page.text and "//" not in page.text.replace("http://", "")
    assert "POST /v1/segment" in page.text and "hypotheses" in page.text


def test_a_fault_of_ours_is_a_500_and_its_trace_is_in_the_log_only(config, caplog):
    class Faulty:
        async def segment_async(self, request):
            raise RuntimeError("secret")

        def stats(self):
            return []

    with serving(Faulty(), config) as url:
        answer = httpx.post(f"{url}/v1/segment", json=asking())
        assert answer.status_code == 500 and "error" in answer.json() and "secret" not in answer.text and "secret" in caplog.text
        assert httpx.get(f"{url}/v1/stats").json()["answers"] == {"500": 1}


def test_two_hundred_clients_get_right_answers_or_an_honest_no(local, config):
    request = SegmentRequest(**asking())
    expected = local.segment(request).model_dump(mode="json")

    async def ask(url):
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(client.post("/v1/segment", json=request.model_dump(mode="json")) for _ in range(200)))

    async def insist(url):
        client = HttpClient(url)
        return await asyncio.gather(*(client.segment_async(request) for _ in range(30)))

    with serving(local, replace(config, max_in_flight=12, max_in_flight_per_client=8)) as url:
        answers = asyncio.run(ask(url))
        refused = [a for a in answers if a.status_code != 200]
        assert refused and all(a.json() == expected for a in answers if a.status_code == 200) and len(refused) < 200
        assert all(a.status_code == 429 and int(a.headers["retry-after"]) >= 1 and a.json()["error"] for a in refused)
        assert all(a.model_dump(mode="json") == expected for a in asyncio.run(insist(url)))
        stats = httpx.get(f"{url}/v1/stats").json()
        assert stats["answers"]["200"] >= 200 - len(refused) + 30 and stats["in_flight"] == 1


def test_upload_ask_delete(http, url, videos, local, tmp_path):
    client = HttpClient(url)
    video = client.upload(videos / "videos/disc")
    request = SegmentRequest(**asking(video=video))
    assert client.segment(request) == local.segment(SegmentRequest(**asking()))
    client.delete(video)
    with pytest.raises(ServiceError) as refused:
        client.segment(request)
    assert refused.value.status == 404
    with pytest.raises(ServiceError, match="404"):
        client.delete(video)
    (tmp_path / "one.png").write_bytes(image())
    (tmp_path / "two.zip").write_bytes(zipped({"b/2.jpg": image(kind="JPEG"), "b/1.png": image(), "__MACOSX/._1.png": b"x", ".DS_Store": b"x"}))
    for file, frames in (("one.png", 1), ("two.zip", 2)):
        answer = http.post("/v1/videos", content=(tmp_path / file).read_bytes(), headers=ZIP).json()
        assert (answer["frames"], answer["height"], answer["width"]) == (frames, 30, 40)
        folder = videos / "uploads" / answer["video"].removeprefix("upload:")
        assert len(list(folder.iterdir())) == frames and (frames == 1 or (folder / "000000.png").exists() and (folder / "000001.jpg").exists())
        assert http.delete(f"/v1/videos/{answer['video']}").status_code == 204
    assert list((videos / "uploads").iterdir()) == []
    client.close()


@pytest.mark.parametrize("name", ["..%2fvideos%2fdisc", "%00", "disc", "..", ".", "upload:..%2f..%2fsecret", "0" * 32, "0" * 31 + "%0a"])
def test_only_uploads_can_be_deleted(http, videos, name):
    assert http.delete(f"/v1/videos/{name}").status_code in (404, 405)
    assert (videos / "videos/disc/000.png").exists() and (videos / "secret/000.png").exists()


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"", 422, "not a JPEG or PNG"),
        (b"no image at all", 422, "not a JPEG or PNG"),
        (b"PK\3\4 and then nothing", 422, "not a readable ZIP"),
        (zipped({"0.png": image()})[:-30], 422, "not a readable ZIP"),
        (zipped({}), 422, "no JPEG or PNG"),
        (zipped({"readme.txt": b"x", "0.png": image()}), 422, "readme.txt"),
        (zipped({"0.png": image()[:-40]}), 422, "'0.png' is not a JPEG or PNG"),
        (zipped({"0.jpg": image(kind="JPEG")[:-100]}), 422, "'0.jpg' is not a JPEG or PNG"),
        (zipped({"0.png": image(kind="GIF")}), 422, "'0.png' is not a JPEG or PNG"),
        (zipped({"0.png": image(), "1.png": image((40, 30))}), 422, "'1.png' is 40x30"),
        (zipped({f"{i}.png": image() for i in range(6)}), 413, "5 frames"),
        (zipped({"0.png": image((200, 200))}), 413, "20000"),
        (zipped({"0.png": b"\0" * 300_000}), 413, "unpacks to more"),
        (image()[:-30], 422, "not a JPEG or PNG"),
    ],
)
def test_uploads_that_are_no_video_are_refused_and_leave_nothing(http, videos, body, status, said):
    answer = http.post("/v1/videos", content=body, headers=ZIP)
    assert answer.status_code == status and said in answer.json()["error"], answer.text
    assert list((videos / "uploads").iterdir()) == [] and http.get("/v1/stats").json()["upload_bytes"] == 0 and str(videos) not in answer.text


def test_names_in_a_zip_lead_nowhere(http, videos):
    answer = http.post("/v1/videos", content=zipped({"../../../evil.png": image(), "/abs.png": image(value=3)}), headers=ZIP).json()
    folder = videos / "uploads" / answer["video"].removeprefix("upload:")
    assert sorted(f.name for f in folder.iterdir()) == ["000000.png", "000001.png"] and not list(videos.rglob("evil*")) and not list(videos.rglob("abs*"))
    assert http.delete(f"/v1/videos/{answer['video']}").status_code == 204


def test_uploads_have_a_quota(http, videos):
    noise = {f"{i}.png": image_of_noise(i) for i in range(3)}
    kept = []
    while (answer := http.post("/v1/videos", content=zipped(noise), headers=ZIP)).status_code == 201:
        kept.append(answer.json()["video"])
        assert len(kept) < 10
    assert kept and answer.status_code == 503 and "room" in answer.json()["error"] and int(answer.headers["retry-after"]) >= 1
    for video in kept:
        assert http.delete(f"/v1/videos/{video}").status_code == 204
    assert http.get("/v1/stats").json()["upload_bytes"] == 0 and list((videos / "uploads").iterdir()) == []


def image_of_noise(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_foreign_page_cannot_upload_unasked(http):
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        assert http.post("/v1/videos", content=image(), headers={"content-type": kind}).status_code == 400


def test_an_upload_that_breaks_off_leaves_nothing(http, url, videos):
    with connect(url) as connection:
        connection.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\nContent-Length: 1000\r\n\r\nPK")
        wait_until(lambda: len(list((videos / "uploads").iterdir())) == 1)
    wait_until(lambda: list((videos / "uploads").iterdir()) == [])
    assert http.get("/v1/stats").json()["in_flight"] == 1


def test_no_open_server_without_a_token(local, config):
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(UnsafeServer, match="VIDEOSEG_TOKEN"):
            make_app(local, replace(config, host=host))
    with pytest.raises(UnsafeServer, match="at least 8"):
        make_app(local, replace(config, host="0.0.0.0", token="short"))
    make_app(local, replace(config, host="0.0.0.0", token="long-enough-to-be-one"))
    make_app(local, replace(config, host="::1"))


def test_a_million_wrong_items_are_one_error():
    """Each would be an error of its own otherwise: 3 GB and two minutes for a body of 4 MB."""
    for text in (
        '{"video": "v", "frame": 0, "hypotheses": [[%s]]}' % ",".join(["{}"] * 2000),
        '{"video": "v", "frame": 0, "hypotheses": [%s]}' % ",".join(["[{}]"] * 2000),
        '{"video": "v", "frame": 0, "hypotheses": [[]], "propagate": [%s]}' % ",".join(["-1"] * 2000),
        '{"video": "v", "frame": 0, "hypotheses": [[{"points": [%s], "labels": [%s]}]]}' % (",".join(["[]"] * 2000), ",".join(["2"] * 2000)),
    ):
        with pytest.raises(ValidationError) as refused:
            SegmentRequest.model_validate_json(text)
        assert refused.value.error_count() < 10
