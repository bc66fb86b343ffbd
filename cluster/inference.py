"""Inference: queries about videos in; a policy's answers and their masks, frame by frame, out.

A query about a video is an `Episode` whose truth need not be known, so that evaluations can ask in the same way. `answers` puts any number of
them through vLLM together; `masks` and `track` take all answers about one frame of a video, which is encoded once, and the video read once
for all of them. Files are the business of `cluster.segment_output`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reward_service import Answer, parse_answer, think_text
from rollout.completion import Completion
from rollout.engine import RolloutEngine
from rollout.episodes import Episode
from rollout.frame_samplers import Baseline, FrameSampler
from rollout.frame_samples import FrameSample
from rollout.prompts import Prompt, PromptBuilder, PromptTooLong, check_query
from segmentation_service.propagation import Progress
from segmentation_service.segmenter import Segmenter
from segmentation_service.video import Video, VideoError, VideoReference, open_video, read_frame, read_frames

from cluster.config import RunConfig
from cluster.errors import UserError
from cluster.policies import Policy
from cluster.scoring import object_prompts

FOLDER_FPS = 24.0
"""Of a folder of images, which does not tell."""
IN_FLIGHT = 32  # prompts whose frames are in memory

MASKED = ("ok", "empty", "no_mask")
"""The statuses of answers that say what is to be seen, if only that nothing is."""


@dataclass(frozen=True)
class Answered:
    """What the policy said to one query, and about which frames it was asked.

    status: `ok`; `empty`: it says that nothing fits the query; `no_mask` (only once masks were made): no object that it names covers a
    pixel; `unparsable`: no object can be read from it; `too_long`: the prompt is, so nothing was asked; `unreadable`: the video's frames are.
    `error` says more about the last two. answer: in pixels of the original frame. seconds: by stage.
    """

    episode: Episode
    sample: FrameSample | None
    status: str
    answer: Answer | None = None
    completion: Completion | None = None
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def reasoning(self) -> str:
        return "" if self.completion is None else think_text(self.completion.text).strip()


@dataclass(frozen=True)
class Segmentation:
    """One answer with its masks. `on_target`: bool (objects, H, W) on the target frame, `answered.sample.target_frame`."""

    answered: Answered
    on_target: np.ndarray
    model: Inference = field(repr=False)

    def masks(self, progress: Progress | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(frame, bool (objects, H, W)) for every frame, as they are computed: the target frame, those after it in rising order, those before
        it in falling order. None is kept."""
        video, target = VideoReference(self.answered.episode.video_path), self.answered.sample.target_frame
        return ((t, masks) for t, _, masks in self.model.track(video, target, [self.on_target], progress=progress))


class Inference:
    """The parts, loaded: use it as a context manager. On a GPU where there is one, else on the CPU; `policy.settings` are resolved.

    The policy runs in vLLM's own process, driven by an event loop in a thread, so that it answers the next queries while masks are
    made here. Not thread-safe. asks=False: the policy is not loaded, and there are masks alone.
    """

    def __init__(self, policy: Policy, asks: bool = True) -> None:
        self.policy, self.settings, self._asks = policy, policy.settings, asks
        self._open = ExitStack()

    def __enter__(self) -> Inference:
        settings = self.settings
        with ExitStack() as opening:
            if self._asks:
                self._load_policy(opening)
            if settings.cluster.device == "cpu":
                opening.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(settings.segmentation.cpus_per_replica)
            s = settings.segmentation  # after vLLM, which forks: its process should not inherit networks
            self.segmenter = Segmenter(s.checkpoint, s.backend, s.device, s.dtype, s.max_prompts_per_batch, s.propagation, s.model_config)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def _load_policy(self, opening: ExitStack) -> None:
        settings, path = self.settings, opening.enter_context(self.policy.loadable())
        self.builder = PromptBuilder(path, settings.prompt)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="policy", daemon=True)
        thread.start()
        opening.callback(self._loop.close)
        opening.callback(thread.join)
        opening.callback(lambda: self._loop.call_soon_threadsafe(self._loop.stop))
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._engine = RolloutEngine(path, settings.rollout, dtype=settings.policy.dtype, device=settings.cluster.device, seed=settings.run.seed)
        opening.callback(lambda: self._wait(self._engine.shutdown(orderly=True)))
        self._wait(self._engine.ready())

    def segment(self, video: str | Path, query: str, sampler: FrameSampler | None = None, fps: float = FOLDER_FPS) -> Segmentation:
        """One query about one video; the sampler chooses the frames (None: `middle`). Raises VideoError where the video cannot be read,
        PromptError for a query that holds a media token, UserError where the settings have nothing to track with."""
        episode = query_episode(video, query, fps)
        check_tracking(self.settings, [episode])
        (sample,) = (sampler or default_sampler(self.settings)).sample([episode])
        (answered,) = self.answers([(episode, sample)])
        if answered.status == "unreadable":
            raise VideoError(answered.error)
        on_target = self.masks(VideoReference(video), sample.target_frame, [answered.answer])[0] if answered.status in MASKED else np.zeros((0, episode.height, episode.width), bool)
        status = "no_mask" if answered.status == "ok" and not on_target.any() else answered.status
        return Segmentation(replace(answered, status=status), on_target, self)

    def answers(self, asked: Iterable[tuple[Episode, FrameSample]]) -> Iterator[Answered]:
        """One greedy answer to each, in their order; later ones are being answered meanwhile. Frames are read when their turn comes."""
        waiting = [asyncio.run_coroutine_threadsafe(self._answer(episode, sample), self._loop) for episode, sample in asked]
        try:
            for answer in waiting:
                yield answer.result()
        finally:
            for answer in waiting:
                answer.cancel()

    def masks(self, video: Video, target_frame: int, answers: Sequence[Answer]) -> list[np.ndarray]:
        """Masks of each answer's objects on the frame that all of them are about: bool (objects, H, W). Raises VideoError."""
        return self.segmenter.segment_frame(read_frame(video, target_frame), [object_prompts(answer) for answer in answers])

    def track(
        self, video: Video, target_frame: int, masks: Sequence[np.ndarray], frames: Collection[int] | None = None, progress: Progress | None = None
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(frame, number of the answer, bool (objects, H, W)) as `Propagator.propagate` yields them, from the masks on the target frame."""
        if len(video) == 1:
            return ((0, i, masks_NHW) for i, masks_NHW in enumerate(masks))
        return self.segmenter.propagator.propagate(video, target_frame, masks, frames, progress)

    async def _answer(self, episode: Episode, sample: FrameSample) -> Answered:
        async with self._slots:
            start = time.perf_counter()
            try:
                prompt = await asyncio.to_thread(self._prompt, episode, sample)
            except (VideoError, PromptTooLong) as error:
                return Answered(episode, sample, "too_long" if isinstance(error, PromptTooLong) else "unreadable", error=str(error))
            read = time.perf_counter()
            (completion,) = await self._engine.generate(prompt, 1, self.settings.rollout.sampling().greedy())
            return read_answer(episode, sample, prompt, completion, {"read": read - start, "policy": time.perf_counter() - read})

    def _prompt(self, episode: Episode, sample: FrameSample) -> Prompt:
        frames = read_frames(episode.video_path, [*sample.shown, sample.target_frame])
        return self.builder.build(episode.episode_id, episode.query, frames, sample.shown, sample.target_frame, episode.fps)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def read_answer(episode: Episode, sample: FrameSample, prompt: Prompt, completion: Completion, seconds: dict[str, float]) -> Answered:
    """The completion's answer in pixels of the original frame. What can be salvaged from a malformed one counts, as in `parse_answer`."""
    answer = parse_answer(completion.text).to_frame(prompt.units, prompt.policy_hw, prompt.frame_hw)
    status = "ok" if answer.objects else "empty" if answer.strict and not answer.n_items else "unparsable"
    return Answered(episode, sample, status, answer, completion, seconds=seconds)


def query_episode(video: str | Path, query: str, fps: float = FOLDER_FPS) -> Episode:
    """A query about a video as an episode whose truth nobody tells; `fps` counts where the video does not tell it. One frame is decoded.
    Raises VideoError where it cannot be, PromptError for a query that holds a media token."""
    path = Path(video).expanduser().absolute()
    name = f"{path.name}: {query[:60]}"
    check_query(name, query)
    opened = open_video(path)
    height, width = read_frame(opened, len(opened) // 2).shape[:2]
    return Episode(
        episode_id=name,
        source="query",
        split="",
        video_id=path.stem,
        video=str(path),
        height=height,
        width=width,
        num_frames=len(opened),
        fps=getattr(opened, "fps", None) or fps,
        query=query,
        difficulty=None,
        annotated_frames=(),
        objects=(),
    )


def default_sampler(settings: RunConfig, name: str = "middle") -> FrameSampler:
    """`middle`, `first` or `oracle`: the target frame; besides it as many frames as in training, evenly over the video."""
    return Baseline(name, [], settings.prompt.reference_frames)


def check_tracking(settings: RunConfig, episodes: Iterable[Episode] | None = None) -> None:
    """Raises UserError where masks would have to be carried through a video (None: through whatever videos come) and nothing is configured
    that does it."""
    if settings.segmentation.propagation.checkpoint is None and (episodes is None or any(e.num_frames > 1 for e in episodes)):
        raise UserError(
            "segmentation.propagation.checkpoint is null, so nothing carries masks from the target frame to the others",
            "set it to weights such as XMem.pth, or set segmentation.propagation.method=sam2 and segmentation.propagation.checkpoint=facebook/sam2.1-hiera-large",
        )
