"""The segmenter prompted with the truth: how well it finds each target of a data set from the target's own box and point."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from cluster.draws import check_media
from reward_service.measures import jaccard
from rollout.decoding import Decoders
from rollout.episodes import Annotation, Episode, TargetObject
from rollout.order import uniform_frames
from segmentation_service.segmenter import ObjectPrompt, Segmenter
from segmentation_service.video import VideoError

EPISODES_AT_ONCE = 256  # those among them that are about one video share its frames
FRAMES_AT_ONCE = 8
REQUESTS_AHEAD = 8


@dataclass(frozen=True)
class Found:
    """What the segmenter found of an episode's targets: for each that has masks {frame: IoU}; or why its video cannot be read."""

    ious: dict[str, dict[int, float]] = field(default_factory=dict)
    broken: str | None = None

    @property
    def means(self) -> dict[str, float]:
        """For each target the mean IoU over its frames."""
        return {object_id: float(np.mean(list(by_frame.values()))) for object_id, by_frame in self.ious.items()}


class Oracle:
    """Asks the segmenter for every target on each of its annotated frames, or on at most `frames` of them, spread evenly.

    The prompt is that of a right answer, box and point. A frame is encoded once for all the queries about its video that are looked
    at together. Pixels that the episode ignores count in neither mask.
    """

    def __init__(self, segmenter: Segmenter, decoders: Decoders, frames: int | None = None) -> None:
        self.segmenter, self.decoders, self.frames = segmenter, decoders, frames

    def look(self, episodes: Sequence[Episode]) -> list[Found]:
        """What is found of each episode; of one without public masks or without a target, nothing."""
        videos: dict[tuple, _Video] = {}
        asked: list[tuple[_Video, dict[str, list[Annotation]]]] = []
        for episode in episodes:
            video = videos.setdefault((episode.video_path, episode.num_frames, episode.height, episode.width, episode.ignore), _Video(episode))
            chosen = {o.object_id: annotations for o in episode.objects if (annotations := self._chosen(o))}
            asked.append((video, chosen))
            for annotation in (a for annotations in chosen.values() for a in annotations):
                video.asked.setdefault(annotation.frame, {})[annotation] = None
        for video, frames in self._decoded(list(videos.values())):
            for t, frame_HW3 in frames.items():
                video.ious |= self._ious(video.episode, t, frame_HW3, list(video.asked[t]))
        return [video.found(chosen) for video, chosen in asked]

    def _chosen(self, target: TargetObject) -> list[Annotation]:
        with_masks = [a for a in target.annotations if a.counts is not None]
        if self.frames is None or len(with_masks) <= self.frames:
            return with_masks
        return [with_masks[i] for i in uniform_frames(len(with_masks), self.frames)]

    def _decoded(self, videos: Sequence[_Video]) -> Iterator[tuple[_Video, dict[int, np.ndarray]]]:
        """The frames that are asked for, some at a time, decoded ahead. A video that cannot be read is marked, and the rest of it left out."""
        some = ((v, numbers[i : i + FRAMES_AT_ONCE]) for v in videos for numbers in [sorted(v.asked)] for i in range(0, len(numbers), FRAMES_AT_ONCE))
        requests = ((v, self.decoders.frames(v.episode.video_path, numbers)) for v, numbers in some if v.broken is None)
        for video, frames in _ahead(requests, REQUESTS_AHEAD):
            try:
                decoded = frames.result()
                for frame_HW3 in decoded.by_number.values():
                    check_media(video.episode, decoded.num_frames, frame_HW3)
            except VideoError as error:
                video.broken = str(error)
            else:
                yield video, decoded.by_number

    def _ious(self, episode: Episode, t: int, frame_HW3: np.ndarray, annotations: Sequence[Annotation]) -> dict[Annotation, float]:
        prompts = [ObjectPrompt(a.box, (a.point,), (1,)) for a in annotations]
        (found_NHW,) = self.segmenter.segment_frame(frame_HW3, [prompts])
        true_NHW = np.stack([episode.decoded(a) for a in annotations])
        ious = jaccard(found_NHW, true_NHW, np.broadcast_to(episode.ignored(t), true_NHW.shape))
        return dict(zip(annotations, ious.round(6).tolist()))


@dataclass
class _Video:
    """A video, an episode about it, what is asked on each of its frames (as keys, in order), and what came of it."""

    episode: Episode
    asked: dict[int, dict[Annotation, None]] = field(default_factory=dict)
    ious: dict[Annotation, float] = field(default_factory=dict)
    broken: str | None = None

    def found(self, chosen: dict[str, list[Annotation]]) -> Found:
        """What was found of these targets."""
        if self.broken and chosen:
            return Found(broken=self.broken)
        return Found({object_id: {a.frame: self.ious[a] for a in annotations} for object_id, annotations in chosen.items()})


def _ahead(requests: Iterable, count: int) -> Iterator:
    """The same, each made while up to `count` others wait to be used."""
    waiting: deque = deque()
    for request in requests:
        waiting.append(request)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


class Record:
    """What was found, in a JSON-lines file, an episode a line in the order of the data. A line cut short by a crash is dropped."""

    def __init__(self, file: Path) -> None:
        file.touch()
        self._file = open(file, "r+b")
        self._file.truncate(sum(len(line) for line in self._file if line.endswith(b"\n")))
        self._file.seek(0)

    def read(self, count: int) -> list[Found]:
        """The next `count` episodes' findings, or as many as there are."""
        lines = map(json.loads, islice(iter(self._file.readline, b""), count))
        return [Found({o: {int(t): iou for t, iou in by_frame.items()} for o, by_frame in line["iou"].items()}, line["broken"]) for line in lines]

    def add(self, episodes: Sequence[Episode], found: Sequence[Found]) -> None:
        """Once all that is there was read."""
        for episode, f in zip(episodes, found, strict=True):
            self._file.write(json.dumps({"episode_id": episode.episode_id, "iou": f.ious, "broken": f.broken}).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def look_at(episodes: Iterable[Episode], oracle: Oracle, record: Record | None = None) -> Iterator[tuple[Episode, Found]]:
    """Each episode with what is found of it, in their order. Those in the record are not looked at again, the others are added to it."""
    episodes = iter(episodes)
    while some := list(islice(episodes, EPISODES_AT_ONCE)):
        found = record.read(len(some)) if record else []
        if rest := some[len(found) :]:
            found += (new := oracle.look(rest))
            if record:
                record.add(rest, new)
        yield from zip(some, found)
