"""The loop's pipeline with stages of known cost: how close a step comes to the slower of generation and learning, and what the controller itself costs.

    videoseg bench pipeline --json OUT        (or python benchmarks/pipeline.py --json OUT)

    efficiency  an engine that answers so many groups at a time, each in a random time, and a learner that takes a fixed time; what a step takes over the slower
                of the two, for each `loop.max_staleness` and for learners that are faster, as fast and slower than the engine. Generation is counted as what a full
                engine needs for a step's groups; alone, a step takes it longer, since the engine runs empty at its end
    controller  seconds of CPU a group where answers and updates take no time: drawing, beginning, handing out, the ledger on disk

`cluster.pipeline` and `cluster.ledger` are the real ones; generation and learning are timers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean as mean_of
from statistics import median
from types import SimpleNamespace

import numpy as np

from side_by_side import machine, publish
from cluster.draws import Draw
from cluster.ledger import Final, Ledger
from cluster.pipeline import DrawsAhead, Pipeline
from cluster.scoring import ScoredGroup
from cluster.sections import LoopConfig
from reward_service import Score

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
    for groups in (16, 128, 1024):
        seconds = []
        for _ in range(rounds):

            async def one(folder: str) -> None:
                await Stages(Path(folder), LoopConfig(steps=20, max_staleness=1), groups, 10**6, lambda: 0.0).run(0.0)

            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                asyncio.run(one(folder))
                seconds.append((time.process_time() - start) / (20 * groups))
        found.append({"groups_a_step": groups, "microseconds_a_group": round(1e6 * median(seconds), 1), "largest": round(1e6 * max(seconds), 1)})
        print(f"  {found[-1]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    publish({"machine": machine(1), "rounds": args.rounds, "efficiency": efficiency(args.rounds), "controller": controller(args.rounds)}, args.json)


if __name__ == "__main__":
    main()
