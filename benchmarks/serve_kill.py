"""The served segmentation under fire: a replica killed in the middle of many mixed requests, and more clients than it can take. Prints JSON.

    videoseg bench serve_kill --requests 1000 --clients 200 [--propagation XMem.pth]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from segmentation_service import serve
from segmentation_service.client import HandleClient, LocalClient
from segmentation_service.config import PropagationConfig, SegmentationConfig
from segmentation_service.masks import decode_rle
from segmentation_service.serve_config import ServeConfig
from segmentation_service.service import SegmentationService
from segmentation_service.service_request import SegmentRequest, SegmentResponse, ServiceError

TOY_SAM2 = Path(__file__).resolve().parent.parent / "examples/toy/models/sam2"
VIDEOS, FRAMES, HEIGHT, WIDTH = 6, 6, 96, 128
MOST_PIXELS_OFF = 2e-3
"""Of a mask: sums of another batch size round differently, which can move a pixel at an edge."""


def write_videos(root: Path) -> None:
    """Videos of a square that goes over a ground of one colour, and one with an image that cannot be read."""
    for v in range(VIDEOS):
        ground, square = np.random.default_rng(v).integers(0, 255, (2, 3))
        (root / f"video{v}").mkdir()
        for t in range(FRAMES):
            image = np.empty((HEIGHT, WIDTH, 3), np.uint8)
            image[:] = ground
            image[20:60, 15 + 8 * t : 55 + 8 * t] = square
            Image.fromarray(image).save(root / f"video{v}" / f"{t:03d}.png")
    (root / "broken").mkdir()
    (root / "broken/000.png").write_text("no image")


def mixed_request(draw: random.Random, propagation: bool) -> SegmentRequest:
    """Seven of ten are good; the others miss the frame, the video, its frames, or the limits."""
    kind = draw.choices(["good", "outside", "missing", "frame", "broken", "limit"], [70, 8, 8, 6, 4, 4])[0]
    x, y = draw.choice([(15, 20), (40, 10), (5, 50)])
    box, point = {"box": (x, y, x + 40, y + 40)}, {"points": ((x + 20, y + 20),), "labels": (1,)}
    hypotheses = draw.choice([((box,),), ((box,), (point,)), ((box, point), (), (box,))])
    if kind == "outside":
        hypotheses = (({"box": (900, 900, 950, 950)}, box), ({"box": (9, 9, 3, 3)},))
    if kind == "limit":
        hypotheses = ((box,),) * 9
    return SegmentRequest(
        video={"missing": "../elsewhere", "broken": "broken"}.get(kind, f"video{draw.randrange(VIDEOS)}"),
        frame={"frame": FRAMES, "broken": 0}.get(kind, draw.randrange(2)),
        hypotheses=hypotheses,
        propagate=draw.choice([False, False, (0, FRAMES - 1)]) if propagation and kind == "good" else False,
    )


def outcome(client, request: SegmentRequest):
    """The response, the ServiceError, or whatever else went wrong."""
    try:
        return client.segment(request)
    except Exception as error:
        return error


def is_right(answer, expected) -> bool:
    if isinstance(expected, ServiceError):
        return isinstance(answer, ServiceError) and (answer.status, answer.message) == (expected.status, expected.message)
    if not isinstance(answer, SegmentResponse):
        return False
    ours, theirs = (leaves(r.model_dump()) for r in (answer, expected))
    return [where for where, _ in ours] == [where for where, _ in theirs] and all(
        np.mean(decode_rle(a) != decode_rle(b)) <= MOST_PIXELS_OFF for (_, a), (_, b) in zip(ours, theirs)
    )


def leaves(value, where=()) -> list[tuple[tuple, dict]]:
    """(place, mask) of all masks of a response."""
    if isinstance(value, dict) and "counts" in value:
        return [(where, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value or ())
    return [leaf for k, v in items for leaf in leaves(v, (*where, k))]


def kill_in_the_middle(config: ServeConfig, requests: list[SegmentRequest], expected: list, threads: int) -> dict:
    client = HandleClient(serve.start(config), config.wait_seconds)
    victim = client.stats()[0]["pid"]
    done, middle = [0], threading.Event()

    def one(request):
        answer = outcome(client, request)
        done[0] += 1
        if done[0] >= len(requests) // 2:
            middle.set()
        return answer

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(one, request) for request in requests]
        middle.wait()
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in futures]
    seconds = time.perf_counter() - start
    lost = [a for a, e in zip(answers, expected) if not isinstance(a, (SegmentResponse, ServiceError)) or (isinstance(a, ServiceError) and a.status >= 500)]
    right = sum(map(is_right, answers, expected))
    result = {
        "requests": len(requests),
        "with_propagation": sum(r.propagate is not False for r in requests),
        "statuses": dict(Counter(str(a.status) if isinstance(a, ServiceError) else "200" for a in answers if isinstance(a, (SegmentResponse, ServiceError)))),
        "lost": len(lost),
        "wrong": len(requests) - right - len(lost),
        "identical_to_the_last_pixel": sum(a == e for a, e in zip(answers, expected) if isinstance(e, SegmentResponse)),
        "retries": client.retries,
        "threads": threads,
        "seconds": round(seconds, 2),
    }
    client.close()
    return result


def crowd(config: ServeConfig, request: SegmentRequest, expected: SegmentResponse, clients: int, rounds: int = 3) -> dict:
    client = HandleClient(serve.start(config), config.wait_seconds)
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda _: outcome(client, request), range(rounds * clients)))
    right = sum(is_right(a, expected) for a in answers)
    refused = sum(isinstance(a, ServiceError) and a.status in (429, 503) for a in answers)
    client.close()
    counts = {"requests": len(answers), "right": right, "refused": refused, "else": len(answers) - right - refused}
    return {"clients": clients, "queue": config.max_queued_requests, **counts}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--threads", type=int, default=32, help="that send the mixed requests")
    parser.add_argument("--propagation", help="weights of an XMem; without them nothing is propagated")
    parser.add_argument("--checkpoint", default=str(TOY_SAM2), help="a SAM2 folder")
    options = parser.parse_args(arguments)
    import ray
    import torch

    torch.set_num_threads(1)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns of each refused request
    if not ray.is_initialized():
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder))
        segmentation = SegmentationConfig(checkpoint=options.checkpoint, replicas=2, propagation=PropagationConfig(checkpoint=options.propagation, size=0))
        config = ServeConfig(segmentation=segmentation, roots=[folder], max_hypotheses=8, max_queued_requests=2 * options.threads, wait_seconds=300)
        draw = random.Random(0)
        requests = [mixed_request(draw, options.propagation is not None) for _ in range(options.requests)]
        local, known = LocalClient(SegmentationService.load(config)), {}
        for request in requests:
            known.setdefault(request, outcome(local, request))
        good = next(request for request in known if isinstance(known[request], SegmentResponse))
        try:
            kill = kill_in_the_middle(config, requests, [known[request] for request in requests], options.threads)
            full = crowd(dataclasses.replace(config, max_queued_requests=16), good, known[good], options.clients)
        finally:
            serve.stop()
    print(json.dumps({"kill": {"distinct_requests": len(known), **kill}, "crowd": full}, indent=2))
    return 0 if not (kill["lost"] or kill["wrong"] or full["else"]) else 1


if __name__ == "__main__":
    sys.exit(main())
