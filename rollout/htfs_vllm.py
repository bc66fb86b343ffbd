"""The frozen vision-language model behind HTFS: looks become prompts, one vLLM engine answers them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from rollout.config import RolloutConfig, SamplingConfig
from rollout.engine import RolloutEngine
from rollout.htfs import HTFSConfig, Look
from rollout.prompts import IMAGE, ImageChat, check_query, resize
from segmentation_service.video import read_frames

_IN_FLIGHT = 64  # looks whose frames are in memory


@dataclass(frozen=True)
class LookPrompt:
    """What `RolloutEngine.generate` needs of a prompt."""

    episode_id: str
    token_ids: np.ndarray
    vllm_token_ids: tuple[int, ...]
    images: tuple[np.ndarray, ...]


class FrozenModel:
    """Answers looks (`rollout.htfs.Ask`). vLLM starts with the first one. Only the frames that a look shows are read."""

    def __init__(self, folder: str, config: HTFSConfig, engine: RolloutConfig | None = None, *, dtype: str = "auto", device: str = "auto") -> None:
        engine = engine or RolloutConfig()
        self.config = config
        self._engine = RolloutEngine(folder, replace(engine, max_images=max(engine.max_images, config.look_frames)), dtype=dtype, device=device)
        self._chat: ImageChat | None = None
        self._runner = asyncio.Runner()

    def __call__(self, looks: Sequence[Look]) -> list[list[str]]:
        """Raises PromptRejected, naming the setting, where a look does not fit the engine."""
        return self._runner.run(self._answer_all(looks))

    def close(self) -> None:
        self._runner.run(self._engine.shutdown())
        self._runner.close()

    async def _answer_all(self, looks: Sequence[Look]) -> list[list[str]]:
        await self._engine.ready()
        self._chat = self._chat or ImageChat(self._engine.model)
        slots = asyncio.Semaphore(_IN_FLIGHT)
        sampling = SamplingConfig(temperature=self.config.temperature, max_response_tokens=self.config.max_response_tokens)

        async def answer(look: Look) -> list[str]:
            async with slots:
                images = await asyncio.to_thread(read_images, look, self.config.max_pixels, self._chat.step)
                completions = await self._engine.generate(look_prompt(self._chat, look, images), len(look.seeds), sampling, look.seeds)
                return [completion.text for completion in completions]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(look)) for look in looks]
        except* Exception as errors:
            first = errors.exceptions[0]
        else:
            return [task.result() for task in tasks]
        raise first


def look_prompt(chat: ImageChat, look: Look, images: Sequence[np.ndarray]) -> LookPrompt:
    """The look as the model sees it: label and image of each frame, then the question. Raises PromptError if the query holds a media token."""
    check_query(look.episode_id, look.query)
    text = chat.chat("", "".join(f"{label}: {IMAGE}" for label in look.labels) + "\n" + look.question)
    plan = chat.plan_chat(text, [image.shape[:2] for image in images])
    return LookPrompt(look.episode_id, plan.token_ids, plan.vllm_token_ids, tuple(images))


def read_images(look: Look, max_pixels: int, step: int) -> list[np.ndarray]:
    """The look's frames, and no others are read, reduced: uint8 (H, W, 3)."""
    frames = read_frames(look.video, look.frame_ids)
    return [resize(frames[t], size_within(frames[t].shape[:2], max_pixels, step)) for t in look.frame_ids]


def size_within(size_hw: tuple[int, int], max_pixels: int, step: int) -> tuple[int, int]:
    """Height and width in multiples of `step`, near the proportions of `size_hw`, not larger and of at most `max_pixels` in all (but
    one step on each axis at least)."""
    height, width = size_hw
    scale = min(1.0, sqrt(max_pixels / (height * width)))
    return max(step, int(height * scale) // step * step), max(step, int(width * scale) // step * step)
