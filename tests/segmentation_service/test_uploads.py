"""The folder of uploads: hostile ZIPs, quota, lifetime, and what is left of uploads that were broken off."""

import asyncio
import io
import os
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from segmentation_service.service_request import ServiceError
from segmentation_service.uploads import UploadStore
from segmentation_service.video import ImageFolder


def png(value=9, hw=(8, 8)):
    file = io.BytesIO()
    Image.fromarray(np.full((*hw, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def zipped(*members, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def store(folder, **changes):
    limits = {"max_bytes": 10**6, "quota_bytes": 10**6, "lifetime_seconds": 100.0, "max_frames": 50, "max_pixels": 10_000}
    return UploadStore(folder, **{**limits, **changes})


def receive(uploads, body, piece=1000):
    async def pieces():
        for at in range(0, len(body), piece):
            yield body[at : at + piece]

    return asyncio.run(uploads.receive(pieces()))


def test_frames_keep_the_order_of_their_names(tmp_path):
    upload = receive(store(tmp_path), zipped(("b.png", png(2)), ("a.png", png(1)), ("c/a.png", png(3))))
    video = ImageFolder(tmp_path / upload.name)
    assert (upload.frames, upload.height, upload.width) == (3, 8, 8) and [video.frame(i)[0, 0, 0] for i in range(3)] == [1, 2, 3]


def test_hostile_zips_are_refused(tmp_path):
    uploads = store(tmp_path)
    stored = zipped(("0.png", png()))
    end = stored.rindex(b"PK\5\6")
    many = zipped(*((f"{i}.png", b"") for i in range(5000)))  # whose list of contents is far larger than 50 frames need
    encrypted = bytearray(stored)
    for header, flags in ((0, 6), (stored.index(b"PK\1\2"), 8)):
        encrypted[header + flags] |= 1
    wrong_sum = stored.replace(png(), png(10))
    claims_more = stored[: end + 10] + b"\xff\xff" + stored[end + 12 :]
    for body, said in (
        (many, "list of contents"),
        (bytes(encrypted), "not a readable ZIP"),
        (wrong_sum, "not a readable ZIP"),
        (zipped(("0.png", png()), compression=zipfile.ZIP_LZMA), "neither stored nor deflated"),
        (zipped(("0.svg", b"<svg/>")), "0.svg"),
    ):
        with pytest.raises(ServiceError, match=said) as refused:
            receive(uploads, body)
        assert refused.value.status == 422
    with pytest.raises(ServiceError, match="unpacks to more") as refused:
        receive(uploads, zipped(*((f"{i}.png", bytes(10**5)) for i in range(11)), compression=zipfile.ZIP_DEFLATED))
    assert refused.value.status == 413
    for body in (bytes(200_000), zipped(("0.png", bytes(200_000)))):
        with pytest.raises(ServiceError, match="200000 bytes, which is more than an image of 10000 pixels needs") as refused:
            receive(uploads, body)
        assert refused.value.status == 413
    assert receive(uploads, claims_more).frames == 1, "the list counts, not what is said of it"
    assert uploads.bytes_used == len(png()) and len(list(tmp_path.iterdir())) == 1


def test_the_quota_is_shared_counts_what_is_on_its_way_and_outlives_the_server(tmp_path):
    body = zipped(("0.png", png()), ("1.png", png()))
    uploads = store(tmp_path, quota_bytes=len(body) + 4 * len(png()))
    kept = [receive(uploads, body), receive(uploads, body)]
    assert uploads.bytes_used == 4 * len(png())
    with pytest.raises(ServiceError, match="no room") as refused:
        receive(uploads, body)
    assert refused.value.status == 503 and refused.value.retry_after and uploads.bytes_used == 4 * len(png())
    again = store(tmp_path, quota_bytes=uploads.quota_bytes)
    assert again.bytes_used == 4 * len(png())
    again.delete(kept[0].name)
    assert receive(again, body).frames == 2


def test_uploads_expire_unless_they_are_used(tmp_path):
    uploads = store(tmp_path)
    old, used, fresh = (receive(uploads, png()).name for _ in range(3))
    (tmp_path / ".0123456789abcdef0123456789abcdef").mkdir()  # of a server that was killed
    (tmp_path / "mine").mkdir()
    for name in (old, used, ".0123456789abcdef0123456789abcdef", "mine"):
        os.utime(tmp_path / name, (time.time() - 101, time.time() - 101))
    uploads.touch(used)
    uploads.touch("../mine")
    uploads.sweep()
    assert {f.name for f in tmp_path.iterdir()} == {used, fresh, "mine"} and uploads.bytes_used == 2 * len(png())
    with pytest.raises(ServiceError, match="may have expired"):
        uploads.delete(old)


def test_nothing_is_left_of_an_upload_that_is_broken_off(tmp_path, monkeypatch):
    uploads = store(tmp_path)

    async def breaks_off():
        yield b"PK"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        asyncio.run(uploads.receive(breaks_off()))
    assert not list(tmp_path.iterdir()) and uploads.bytes_used == 0

    checking, go_on = threading.Event(), threading.Event()
    check = UploadStore._check_frame
    monkeypatch.setattr(UploadStore, "_check_frame", lambda *args: (checking.set(), go_on.wait(30), check(*args))[2])

    async def cancelled_while_it_is_checked():
        async def body():
            yield zipped(("0.png", png()), ("1.png", png()))

        task = asyncio.ensure_future(uploads.receive(body()))
        await asyncio.to_thread(checking.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(cancelled_while_it_is_checked())  # waits for the thread
    assert not list(tmp_path.iterdir()) and uploads.bytes_used == 0
