"""What the served reward service takes: requests and completions a second, in this process, by HTTP, and through Ray Serve. Prints JSON.

    videoseg bench reward_throughput --through local http handle served --batch 1 8 64 256 --clients 1 8 --replicas 2

    local   the plain class in this process                    http    the HTTP server in front of it, one process
    handle  the replicas' handle                               served  the HTTP server in front of the replicas, as `videoseg serve reward` has it

Every completion has 8 objects (those of benchmarks/reward_growth.py) and is scored without masks by the default preset. Each cell asks for
--seconds; its first request is not counted. Answers are compared with those of the plain function.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from reward_growth import answer, target_of_8
from side_by_side import machine
from reward_service import RewardConfig, score_group
from reward_service.client import HandleClient, HttpClient, LocalClient, load
from reward_service.http_api import make_app
from reward_service.score_request import ScoreRequest
from reward_service.serve_config import RewardServeConfig
from segmentation_service.http_server import address, listen, server
from segmentation_service.masks import encode_rle

THROUGH = ("local", "http", "handle", "served")


def requests_of(batch: int, count: int = 8) -> tuple[list[ScoreRequest], list[list[float]]]:
    """Requests of so many completions, no two alike, and the totals of the plain function."""
    truth = target_of_8()
    target = {"image_size": truth.image_size, "boxes": truth.boxes, "points": truth.points, "masks": [encode_rle(m) for m in truth.masks]}
    texts = [[answer("videoseg_r1", np.random.default_rng([r, n])) for n in range(batch)] for r in range(count)]
    totals = [[s.total for s in score_group(group, truth, RewardConfig(), lengths=[30] * batch)] for group in texts]
    return [ScoreRequest(items=[{"completion": t, "target": target, "length": 30} for t in group]) for group in texts], totals


@contextlib.contextmanager
def http_in_front(client: Any, config: RewardServeConfig) -> Iterator[str]:
    """The URL of a server in a thread of its own."""
    listening = listen("127.0.0.1", 0)
    app = server(make_app(client, config))
    thread = threading.Thread(target=app.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not app.started:
        time.sleep(0.01)
    try:
        yield address(listening)
    finally:
        app.should_exit = True
        thread.join()
        listening.close()


def cell(make_client: Callable[[], Any], batch: int, clients: int, seconds: float) -> dict:
    """Requests and completions a second of so many clients that ask without a pause, and the time that one waits."""
    requests, totals = requests_of(batch)
    waits: list[float] = []
    wrong = [0]

    def ask(n: int) -> None:
        client = make_client()
        client.score(requests[n % len(requests)])
        ready.wait()
        end, k = time.perf_counter() + seconds, n
        while time.perf_counter() < end:
            start = time.perf_counter()
            scores = client.score(requests[k % len(requests)]).scores
            waits.append(time.perf_counter() - start)
            wrong[0] += [s.total for s in scores] != totals[k % len(requests)]
            k += 1

    ready = threading.Barrier(clients)
    with ThreadPoolExecutor(clients) as threads:
        for future in [threads.submit(ask, n) for n in range(clients)]:
            future.result()
    rate = clients * len(waits) / sum(waits)
    return {
        "batch": batch,
        "clients": clients,
        "requests": len(waits),
        "wrong": wrong[0],
        "requests_per_second": round(rate, 1),
        "completions_per_second": round(rate * batch),
        "milliseconds": {"median": round(1000 * statistics.median(waits), 2), "max": round(1000 * max(waits), 2)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--through", nargs="+", choices=THROUGH, default=list(THROUGH))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    config = RewardServeConfig(replicas=args.replicas)
    record: dict[str, Any] = {"machine": machine(1), "replicas": args.replicas}
    with contextlib.ExitStack() as stack:
        local = LocalClient(load(config))
        stack.callback(local.close)
        handle = None
        if {"handle", "served"} & set(args.through):
            import ray

            from reward_service import serve

            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            if not ray.is_initialized():
                ray.init(num_cpus=args.replicas + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            handle = HandleClient(serve.start(config), config.wait_seconds)
            stack.callback(serve.stop)
            stack.callback(handle.close)
        for through in args.through:
            client = handle if through in ("handle", "served") else local
            with http_in_front(client, config) if through in ("http", "served") else contextlib.nullcontext() as url:
                make_client = (lambda url=url: HttpClient(url)) if url else (lambda client=client: client)
                record[through] = [cell(make_client, batch, clients, args.seconds) for batch in args.batch for clients in args.clients]
            for one in record[through]:
                print(f"  {through}, {one['batch']} x {one['clients']}: {one['completions_per_second']} completions/s", file=sys.stderr, flush=True)
    print(json.dumps(record, indent=1))
    return int(any(one["wrong"] for through in args.through for one in record[through]))


if __name__ == "__main__":
    sys.exit(main())
