"""A real HTTP server on a real port for the tests, and requests that no well-behaved client would send."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from segmentation_service.http_api import make_app
from segmentation_service.http_server import address, listen, server


@contextlib.contextmanager
def serving(client, config, make_app=make_app):
    """The URL of a server in a thread of its own, until the block ends."""
    listening = listen("127.0.0.1", 0)
    app = server(make_app(client, config))
    thread = threading.Thread(target=app.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: app.started)
        yield address(listening)
    finally:
        app.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def connect(url):
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def read_answer(connection):
    """(status, headers, JSON body) of the one answer after which the server closes, or which has a length."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        if not piece:
            return (0, {}, None)
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    return int(status.split()[1]), headers, json.loads(body) if "json" in headers["content-type"] else body


def write_video(folder: Path, frames=3, hw=(96, 128)):
    """A red disc that moves over grey, as PNG files; returns the box round it on frame 0."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[0 : hw[0], 0 : hw[1]]
    for t in range(frames):
        frame = np.full((*hw, 3), 55, np.uint8)
        frame[((x - 40 - 5 * t) / 16) ** 2 + ((y - 60) / 16) ** 2 <= 1] = (225, 45, 45)
        Image.fromarray(frame).save(folder / f"{t:03d}.png")
    return (24, 44, 56, 76)
