"""The loop's pipeline with stages of known cost: how close a step comes to the slower of generation and learning, and what the controller itself costs.

    videoseg bench pipeline --json OUT        (or python benchmarks/pipeline.py --json OUT)

    efficiency  an engine that answers so many groups at a time, each in a random time, and a learner that takes a fixed time; what a step takes over the slower
                of the two, for each `loop.max_staleness` and for learners that are faster, as fast and slower than the engine. Generation is counted as what a full
                engine needs for a step's groups; alone, a step takes it longer, since the engine runs empty at its end
    controller  seconds of CPU a group where answers and updates take no time: drawing, beginning, handing out, the ledger on disk
    engines     the same with actors of a local Ray that give the same eight answers of 100 tokens at once in place of engines: what it takes to ask them with a prompt of
                five pictures and to receive the answers (`calls`), and to compute their rewards from boxes and points (`rewards`), for 1 to 8 of them

`cluster.pipeline`, `cluster.ledger`, `cluster.replicas` and `cluster.scoring` are the real ones; generation and learning are timers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import mean as mean_of
from statistics import median
from types import SimpleNamespace

import numpy as np

from side_by_side import machine, publish
from cluster import config_files
from cluster.config import load
from cluster.draws import Draw, Draws
from cluster.ledger import Final, Ledger
from cluster.pipeline import DrawsAhead, Pipeline
from cluster.replicas import Replicas
from cluster.scoring import ScoredGroup, score_group
from cluster.sections import LoopConfig
from cluster.timeline import Timeline
from reward_service import RewardConfig, Score
from rollout.completion import Completion
from rollout.prompts import PromptBuilder
from rollout.toy_data import ToyDataConfig, write_toy_data

GROUPS, AT_A_TIME, SECONDS = 16, 8, 0.4
"""Groups of a step; groups that the engine answers at a time; what it needs for a step's groups while it is full."""
SCORES = (Score(0.0, {}, None), Score(1.0, {}, None))


class Stages:
    """A loop whose engine and learner are timers. `answer_seconds` (draw) -> how long the engine is at a group."""

    def __init__(self, folder: Path, loop: LoopConfig, groups: int, at_a_time: int, answer_seconds) -> None:
        self.loop, self.slots, self.answer_seconds = loop, asyncio.Semaphore(at_a_time), answer_seconds
        self.ledger = Ledger(folder / "ledger.jsonl")
        ahead = DrawsAhead(SimpleNamespace(batch=lambda positions: [Draw(p, SimpleNamespace(episode_id=f"e{p}"), None, None, None, None) for p in positions]))
        self.pipeline = Pipeline(loop, groups, self.ledger, ahead, lambda draws: [asyncio.ensure_future(self.answer(draw)) for draw in draws])

    async def answer(self, draw: Draw) -> ScoredGroup:
        async with self.slots:
            await asyncio.sleep(self.answer_seconds())
        return ScoredGroup(draw, (), (), (), None, "medium", scores=SCORES)

    async def run(self, learn_seconds: float) -> list[float]:
        """Seconds of every step."""
        ends = [time.perf_counter()]
        for version in range(self.loop.steps):
            taken = await self.pipeline.take(version)
            await asyncio.sleep(learn_seconds)
            self.ledger.close(version + 1, [Final(g.draw.position, g.draw.episode.episode_id) for g in taken.groups])
            ends.append(time.perf_counter())
        self.pipeline.close()
        return np.diff(ends).tolist()


def efficiency(rounds: int) -> list[dict]:
    """Answers take 0.5 to 1.5 of their mean, as lengths do. The first steps, in which the pipeline fills, do not count."""
    found = []
    for staleness, ratio in itertools.product((0, 1, 2), (0.5, 1.0, 2.0)):
        steps = []
        for number in range(rounds):
            rng = random.Random(number)
            mean = SECONDS * AT_A_TIME / GROUPS

            async def one(folder: str) -> list[float]:
                stages = Stages(Path(folder), LoopConfig(steps=14, max_staleness=staleness), GROUPS, AT_A_TIME, lambda: mean * rng.uniform(0.5, 1.5))
                return await stages.run(SECONDS * ratio)

            with tempfile.TemporaryDirectory() as folder:
                steps += asyncio.run(one(folder))[4:]
        slower = SECONDS * max(1.0, ratio)
        found.append({"max_staleness": staleness, "learning_over_generation": ratio, "step_over_slower": round(median(steps) / slower, 3), "mean": round(mean_of(steps) / slower, 3), "largest": round(max(steps) / slower, 3)})
        print(f"  {found[-1]}", file=sys.stderr, flush=True)
    return found


def controller(rounds: int) -> list[dict]:
    found = []
    for groups in (16, 128, 1024, 4096):
        seconds = []
        for _ in range(rounds):

            async def one(folder: str) -> None:
                await Stages(Path(folder), LoopConfig(steps=8, max_staleness=1), groups, 10**6, lambda: 0.0).run(0.0)

            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                asyncio.run(one(folder))
                seconds.append((time.process_time() - start) / (8 * groups))
        found.append({"groups_a_step": groups} | microseconds(seconds))
        print(f"  {found[-1]}", file=sys.stderr, flush=True)
    return found


def microseconds(seconds: list[float]) -> dict[str, float]:
    return {"microseconds_a_group": round(1e6 * median(seconds), 1), "largest": round(1e6 * max(seconds), 1)}


class Answering:
    """An engine that has all its answers ready."""

    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    async def generate(self, *prompt) -> list[Completion]:
        return self.completions


def engines(rounds: int) -> list[dict]:
    import ray

    toy, found = toy_draw(), []
    text = '<think>It is the red circle, upper left.</think><answer>[{"bbox_2d":[10,20,50,60],"point_2d":[30,40],"negative_point_2d":[70,40]}]</answer>'
    answers = [Completion(np.arange(100, dtype=np.int32), np.zeros(100, np.float32), text, "stop", (("1", 100),), n) for n in range(8)]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    actor = ray.remote(num_cpus=0, max_concurrency=64)(Answering)
    for count in (1, 2, 4, 8):
        actors = [actor.remote(answers) for _ in range(count)]
        replicas = Replicas("engine", actors, kill=None, start=None, join=None, seconds=600.0, restarts=0, note=print, timeline=Timeline(os.devnull))

        ask = lambda number: replicas.call(number, "generate", toy.prompt, 8, None, list(range(8)))
        score = lambda completions: score_group(toy, completions, [9] * 8, RewardConfig(), None)

        async def both(number: int) -> ScoredGroup:
            return await score(await ask(number))

        async def timed(one: Callable[[int], Awaitable]) -> list[float]:
            seconds = []
            await asyncio.gather(*map(one, range(64)))  # actors start, caches fill
            for _ in range(rounds):
                start = time.process_time()
                await asyncio.gather(*map(one, range(256)))
                seconds.append((time.process_time() - start) / 256)
            return seconds

        async def parts() -> dict:
            return microseconds(await timed(both)) | {"calls": microseconds(await timed(ask)), "rewards": microseconds(await timed(lambda _: score(answers)))}

        found.append({"engines": count} | asyncio.run(parts()))
        for each in actors:
            ray.kill(each)
        print(f"  {found[-1]}", file=sys.stderr, flush=True)
    ray.shutdown()
    return found


def toy_draw() -> Draw:
    """A draw of the debug recipe: the toy policy's prompt about a toy video, and the truth."""
    config = config_files.locate_models(load("debug"))
    with tempfile.TemporaryDirectory() as folder:
        write_toy_data(Path(folder) / "toy", ToyDataConfig(train=4, valid_u=0, valid=0), progress=lambda line: None)
        draws = Draws(str(Path(folder) / "toy/train"), PromptBuilder(config.policy.path, config.prompt), config.data, seed=0)
        try:
            return draws.batch([0])[0]
        finally:
            draws.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    record = {"machine": machine(1), "rounds": args.rounds, "efficiency": efficiency(args.rounds), "controller": controller(args.rounds), "engines": engines(args.rounds)}
    publish(record, args.json)


if __name__ == "__main__":
    main()
