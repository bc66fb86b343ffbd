"""Draws: the episode at each position of a run, with its frames decoded, its prompt built, and its truth as a target.

A draw is a pure function of (data set, settings, seed, position), so a resumed run or a replay sees the same ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from reward_service import FrameTarget, RewardConfig, Target
from rollout.episodes import Episode, fingerprint, read_episodes
from rollout.frame_samples import FrameSamples, nearest
from rollout.frames import check_frames, load_frames
from rollout.order import episode_at, target_frame_at, uniform_frames
from rollout.prompts import Prompt, PromptBuilder
from segmentation_service.video import FramesInMemory, ImageFolder, Video

from cluster.config import RunConfig
from cluster.errors import DataError
from cluster.sections import DataConfig


@dataclass(frozen=True)
class Draw:
    """One episode to answer. `frame` is the target frame at its original size: uint8 (H, W, 3); `video` all frames, unread."""

    position: int
    episode: Episode
    prompt: Prompt
    frame: np.ndarray
    video: Video
    target: Target


class Draws:
    """The draws of one data set. `train` draws at random positions of an endless stream; `held_out` is a fixed list."""

    def __init__(self, path: str, builder: PromptBuilder, data: DataConfig, seed: int, frame_samples: str | None = None) -> None:
        """`frame_samples`: a file of `videoseg sample-frames` that says which frames are shown and which one is the target frame."""
        self.path, self.builder, self.data, self.seed = path, builder, data, seed
        self.episodes = [e for e in read_episodes(path) if e.target_frames(data.min_target_share)]
        self.fingerprint = fingerprint(path)
        if not self.episodes:
            raise DataError(f"{path}: no episode has a frame in which its target can be seen", "check data.min_target_share and the data set")
        self.samples = None
        if frame_samples is not None:
            self.samples = FrameSamples(frame_samples)
            self.samples.check(self.episodes)
            self.fingerprint += f"+{self.samples.fingerprint}"

    @classmethod
    def of_run(cls, config: RunConfig) -> tuple[Draws, Draws]:
        """Training and held-out draws of a run. The held-out ones do not depend on the run's seed."""
        builder = PromptBuilder(config.policy.path, config.prompt)
        data, room = config.data, config.rollout.max_images - 1
        both = cls(data.train, builder, data, config.run.seed, data.train_frames), cls(data.evaluation, builder, data, 0, data.evaluation_frames)
        for samples in (draws.samples for draws in both if draws.samples):
            if samples.most_shown > room:
                remedy = f"set rollout.max_images={samples.most_shown + 1}, or sample again with fewer key_frames and reference_frames"
                raise DataError(f"{samples.file} shows up to {samples.most_shown} frames besides the target frame, rollout.max_images leaves {room}", remedy)
        for draws in both:
            draws.check_masks(config.reward)
        return both

    def check_masks(self, reward: RewardConfig) -> None:
        """Raises DataError where the reward needs masks and an episode has none."""
        without = sum(not e.has_masks for e in self.episodes)
        if without and (reward.weights.negative_point or reward.needs_predicted_masks or reward.needs_video_masks):
            remedy = "set reward.weights.negative_point=0 and use no term on masks, or train on other data"
            raise DataError(f"{self.path}: {without} episodes have boxes and points but no masks, and the reward needs masks", remedy)

    def check_frames(self, seconds: float) -> None:
        """Looks at the frame files of as many videos as fit in `seconds`, evenly over the data set, and builds one prompt.

        Raises the first VideoError or PromptError: before anything starts.
        """
        until = time.monotonic() + seconds
        self.train(0)
        videos = list({e.video_path: None for e in self.episodes})
        for i in range(len(videos)):
            check_frames(videos[episode_at(i, len(videos), seed=0)])
            if time.monotonic() > until:
                return

    def train(self, position: int) -> Draw:
        """The draw at a position of the endless stream, a new permutation every epoch."""
        episode = self.episodes[episode_at(position, len(self.episodes), self.seed)]
        return self._draw(position, episode)

    def held_out(self, count: int) -> list[Draw]:
        """`count` episodes spread evenly over the data set (all of it if it has fewer), always the same."""
        chosen = np.linspace(0, len(self.episodes) - 1, min(count, len(self.episodes))).round().astype(int)
        return [self._draw(int(i), self.episodes[i]) for i in chosen]

    def _draw(self, position: int, episode: Episode) -> Draw:
        shown, t = self._frames(position, episode)
        frames = load_frames(episode.video_path, [*shown, t])
        if (found := frames[t].shape[:2]) != (episode.height, episode.width):
            raise DataError(f"{episode.video_path}: frames are {found}, the episode says {(episode.height, episode.width)}", "import the data set again")
        query = episode.query
        video = FramesInMemory([frames[t]]) if episode.media == "image" else ImageFolder(episode.video_path.absolute())
        if self.data.control == "shuffled_queries":
            query = self._foreign_query(position, episode)
        elif self.data.control == "blank_frames":
            frames = {i: np.full_like(frame, 127) for i, frame in frames.items()}
            video = FramesInMemory([frames[t]] * episode.num_frames)
        prompt = self.builder.build(episode.episode_id, query, frames, shown, t, episode.fps)
        return Draw(position, episode, prompt, frames[t], video, target_of(episode, t))

    def _frames(self, position: int, episode: Episode) -> tuple[list[int], int]:
        """The frames to show, and the target frame."""
        visible = episode.target_frames(self.data.min_target_share)
        if self.samples is None:
            return uniform_frames(episode.num_frames, self.builder.config.reference_frames), target_frame_at(position, visible, self.seed)
        sample = self.samples.of(episode)
        t = nearest(sample.target_frame, visible) if self.data.snap_target_frame else sample.target_frame
        if t not in episode.annotated_frames:
            remedy = "set data.snap_target_frame=true to take the nearest frame that can be scored"
            raise DataError(f"episode {episode.episode_id}: its sampled target frame {t} is not annotated", remedy)
        return sample.shown, t

    def _foreign_query(self, position: int, episode: Episode) -> str:
        rng = np.random.default_rng([self.seed, position, 2])
        while True:
            other = self.episodes[int(rng.integers(len(self.episodes)))]
            if other.video_id != episode.video_id or len({e.video_id for e in self.episodes}) == 1:
                return other.query


def target_of(episode: Episode, t: int) -> Target:
    """The truth about the targets that can be seen on frame t: there, and their masks on all annotated frames.

    Where the episode has boxes and points alone, the target has no masks, and a term that needs them says so.
    """
    visible, size = episode.visible(t), [episode.height, episode.width]
    boxes, points = [list(a.box) for a in visible], [[list(a.point)] for a in visible]
    if not episode.has_masks:
        return Target((episode.height, episode.width), boxes, points)
    tracks = [{a.frame: {"size": size, "counts": a.counts} for a in o.annotations} for o in episode.objects]
    tracks = [track for track in tracks if t in track]
    return Target(
        image_size=(episode.height, episode.width),
        boxes=boxes,
        points=points,
        masks=episode.masks(t),
        frames={f: FrameTarget(masks=[track.get(f) for track in tracks]) for f in episode.annotated_frames},
        frame=t,
    )

