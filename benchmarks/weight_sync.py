"""Weights from the learner to an engine on CPUs: bytes a second against a plain copy in memory, and the time from the last gradient to the first new token. JSON, and a table.

    videoseg bench weight_sync --json OUT
    videoseg bench weight_sync --size small --json OUT

A real learner and a real engine, as a run starts them. In each round the engine answers a prompt, the learner makes an update of it, `cluster.weight_sync` gives the weights to the
engine, which then is asked for one token; and the same number of bytes is copied by NumPy. Of a sync:

    pause            the engine stops and drops its caches
    gather and hash  the learner puts its weights into one array and hashes it, and Ray brings it here
    load             the engine's actor writes it to shared memory, its process hashes it again and loads it
    wake             the engine closes the model, names the version, drops its caches and goes on
    put              the rest: the array into the object store, digests compared, the loop's own work

The optimizer's step is the time between the last gradient and the new weights; "one hash" is what the same bytes take here.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from generation import settings, steps_of
from side_by_side import machine, publish, ratio, spread
from cluster.config import RunConfig
from cluster.placement import start_actors, stop_actors
from cluster.ray_cluster import joined_cluster
from cluster.update import update
from cluster.weight_sync import sync_weights
from learner.batch import Sample
from rollout.fingerprints import policy_fingerprints
from rollout.prompts import Prompt

STAGES = {"begin_weight_sync": "pause", "weight_buckets": "gather and hash", "receive_weights": "load", "finish_weight_sync": "wake"}


class Timed:
    """An actor, with `seconds` of the calls to it, by what they are in STAGES."""

    def __init__(self, actor: Any, seconds: dict[str, float]) -> None:
        self.actor, self.seconds = actor, seconds

    def __getattr__(self, name: str) -> SimpleNamespace:
        method = getattr(self.actor, name)

        async def timed(answer: Awaitable) -> Any:
            start = time.perf_counter()
            try:
                return await answer
            finally:
                self.seconds[STAGES[name]] += time.perf_counter() - start

        async def stream(*arguments: Any) -> AsyncIterator[Awaitable]:
            refs = method.options(num_returns="streaming").remote(*arguments)
            with_end = aiter(refs)
            while (ref := await timed(anext(with_end, None))) is not None:
                yield timed(ref)

        return SimpleNamespace(remote=lambda *arguments: timed(method.remote(*arguments)), options=lambda num_returns: SimpleNamespace(remote=stream))


async def measure(config: RunConfig, prompts: list[Prompt], count: int) -> dict:
    """A round for each prompt but the first, which is to warm up."""
    actors = await start_actors(config, policy_fingerprints(config.policy.path)["banned_token_ids"], roles=("engine", "learner"))
    (engine,), learners, sampling = actors.engines, actors.learners, config.rollout.sampling()
    found, nbytes = defaultdict(list), 0
    try:
        for version, prompt in enumerate(prompts):
            learned = await learn(engine, learners, config, prompt, count, version)
            seconds = defaultdict(float)
            start = time.perf_counter()
            sent = await sync_weights([Timed(engine, seconds)], [Timed(learner, seconds) for learner in learners], version, config)
            synced = time.perf_counter()
            await engine.generate.remote(prompt, 1, replace(sampling, max_response_tokens=1), [version])
            ended = time.perf_counter()
            seconds["put"] = synced - start - sum(seconds.values())
            whole = {"optimizer": learned["seconds_optimizer"], "sync": synced - start, "first token": ended - synced, "last gradient to first token": learned["seconds_optimizer"] + ended - start}
            nbytes = int(sent["sync/bytes"])
            for name, value in (seconds | whole | here(nbytes)).items():
                found[name] += [value] * (version > 0)
            print(f"  round {version}/{len(prompts) - 1}", file=sys.stderr, flush=True)
    finally:
        stop_actors(actors)
    return {
        "bytes": nbytes,
        "megabytes_per_second": {name: spread([nbytes / 1e6 / seconds for seconds in found[name]], 2) for name in ("sync", "copy")},
        "sync_over_copy": ratio({name: {"each": found[name]} for name in ("sync", "copy")}, "sync", "copy"),
        "seconds": {name: spread(values, 5) for name, values in found.items()},
    }


async def learn(engine: Any, learners: list[Any], config: RunConfig, prompt: Prompt, count: int, number: int) -> dict[str, float]:
    """One update, of the answers to a prompt, each with another reward."""
    answers = await engine.generate.remote(prompt, count, config.rollout.sampling(), list(range(number * count, (number + 1) * count)))
    samples = [Sample(prompt.token_ids, c.token_ids, c.logprobs, prompt.images, prompt.grid_thw, number, prompt.fingerprint) for c in answers]
    return (await update(learners, config.learner, np.arange(float(count))[None], [samples]))[1]


def here(nbytes: int) -> dict[str, float]:
    """Seconds of a copy of so many bytes, and of their hash."""
    source = np.ones(nbytes, np.uint8)
    start = time.perf_counter()
    source.copy()
    copied = time.perf_counter()
    hashlib.sha256(source)
    return {"copy": copied - start, "one hash": time.perf_counter() - copied}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that does not (default 5)")
    parser.add_argument("--size", choices=("toy", "small"), default="toy", help="the debug recipe's policy, or the 22 M weights of small_policy.py")
    parser.add_argument("--group-size", type=int, default=8, help="completions of an update (default 8)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(args.size, Path(folder))
        prompts = [prompt for ((prompt, _),) in steps_of(config, Path(folder), args.rounds + 1, 1)]
        with joined_cluster(config.cluster):
            found = asyncio.run(measure(config, prompts, args.group_size))
    publish({"machine": machine(config.learner.threads), "size": vars(args) | {"json": None}} | found, args.json)
    for name, seconds in found["seconds"].items():
        print(f"{name:30} {1000 * seconds['median']:9.1f} ms ({1000 * seconds['min']:.1f} to {1000 * seconds['max']:.1f})", file=sys.stderr)
    print(f"{found['bytes'] / 1e6:.1f} MB, MB/s: {found['megabytes_per_second']}; a sync takes {found['sync_over_copy']} times as long as a copy", file=sys.stderr)


if __name__ == "__main__":
    main()
