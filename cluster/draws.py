"""Draws: the episode at each position of a run, with its frames decoded, its prompt built, and its truth as a target.

A draw is a pure function of (data set, settings, seed, position), so a resumed run or a replay sees the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from reward_service import FrameTarget, RewardConfig, Target
from rollout.dataset import EpisodeDataset
from rollout.episodes import Episode
from rollout.frame_samples import FrameSamples, nearest
from rollout.frames import check_frames, load_frames
from rollout.mixture import Mixture
from rollout.order import ShuffledOrder, target_frame_at, uniform_frames
from rollout.prompts import Prompt, PromptBuilder
from segmentation_service.video import FramesInMemory, ImageFolder, Video

from cluster.config import RunConfig
from cluster.errors import DataError
from cluster.sections import DataConfig, WeightedData


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
    """The draws of a data set or a mixture. `train` draws at positions of an endless stream, in random order; `held_out` is a fixed list."""

    def __init__(self, path: str | Sequence[WeightedData], builder: PromptBuilder, data: DataConfig, seed: int, frame_samples: str | None = None) -> None:
        """`frame_samples`: a file of `videoseg sample-frames` that says which frames are shown and which one is the target frame."""
        sets = [WeightedData(path)] if isinstance(path, str) else path
        self.paths, self.builder, self.data, self.seed = [s.path for s in sets], builder, data, seed
        datasets = [EpisodeDataset(path, data.min_target_share) for path in self.paths]
        for path, dataset in zip(self.paths, datasets):
            if not len(dataset):
                raise DataError(f"{path}: no episode has a frame in which its target can be seen", "check data.min_target_share and the data set")
        self.episodes = Mixture(datasets, [s.weight for s in sets], seed)
        self.fingerprint = self.episodes.fingerprint
        self.samples = None
        if frame_samples is not None:
            self.samples = FrameSamples(frame_samples)
            self.samples.check(self.episodes.project("episode_id", "query").rows())
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
        """Raises DataError where the reward needs masks and one of up to 256 episodes, spread evenly, has none."""
        if not (reward.weights.negative_point or reward.needs_predicted_masks or reward.needs_video_masks):
            return
        looked_at = self._spread(256)
        without = sum(not self.episodes[i].has_masks for i in looked_at)
        if without:
            remedy = "set reward.weights.negative_point=0 and use no term on masks, or train on other data"
            found = f"{without} of {len(looked_at)} episodes looked at have boxes and points but no masks, and the reward needs masks"
            raise DataError(f"{', '.join(self.paths)}: {found}", remedy)

    def check_frames(self, seconds: float) -> None:
        """Looks at the frame files of as many videos as fit in `seconds`, evenly over the data set, and builds one prompt.

        Raises the first VideoError or PromptError: before anything starts.
        """
        until = time.monotonic() + seconds
        self.train(0)
        videos, seen = self.episodes.project("video"), set()
        order = ShuffledOrder(np.concatenate([d.group_rows for d in videos.datasets]), seed=0)
        for i in range(len(videos)):
            row = videos.row(order[i])
            if (video := Path(row["root"]) / row["video"]) not in seen:
                check_frames(video)
                seen.add(video)
            if time.monotonic() > until:
                return

    def train(self, position: int) -> Draw:
        """The draw at a position of the endless stream, in which every epoch of a data set is a new permutation."""
        return self._draw(position, self.episodes[self.episodes.at(position)])

    def held_out(self, count: int) -> list[Draw]:
        """`count` episodes spread evenly over the data set (all of it if it has fewer), always the same."""
        return [self._draw(i, self.episodes[i]) for i in self._spread(count)]

    def _spread(self, count: int) -> list[int]:
        return np.linspace(0, len(self.episodes) - 1, min(count, len(self.episodes))).round().astype(int).tolist()

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
        rng, queries = np.random.default_rng([self.seed, position, 2]), self._queries
        while True:
            other = queries.row(int(rng.integers(len(queries))))
            if other["video_id"] != episode.video_id or self._one_video:
                return other["query"]

    @cached_property
    def _queries(self) -> Mixture:
        return self.episodes.project("video_id", "query")

    @cached_property
    def _one_video(self) -> bool:
        ids = (row["video_id"] for row in self._queries.rows())
        first = next(ids)
        return all(i == first for i in ids)


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

