"""How a run would go on other numbers of parts: the real `cluster.pipeline` and `cluster.ledger` on a clock that jumps, with costs in place of models.

Engines batch continuously: a decoding step of b sequences takes `step_seconds` + b `sequence_seconds`, and a sequence that ends leaves room for another. Segmenters take one group after the other.
Nothing here knows of modes: what `loop.max_staleness`, `loop.wait_for` and the others do comes from the pipeline itself.
"""

from __future__ import annotations

import asyncio
import selectors
import tempfile
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cluster.draws import Draw
from cluster.ledger import Final, Ledger
from cluster.pipeline import Pipeline
from cluster.scoring import ScoredGroup
from cluster.sections import LoopConfig
from reward_service import Score

SCORES = (Score(0.0, {}, None), Score(1.0, {}, None))


@dataclass(frozen=True)
class Costs:
    """Seconds of the stages. `lengths`: response tokens, from which completions draw theirs."""

    lengths: Sequence[int]
    step_seconds: float
    sequence_seconds: float = 0.0
    prompt_seconds: float = 0.0  # of a group, before its first token
    score_seconds: float = 0.0  # of a group
    learn_seconds: float = 0.0  # of an update, whatever its size
    token_seconds: float = 0.0  # of a response token in an update, on one rank
    sync_seconds: float = 0.0


@dataclass(frozen=True)
class Sizes:
    engines: int = 1
    segmenters: int = 1
    ranks: int = 1
    sequences: int = 256  # at a time in an engine
    groups: int = 16  # of a step
    completions: int = 8  # of a group


@dataclass(frozen=True)
class Forecast:
    """step_seconds: mean over the steps after the first three. The others are shares of the time in which a part was at work, and of groups."""

    step_seconds: float
    engines_busy: float
    segmenters_busy: float
    learner_busy: float
    mean_staleness: float
    dropped: float


def simulate(costs: Costs, sizes: Sizes, loop: LoopConfig, seed: int = 0, live: bool = False) -> Forecast:
    """The run of `loop.steps` updates, of which the first three do not count. `live`: by the machine's clock, in as much time as it tells."""
    with tempfile.TemporaryDirectory() as folder:
        steps = _Run(costs, sizes, loop, seed, Path(folder)).steps()
        return asyncio.run(steps) if live else run_on_a_jumping_clock(steps)


class _Engine:
    """Sequences at a time, the rest waiting; awaken whenever one comes."""

    def __init__(self, costs: Costs, most: int) -> None:
        self.costs, self.most, self.busy = costs, most, 0.0
        self.waiting: deque[list] = deque()  # [tokens left, future]
        self.active: list[list] = []
        self.came = asyncio.Event()
        self.prompts = 0.0
        self.task = asyncio.ensure_future(self._work())

    async def generate(self, lengths: Sequence[int]) -> None:
        self.prompts += self.costs.prompt_seconds
        mine = [[float(n), asyncio.get_running_loop().create_future()] for n in lengths]
        self.waiting.extend(mine)
        self.came.set()
        await asyncio.gather(*(done for _, done in mine))

    async def _work(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            while self.waiting and len(self.active) < self.most:
                self.active.append(self.waiting.popleft())
            if not self.active:
                self.came.clear()
                await self.came.wait()
                continue
            prompts, self.prompts = self.prompts, 0.0
            began, each = clock(), self.costs.step_seconds + len(self.active) * self.costs.sequence_seconds
            if prompts:
                await asyncio.sleep(prompts)
            self.came.clear()
            steps = min(left for left, _ in self.active)
            try:  # until the first one ends, or another comes and there is room for it
                start = clock()
                await asyncio.wait_for(self.came.wait() if len(self.active) < self.most else asyncio.Event().wait(), steps * each)
                steps = (clock() - start) / each
            except asyncio.TimeoutError:
                pass
            self.busy += clock() - began
            for one in self.active:
                one[0] -= steps
                if one[0] < 1e-6 and not one[1].done():
                    one[1].set_result(None)
            self.active = [one for one in self.active if one[0] >= 1e-6]


class _Draws:
    async def take(self, positions: Sequence[int], then: Sequence[int]) -> list[Draw]:
        return [Draw(p, SimpleNamespace(episode_id=""), None, None, None, None) for p in positions]

    def close(self) -> None:
        pass


class _Run:
    def __init__(self, costs: Costs, sizes: Sizes, loop: LoopConfig, seed: int, folder: Path) -> None:
        self.costs, self.sizes, self.loop, self.rng = costs, sizes, loop, np.random.default_rng(seed)
        self.ledger, self.step, self.begun, self.tokens, self.scoring = Ledger(folder / "ledger.jsonl"), 0, {}, {}, 0.0
        self.pipeline = Pipeline(loop, sizes.groups, self.ledger, _Draws(), lambda draws: [asyncio.ensure_future(self.answer(d)) for d in draws])

    async def answer(self, draw: Draw) -> ScoredGroup:
        p, self.begun[draw.position] = draw.position, self.step
        lengths = self.rng.choice(self.costs.lengths, self.sizes.completions)
        self.tokens[p] = int(lengths.sum())
        await self.engines[p % len(self.engines)].generate(lengths)
        async with self.segmenters[p % len(self.segmenters)]:
            await asyncio.sleep(self.costs.score_seconds)
        self.scoring += self.costs.score_seconds
        return ScoredGroup(draw, (), (), (), None, "medium", scores=SCORES)

    async def steps(self) -> Forecast:
        clock, sizes, costs = asyncio.get_running_loop().time, self.sizes, self.costs
        self.engines = [_Engine(costs, sizes.sequences) for _ in range(sizes.engines)]
        self.segmenters = [asyncio.Lock() for _ in range(sizes.segmenters)]
        ends, marks, learning, staleness, dropped = [], [], 0.0, [], 0
        for version in range(self.loop.steps):
            taken = await self.pipeline.take(version)
            tokens = sum(self.tokens[g.draw.position] for g in taken.groups)
            took = costs.learn_seconds + costs.token_seconds * tokens / sizes.ranks + costs.sync_seconds
            await asyncio.sleep(took)
            self.step = version + 1
            self.ledger.close(self.step, [*(Final(g.draw.position, "") for g in taken.groups), *taken.dropped])
            learning += took
            staleness += [version - self.begun[g.draw.position] for g in taken.groups]
            dropped += len(taken.dropped)
            ends.append(clock())
            marks.append((sum(engine.busy for engine in self.engines), self.scoring, learning))
        self.pipeline.close()
        for engine in self.engines:
            engine.task.cancel()
        first = min(2, len(ends) - 1)
        passed, used = ends[-1] - ends[first], np.subtract(marks[-1], marks[first]) if len(ends) > 1 else np.zeros(3)
        steps = max(1, len(ends) - 1 - first)
        share = np.clip(used / max(passed, 1e-12) / (sizes.engines, sizes.segmenters, 1), 0.0, 1.0)
        return Forecast(passed / steps, *share.tolist(), float(np.mean(staleness)), dropped / max(1, dropped + len(staleness)))


class _Jumping(asyncio.SelectorEventLoop):
    """Where every task waits for a time, that time is there at once."""

    def __init__(self) -> None:
        super().__init__(_NoWaiting(self))
        self.now = 0.0

    def time(self) -> float:
        return getattr(self, "now", 0.0)


class _NoWaiting(selectors.DefaultSelector):
    def __init__(self, loop: _Jumping) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            self._loop.now += timeout
        return ready


def run_on_a_jumping_clock(work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` returns. It may wait for times and for its own tasks, and for nothing outside."""
    with asyncio.Runner(loop_factory=_Jumping) as runner:
        return runner.run(work)
