"""Draws: the episode at each position of a run, with its frames decoded, its prompt built, and its truth as a target.

A draw is a pure function of (data set, settings, seed, position), so a resumed run or a replay sees the same ones. An episode whose
video is broken is replaced by one that follows from the same four, whatever came before and however long decoding took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from reward_service import FrameTarget, RewardConfig, Target
from rollout.decoding import CrashingVideo, Decoders, Frames, SlowVideo
from rollout.dataset import EpisodeDataset
from rollout.episodes import Episode
from rollout.frame_samples import FrameSamples, nearest
from rollout.mixture import Mixture
from rollout.order import ShuffledOrder, substitute_at, target_frame_at, uniform_frames
from rollout.prompts import Prompt, PromptBuilder, PromptTooLong
from segmentation_service.video import FramesInMemory, Video, VideoError, VideoReference

from cluster.answers import Answers, AnswerTooLong, LearnedAnswer, Written, WrittenAnswers
from cluster.config import RunConfig
from cluster.errors import DataError
from cluster.sections import DataConfig, WeightedData

SUBSTITUTES = 20  # tried at one position before the data set counts as unreadable
UNUSABLE = (VideoError, PromptTooLong, AnswerTooLong)  # what costs an episode, not the run


@dataclass(frozen=True)
class Draw:
    """One episode to answer. `frame` is the target frame at its original size: uint8 (H, W, 3); `video` all frames, unread;
    `replaced` the episodes that were to come here and could not be used; `answer` what is learned, in supervised fine-tuning."""

    position: int
    episode: Episode
    prompt: Prompt
    frame: np.ndarray
    video: Video
    target: Target
    replaced: tuple[BrokenEpisode, ...] = ()
    answer: LearnedAnswer | None = None


@dataclass(frozen=True)
class BrokenEpisode:
    """An episode left out for its video (`kind` is unreadable, slow or crashed) or its prompt or answer (too_long); `reason` says more."""

    episode_id: str
    kind: str
    reason: str

    @classmethod
    def of(cls, episode: Episode, error: VideoError | PromptTooLong | AnswerTooLong) -> BrokenEpisode:
        kinds = {SlowVideo: "slow", CrashingVideo: "crashed", PromptTooLong: "too_long", AnswerTooLong: "too_long"}
        kind = next((kind for error_type, kind in kinds.items() if isinstance(error, error_type)), "unreadable")
        return cls(episode.episode_id, kind, str(error))


@dataclass(frozen=True)
class _Asked:
    """A draw whose frames are being decoded: its target frame, and the frames that the prompt shows besides."""

    position: int
    episode: Episode
    target_frame: int
    shown: list[int]
    frames: Future[Frames] | None  # None: the video was too slow before


class Draws:
    """The draws of a data set or a mixture. `train` draws at positions of an endless stream, in random order; `held_out` is a fixed list.

    `slow` holds the videos that took too long, with the limit that they passed: they are not tried again within it. It is all that
    a checkpoint must keep.
    """

    def __init__(
        self,
        path: str | Sequence[WeightedData],
        builder: PromptBuilder,
        data: DataConfig,
        seed: int,
        frame_samples: str | None = None,
        decoders: Decoders | None = None,
        answers: Answers | None = None,
    ) -> None:
        """`frame_samples`: a file of `videoseg sample-frames` that says which frames are shown and which one is the target frame. `answers`: what is
        learned; where they are written, only the episodes that have one are drawn, and an answer may say which frame it is about."""
        sets = [WeightedData(path)] if isinstance(path, str) else path
        self.paths, self.builder, self.data, self.seed = [s.path for s in sets], builder, data, seed
        self.decoders = decoders or Decoders(data.decoders, data.decode_seconds, int(data.frame_cache_gb * 2**30))
        self.slow: dict[str, float] = {}
        self.answers, written = answers, answers and answers.written
        datasets = [EpisodeDataset(path, data.min_target_share, only=written and written.episode_ids) for path in self.paths]
        for path, dataset in zip(self.paths, datasets):
            if not len(dataset):
                lacks, remedy = (f" and an answer in {written.file}", "; and that its episode_id are those of the data set") if written else ("", "")
                raise DataError(f"{path}: no episode has a frame in which its target can be seen{lacks}", f"check data.min_target_share and the data set{remedy}")
        self.episodes = Mixture(datasets, [s.weight for s in sets], seed)
        self.fingerprint, self.sources = self.episodes.fingerprint, [*self.paths]  # its parts, with + between them, and what each is of
        self.samples = None
        if frame_samples is not None:
            self.samples = FrameSamples(frame_samples)
            self.samples.check(self.episodes.project("episode_id", "query").rows())
            self._add_source(self.samples)
        if written:
            written.check(self.episodes.project("episode_id", "num_frames", "annotated_frames").rows(), frames_are_fixed=self.samples is not None)
            self._add_source(written)

    def _add_source(self, source: FrameSamples | WrittenAnswers) -> None:
        self.fingerprint += f"+{source.fingerprint}"
        self.sources.append(source.file)

    @classmethod
    def of_run(cls, config: RunConfig) -> tuple[Draws, Draws]:
        """Training and held-out draws of a run, with one pool of decoders. The held-out ones do not depend on the run's seed."""
        builder = PromptBuilder(config.policy.path, config.prompt)
        data, room = config.data, config.rollout.max_images - 1

        def answers(file: str | None) -> Answers | None:
            if config.run.task != "sft":
                return None
            written = file and WrittenAnswers(file, builder.tokenizer.eos_token)
            return Answers(builder, config.sft.thought, config.reward.weights.negative_point > 0, config.rollout.max_response_tokens, written)

        train = cls(data.train, builder, data, config.run.seed, data.train_frames, answers=answers(config.sft.answers))
        both = train, cls(data.evaluation, builder, data, 0, data.evaluation_frames, train.decoders, answers(config.sft.evaluation_answers))
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

    def close(self) -> None:
        """Ends the decoders, which other draws of the run share."""
        self.decoders.close()

    def check_videos(self, seconds: float) -> None:
        """Looks through as many videos as fit in `seconds`, evenly over the data set, without decoding them, and builds one prompt.

        Broken videos are named on standard error. Raises DataError where they are more than `data.max_broken_share`, or where
        prompt after prompt is too long, PromptError where none can be built: before anything starts.
        """
        until, broken, looked, videos = time.monotonic() + seconds, [], 0, self._videos()
        while (not looked or time.monotonic() < until) and (some := list(islice(videos, 4 * self.data.decoders))):
            asked = [self.decoders.check(video) for video in some]
            broken += [error for future in asked if (error := future.exception())]
            looked += len(some)
        for error in broken:
            if not isinstance(error, VideoError):
                raise error
        if len(broken) > self.data.max_broken_share * looked:
            raise DataError(
                f"{', '.join(self.paths)}: {len(broken)} of {looked} videos cannot be read, the first: {broken[0]}",
                "restore them, or raise data.max_broken_share to train without them; check the data set's root if it is all of them",
            )
        for error in broken:
            print(f"warning: {error}; episodes that need it are left out", file=sys.stderr)
        self.train(0)

    def _videos(self) -> Iterator[Path]:
        """Every video once, in random order."""
        rows, seen = self.episodes.project("video"), set()
        order = ShuffledOrder(np.concatenate([d.group_rows for d in rows.datasets]), seed=0)
        for i in range(len(rows)):
            row = rows.row(order[i])
            if (video := Path(row["root"]) / row["video"]) not in seen:
                seen.add(video)
                yield video

    def train(self, position: int) -> Draw:
        """The draw at a position of the endless stream, in which every epoch of a data set is a new permutation."""
        return self.batch([position])[0]

    def batch(self, positions: Sequence[int]) -> list[Draw]:
        """The draws at `positions`; their frames are decoded side by side.

        An episode with a broken video, or a prompt that is too long, is replaced by a random one. Raises DataError where substitutes are broken again and again.
        """
        asked = [self._ask(p, self.episodes[self.episodes.at(p)]) for p in positions]
        return [self._with_substitutes(first) for first in asked]

    def held_out(self, count: int) -> tuple[list[Draw], list[BrokenEpisode]]:
        """`count` episodes spread evenly over the data set (all of it if it has fewer), always the same; those that cannot be used apart."""
        draws, broken = [], []
        for asked in [self._ask(i, self.episodes[i]) for i in self._spread(count)]:
            try:
                draws.append(self._draw(asked))
            except UNUSABLE as error:
                broken.append(BrokenEpisode.of(asked.episode, error))
        return draws, broken

    def _spread(self, count: int) -> list[int]:
        return np.linspace(0, len(self.episodes) - 1, min(count, len(self.episodes))).round().astype(int).tolist()

    def _with_substitutes(self, first: _Asked) -> Draw:
        replaced: list[BrokenEpisode] = []
        for asked in self._attempts(first):
            try:
                return self._draw(asked, tuple(replaced))
            except UNUSABLE as error:
                replaced.append(BrokenEpisode.of(asked.episode, error))
        raise DataError(f"{', '.join(self.paths)}: {len(replaced)} episodes one after another cannot be used, last: {replaced[-1].reason}", "check that the data set is still there")

    def _attempts(self, first: _Asked) -> Iterator[_Asked]:
        yield first
        for attempt in range(1, SUBSTITUTES + 1):
            yield self._ask(first.position, self.episodes[substitute_at(first.position, attempt, len(self.episodes), self.seed)])

    def _ask(self, position: int, episode: Episode) -> _Asked:
        shown, t = self._frames(position, episode)
        frames = None if self._was_too_slow(episode) else self.decoders.frames(episode.video_path, [*shown, t])
        return _Asked(position, episode, t, shown, frames)

    def _was_too_slow(self, episode: Episode) -> bool:
        return self.slow.get(str(episode.video_path), 0.0) >= self.data.decode_seconds

    def _decoded(self, asked: _Asked) -> dict[int, np.ndarray]:
        """The frames by number. Raises VideoError where the video cannot be read, or is not the one that the episode tells of."""
        path, episode = str(asked.episode.video_path), asked.episode
        # Also where it came in time on this occasion: which draws use a video may depend on what came before, not on what is decoded when.
        if asked.frames is None or self._was_too_slow(episode):
            raise SlowVideo(f"{path}: was not decoded within {self.slow[path]:g} s before")
        try:
            decoded = asked.frames.result()
        except SlowVideo:
            self.slow[path] = self.data.decode_seconds
            raise
        check_media(episode, decoded.num_frames, decoded.by_number[asked.target_frame])
        return decoded.by_number

    def _draw(self, asked: _Asked, replaced: tuple[BrokenEpisode, ...] = ()) -> Draw:
        frames, position, episode, t = self._decoded(asked), asked.position, asked.episode, asked.target_frame
        query, video = episode.query, VideoReference(episode.video_path)
        if self.data.control == "shuffled_queries":
            query = self._random_query(position, episode)
        elif self.data.control == "blank_frames":
            frames = {i: np.full_like(frame, 127) for i, frame in frames.items()}
            video = FramesInMemory([frames[t]] * episode.num_frames)
        prompt, target = self.builder.build(episode.episode_id, query, frames, asked.shown, t, episode.fps), target_of(episode, t)
        answer = self.answers and self.answers.to(query, prompt, target, self._written(position, episode))
        return Draw(position, episode, prompt, frames[t], video, target, replaced, answer)

    def _frames(self, position: int, episode: Episode) -> tuple[list[int], int]:
        """The frames to show, and the target frame."""
        visible, written = episode.target_frames(self.data.min_target_share), self._written(position, episode)
        about = None if written is None else written.target_frame
        if self.samples is None:
            t = target_frame_at(position, visible, self.seed) if about is None else about
            return uniform_frames(episode.num_frames, self.builder.config.reference_frames), t
        sample = self.samples.of(episode)
        if about is not None:
            return sample.shown, about
        t = nearest(sample.target_frame, visible) if self.data.snap_target_frame else sample.target_frame
        if t not in episode.annotated_frames:
            remedy = "set data.snap_target_frame=true to take the nearest frame that can be scored"
            raise DataError(f"episode {episode.episode_id}: its sampled target frame {t} is not annotated", remedy)
        return sample.shown, t

    def _written(self, position: int, episode: Episode) -> Written | None:
        """The answer that is learned at a position, where answers are written."""
        written = self.answers and self.answers.written
        return written and written.at(episode.episode_id, position, self.seed)

    def _random_query(self, position: int, episode: Episode) -> str:
        """The text of a random episode of the same video: it makes sense, and what it means is independent of what was meant.

        Every target of the video has the same chance, the episode's own among them, however many texts ask for it.
        """
        rng, targets = np.random.default_rng([self.seed, position, 2]), self._queries[str(episode.root), episode.video_id]
        texts = targets[int(rng.integers(len(targets)))]
        return texts[int(rng.integers(len(texts)))]

    @cached_property
    def _queries(self) -> dict[tuple[str, str], list[list[str]]]:
        """The texts that ask for each target (a set of objects) of each video, by root and video_id."""
        found: dict = {}
        for row in self.episodes.project("video_id", "query", "objects.object_id").rows():
            targets = found.setdefault((row["root"], row["video_id"]), {})
            targets.setdefault(frozenset(o["object_id"] for o in row["objects"]), []).append(row["query"])
        return {video: list(targets.values()) for video, targets in found.items()}


def check_media(episode: Episode, num_frames: int, frame_HW3: np.ndarray) -> None:
    """Raises VideoError where a video of so many such frames is not the one that the episode tells of."""
    found, expected = (num_frames, *frame_HW3.shape[:2]), (episode.num_frames, episode.height, episode.width)
    if found != expected:
        where = episode.video_path
        raise VideoError(f"{where}: (frames, height, width) are {found}, the episode says {expected}; restore the video or import the data set again")


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
    ignored = {f: [{"size": size, "counts": m.counts} for m in episode.ignore if m.frame == f] or None for f in episode.annotated_frames}
    return Target(
        image_size=(episode.height, episode.width),
        boxes=boxes,
        points=points,
        masks=episode.masks(t),
        frames={f: FrameTarget(masks=[track.get(f) for track in tracks], ignore=ignored[f]) for f in episode.annotated_frames},
        frame=t,
        ignore=ignored.get(t),
    )

