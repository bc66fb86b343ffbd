"""HTFS, the hierarchical text-guided frame sampler of VideoSeg-R1: a frozen vision-language model finds the key segment, then the target frame.

The formulas are the paper's (arXiv 2511.16077, section on HTFS); the questions, the numbers and what happens where an answer cannot
be used are ours, since the paper's appendices are not public: docs/frame-sampler.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor, inf
from pathlib import Path
from typing import Any

from rollout.episodes import DataError, Episode
from rollout.frame_samples import FrameSample, frames_to_show
from rollout.htfs_answers import UNITS, Quantity, read_intervals, read_percents
from rollout.order import uniform_frames

_HALF = Fraction(1, 2)
_UNIT_WORDS = {"seconds": "seconds", "percent": "percent of these frames' time", "frames": "frame numbers"}


@dataclass
class HTFSConfig:
    """Settings of HTFS. The paper's values are not public; these are ours."""

    intervals: int = field(default=5, metadata={"help": "K: replies to each look for the key segment, averaged", "min": 1, "max": 256})
    positions: int = field(default=5, metadata={"help": "M: replies whose positions of the target frame are averaged", "min": 1, "max": 256})
    delta: float = field(default=0.3, metadata={"help": "the key segment is compressed while longer than this share of the video", "above": 0.0, "below": 1.0})
    rounds: int = field(default=3, metadata={"help": "most compressions after the first look", "min": 0, "max": 64})
    look_frames: int = field(default=32, metadata={"help": "frames shown in one look, spread evenly (sampling density)", "min": 1, "max": 1024})
    max_pixels: int = field(default=100352, metadata={"help": "most pixels of a frame as shown; 28x28 are one visual token", "min": 784})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature; 0: all K or M replies are the same", "min": 0.0, "max": 2.0})
    max_response_tokens: int = field(default=128, metadata={"help": "longest reply in tokens", "min": 1})
    unit: str = field(default="seconds", metadata={"help": "how frames are labelled and intervals asked for", "choices": UNITS})
    interval_question: str = field(
        default=(
            "These frames, each after its label, are taken evenly from a video between {start} and {end}. Somebody wants to segment what "
            'this query refers to:\n"{query}"\nIn which single part of this stretch is that decided and can it be seen? '
            'Answer with JSON in {unit} and nothing else: {{"start": …, "end": …}}'
        ),
        metadata={"help": "first template; {query}, {start}, {end} (of the stretch shown) and {unit} are filled in"},
    )
    position_question: str = field(
        default=(
            "These frames, each after its position in percent, are taken evenly from a part of a video. Somebody wants to segment what "
            'this query refers to:\n"{query}"\nAt which position (0 is the first frame, 100 the end) is it seen best: large, sharp, not '
            'hidden, and told apart from everything like it? Answer with JSON and nothing else: {{"percent": …}}'
        ),
        metadata={"help": "second template; {query} is filled in"},
    )

    def __post_init__(self):
        for name in ("interval_question", "position_question"):
            try:
                getattr(self, name).format(query="", start="", end="", unit="")
            except (LookupError, ValueError) as error:
                raise ValueError(f"htfs.{name}: not a template of {{query}}, {{start}}, {{end}} and {{unit}} ({error!r}); double all other braces") from error


@dataclass(frozen=True)
class Look:
    """A question about some frames of a video, each after its label. One reply is wanted for every seed."""

    episode_id: str
    video: Path
    frame_ids: tuple[int, ...]
    labels: tuple[str, ...]
    query: str
    question: str
    seeds: tuple[int, ...]


Ask = Callable[[Sequence[Look]], Sequence[Sequence[str]]]
"""Replies to looks: for each one as many texts as it has seeds."""

Segment = tuple[int, int]  # first frame, and one past the last


class HTFS:
    """The sampler. All episodes of a call go on together, so that `ask` gets the looks of a round at once."""

    def __init__(self, config: HTFSConfig, ask: Ask, model: str, key_frames: int = 4, reference_frames: int = 4, seed: int = 0) -> None:
        """`model` identifies what answers (a fingerprint); `key_frames` and `reference_frames` are how many a prompt shows."""
        self.config, self.ask, self.model, self.seed = config, ask, model, seed
        self.key_frames, self.reference_frames = key_frames, reference_frames

    def depends_on(self, episode: Episode) -> Any:
        return ["htfs", dataclasses.asdict(self.config), self.model, self.key_frames, self.reference_frames, self.seed]

    def sample(self, episodes: Sequence[Episode]) -> list[FrameSample]:
        searches = [self._search(e) for e in episodes]
        samples: list[Any] = [None] * len(episodes)
        replies: dict[int, Any] = dict.fromkeys(range(len(episodes)))
        while replies:
            looks = {}
            for i, texts in replies.items():
                try:
                    looks[i] = searches[i].send(texts)
                except StopIteration as found:
                    samples[i] = found.value
            answered = self.ask(list(looks.values())) if looks else []
            replies = dict(zip(looks, answered, strict=True))
        return samples

    def _search(self, episode: Episode) -> Generator[Look, Sequence[str], FrameSample]:
        """One episode's looks, each answered by its replies; returns the sample."""
        config, video, segment = self.config, episode.num_frames, (0, episode.num_frames)
        if not 0 < episode.fps < inf:
            raise DataError(f"episode {episode.episode_id}: fps is {episode.fps:g}, so its frames have no times; import the data set again")
        fallbacks: Counter[str] = Counter()
        replies: list[tuple[str, ...]] = []
        while _length(segment) > Fraction(str(config.delta)) * video and _length(segment) > 1:
            if len(replies) > config.rounds:
                fallbacks["rounds_used_up"] += 1
                break
            replies.append(tuple((yield self._interval_look(episode, segment, len(replies)))))
            segment = key_segment(replies[-1], segment, episode.fps, config.unit, fallbacks)
        share = _HALF
        if _length(segment) > 1:
            replies.append(tuple((yield self._position_look(episode, segment, len(replies)))))
            share = mean_position(replies[-1], fallbacks)
        start, end = segment
        target = min(start + floor(_length(segment) * share), end - 1)
        shown = frames_to_show(segment, video, self.key_frames, self.reference_frames)
        return FrameSample(target, segment, *shown, dict(fallbacks), tuple(replies))

    def _interval_look(self, episode: Episode, segment: Segment, number: int) -> Look:
        start, end = segment
        label = _labeller(self.config.unit, segment, episode)
        first, last = ("0%", "100%") if self.config.unit == "percent" else (label(start), label(end - 1))
        question = self.config.interval_question.format(query=episode.query, start=first, end=last, unit=_UNIT_WORDS[self.config.unit])
        return self._look(episode, segment, label, question, number, self.config.intervals)

    def _position_look(self, episode: Episode, segment: Segment, number: int) -> Look:
        question = self.config.position_question.format(query=episode.query)
        return self._look(episode, segment, _labeller("percent", segment, episode), question, number, self.config.positions)

    def _look(self, episode: Episode, segment: Segment, label: Callable[[int], str], question: str, number: int, count: int) -> Look:
        frame_ids = tuple(segment[0] + i for i in uniform_frames(_length(segment), self.config.look_frames))
        digest = hashlib.sha256(f"{self.seed}\0{episode.episode_id}\0{number}".encode()).digest()
        first = int.from_bytes(digest[:7])  # below 2^56, so that the following ones are seeds too
        seeds = tuple(range(first, first + count))
        return Look(episode.episode_id, episode.video_path, frame_ids, tuple(map(label, frame_ids)), episode.query, question, seeds)


def key_segment(replies: Sequence[str], segment: Segment, fps: float, unit: str, fallbacks: Counter[str]) -> Segment:
    """The mean of the replies' intervals, in whole frames: from the one nearest to the mean start to the one nearest to the mean end.
    It lies in `segment`, which it is itself where no reply can be used."""
    intervals = [i for i in (_interval(reply, segment, fps, unit, fallbacks) for reply in replies) if i is not None]
    if not intervals:
        fallbacks["no_interval"] += 1
        return segment
    start, end = segment
    first, last = (sum(ends, Fraction()) / len(intervals) for ends in zip(*intervals))
    found = (min(floor(first + _HALF), end - 1), min(floor(last + _HALF) + 1, end))
    if found == segment:
        fallbacks["not_shrunk"] += 1
    return found


def mean_position(replies: Sequence[str], fallbacks: Counter[str]) -> Fraction:
    """The mean of the replies' positions as a share of the segment, 0..1; 1/2 where no reply can be used."""
    shares = []
    for reply in replies:
        found = read_percents(reply)
        if not found:
            fallbacks["position_unread"] += 1
            continue
        percent, was_fraction = found[-1]
        _count(fallbacks, position_several=len(found) > 1, position_fraction=was_fraction, position_clipped=not 0 <= percent <= 100)
        shares.append(min(max(percent, Fraction(0)), Fraction(100)) / 100)
    if not shares:
        fallbacks["no_position"] += 1
        return _HALF
    return sum(shares, Fraction()) / len(shares)


def _interval(reply: str, segment: Segment, fps: float, unit: str, fallbacks: Counter[str]) -> tuple[Fraction, Fraction] | None:
    """A reply's interval on the axis of frame numbers, within [first frame, one past the last]; None if it has none that can be used."""
    found = read_intervals(reply)
    if not found:
        fallbacks["interval_unread"] += 1
        return None
    a, b = (_frame(quantity, segment, fps, unit) for quantity in found[-1])
    start, end = segment
    different = {tuple((q.value, q.unit or unit) for q in pair) for pair in found}  # "0 s" and a bare 0 may be the same
    _count(fallbacks, interval_several=len(different) > 1, interval_reversed=a > b)
    a, b = min(a, b), max(a, b)
    # Half a frame beyond is not beyond: labels are rounded.
    if b < start - _HALF or a > end + _HALF:
        fallbacks["interval_outside"] += 1
        return None
    _count(fallbacks, interval_clipped=a < start - _HALF or b > end + _HALF)
    return min(max(a, Fraction(start)), Fraction(end)), min(max(b, Fraction(start)), Fraction(end))


def _frame(quantity: Quantity, segment: Segment, fps: float, unit: str) -> Fraction:
    unit = quantity.unit or unit
    if unit == "seconds":
        return quantity.value * Fraction(fps)
    if unit == "percent":
        return segment[0] + _length(segment) * quantity.value / 100
    return quantity.value


def _labeller(unit: str, segment: Segment, episode: Episode) -> Callable[[int], str]:
    if unit == "seconds":
        return lambda t: f"{t / episode.fps:.2f}s"
    if unit == "percent":
        return lambda t: f"{100 * (t - segment[0]) / _length(segment):.1f}%"
    return lambda t: f"frame {t}"


def _length(segment: Segment) -> int:
    return segment[1] - segment[0]


def _count(fallbacks: Counter[str], **taken: bool) -> None:
    fallbacks.update(name for name, was in taken.items() if was)
