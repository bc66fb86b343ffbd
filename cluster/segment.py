"""`videoseg segment`: queries about videos, answered and segmented into folders; whatever is complete there is not done again."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from rollout.episodes import Episode
from rollout.frame_samplers import FrameSampler
from rollout.frame_samples import FrameSample
from segmentation_service.video import VideoError, is_image, open_video

from cluster.errors import SomeWithoutMask, UserError
from cluster.inference import FOLDER_FPS, MASKED, Answered, Inference, check_tracking, default_sampler, query_episode
from cluster.policies import Policy
from cluster.progress import duration
from cluster.sample_frames import SampleFramesConfig, fallbacks_line, load_settings, sampler_for
from cluster.segment_output import Outputs, QueryFolder, answer_record, finished, folder_name, write_without_masks

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv")
BASELINES = ("middle", "first")
TOGETHER = 16  # queries about one video whose masks go through it together
NOTE_SECONDS = 10.0


@dataclass(frozen=True)
class Query:
    """One query about one video, and the folder that it gets."""

    video: Path
    text: str
    place: Path


@dataclass(frozen=True)
class Sampling:
    """Who chooses frames: one of BASELINES, or `htfs` under `settings`."""

    name: str = "middle"
    settings: SampleFramesConfig | None = None

    @classmethod
    def of(cls, given: str, overrides: Sequence[str] = ()) -> Sampling:
        """`given`: middle, first, htfs, or a YAML file of settings as of `videoseg sample-frames`; `overrides` of these. Raises UserError."""
        if given in BASELINES:
            if overrides:
                raise UserError(f"sampler.{overrides[0]}: the sampler {given} has no settings", "add --sampler htfs")
            return cls(given)
        if given != "htfs" and not Path(given).is_file():
            raise UserError(f"there is no sampler {given!r}", f"choose one of {', '.join(BASELINES)}, htfs, or give a YAML file of `videoseg sample-frames`")
        return cls("htfs", load_settings(None if given == "htfs" else given, ["rollout.log_level=ERROR", *overrides, "sampler=htfs"]))

    @contextmanager
    def sampler(self, policy: Policy) -> Iterator[FrameSampler]:
        if self.settings is None:
            yield default_sampler(policy.settings, self.name)
            return
        with sampler_for(self.settings) as make:
            yield make([])

    def check(self, policy: Policy) -> None:
        """Raises UserError where a prompt would hold more images than vLLM is told to expect."""
        wanted = 1 + (self.settings.key_frames + self.settings.reference_frames if self.settings else policy.settings.prompt.reference_frames)
        if wanted > policy.settings.rollout.max_images:
            remedy = f"set rollout.max_images={wanted}, or sampler.key_frames and sampler.reference_frames to fewer"
            raise UserError(f"prompts would show {wanted} frames, and rollout.max_images is {policy.settings.rollout.max_images}", remedy)


def find_videos(folder: Path) -> list[Path]:
    """The video files and the folders of images that lie in a folder. Raises UserError where there are none, or it is itself one video."""
    if not folder.is_dir():
        raise UserError(f"--batch {folder}: no such folder", "give a folder that holds videos")
    inside = sorted(folder.iterdir())
    if any(is_image(p) for p in inside):
        raise UserError(f"--batch {folder}: it holds images, so it is one video", f"give it as VIDEO: videoseg segment {folder} QUERY")
    videos = [p for p in inside if not p.name.startswith(".") and (p.suffix.lower() in VIDEO_SUFFIXES if p.is_file() else any(map(is_image, p.iterdir())))]
    if not videos:
        raise UserError(f"--batch {folder}: it holds neither video files ({', '.join(VIDEO_SUFFIXES)}) nor folders of images", "give a folder that does")
    return videos


def segment_videos(
    policy: Policy,
    videos: Sequence[Path],
    queries: Sequence[str],
    out: Path,
    sampling: Sampling = Sampling(),
    outputs: Outputs = Outputs(),
    fps: float = FOLDER_FPS,
    note: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    note_seconds: float = NOTE_SECONDS,
    start: Callable[[Policy], AbstractContextManager[Inference]] = Inference,
) -> dict[Path, str]:
    """Answers every query about every video into OUT/<video>/<query>/; the status of each of these folders, those done before included.

    Nothing is loaded where nothing is left to do. `note` is told how it goes, while masks are tracked every `note_seconds`. Raises UserError
    where something is in the way, before anything starts.
    """
    if not 0 < fps < inf:
        raise UserError(f"fps = {fps:g}: frames a second are a number above 0", "for example --fps 24")
    sampling.check(policy)
    asked, settings = _queries(videos, queries, out), settings_fingerprint(policy, sampling)
    report = Report(policy.name, settings, {q.place: finished(q.place, q.text, q.video, settings) for q in asked}, note, note_seconds)
    left = [q for q in asked if report.statuses[q.place] is None]
    if len(left) < len(asked):
        note(f"{len(asked) - len(left)} of {len(asked)} queries were finished before and are skipped")
    episodes: dict[Query, Episode] = {}
    for query in left:
        try:
            episodes[query] = query_episode(query.video, query.text, fps)
        except VideoError as error:
            report.without_masks(query, Answered(_unread(query), None, "unreadable", error=str(error)))
    check_tracking(policy.settings, episodes.values())
    chosen = _choose_frames(policy, sampling, episodes, report)
    if chosen:
        note(f"starting {policy.name} on {policy.settings.cluster.device}")
        with start(policy) as model:
            answers = model.answers((episodes[query], sample) for query, sample in chosen.items())
            for video, some in _by_video(list(chosen)):
                _segment(model, video, [(query, next(answers)) for query in some], outputs, report)
    return report.statuses


@dataclass
class Report:
    """What is finished, on disk and to the person who waits. `statuses`: of every query's folder; None: not yet."""

    policy: str
    settings: str
    statuses: dict[Path, str | None]
    note: Callable[[str], None]
    note_seconds: float = NOTE_SECONDS
    begun: float = field(default_factory=time.monotonic)

    def without_masks(self, query: Query, answered: Answered) -> None:
        """This query ends with answer.json alone."""
        write_without_masks(query.place, self.record(answered))
        self.ended(query, answered)

    def ended(self, query: Query, answered: Answered) -> None:
        """The folder of this query is complete."""
        self.statuses[query.place] = answered.status
        count = len(answered.answer.objects) if answered.status == "ok" else 0
        said = ": ".join(filter(None, (answered.status, f"{count} object{'s' * (count > 1)}" if count else answered.error)))
        done = sum(status is not None for status in self.statuses.values())
        self.note(f"[{done}/{len(self.statuses)}, {duration(time.monotonic() - self.begun)}] {query.video.name}: {query.text!r}: {said} -> {query.place}")

    def record(self, answered: Answered, masks_NHW: np.ndarray | None = None) -> dict[str, Any]:
        return answer_record(answered, self.policy, self.settings, masks_NHW)


def summary(out: Path, statuses: dict[Path, str]) -> str:
    """The last line of the command. Raises SomeWithoutMask where there is a query without one."""
    counts = Counter(statuses.values())
    line = f"{out}: {len(statuses)} queries: " + ", ".join(f"{count} {status}" for status, count in counts.most_common())
    if counts["ok"] < len(statuses):
        raise SomeWithoutMask(line, "answer.json of each says what was answered, or what is wrong with the video; docs/segment.md says what to try")
    return line


def settings_fingerprint(policy: Policy, sampling: Sampling) -> str:
    """16 hex digits of what an answer and its masks depend on, besides video and query. Of a policy counts the name, not the contents."""
    settings, segmentation = policy.settings, asdict(policy.settings.segmentation)
    for speed in ("device", "dtype", "replicas", "cpus_per_replica", "max_prompts_per_batch"):
        del segmentation[speed]
    sampler = sampling.settings and {k: v for k, v in asdict(sampling.settings).items() if k not in ("batch", "device", "dtype", "rollout")}
    values = [policy.name, asdict(settings.prompt), asdict(settings.rollout.sampling().greedy()), segmentation, sampling.name, sampler]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _queries(videos: Sequence[Path], texts: Sequence[str], out: Path) -> list[Query]:
    """Every query about every video, one after another for each video. Two videos of one stem keep their suffixes as folder names."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder", "give the name of a folder")
    blank = [t for t in texts if not t.strip()]
    if blank or not texts:
        raise UserError("a query is empty" if blank else "there is no query", 'write what to segment: videoseg segment VIDEO "the red car"')
    for video in videos:
        if not video.exists():
            raise UserError(f"{video}: no such video", "give a video file, a folder of images, or --batch FOLDER")
    paths = [v.absolute() for v in videos]
    stem = lambda p: p.name if p.is_dir() else p.stem
    shared = Counter(map(stem, paths))
    return [Query(p, text, out / (p.name if shared[stem(p)] > 1 else stem(p)) / folder_name(text)) for p in paths for text in dict.fromkeys(texts)]


def _by_video(queries: list[Query]) -> Iterator[tuple[Path, list[Query]]]:
    """At most TOGETHER queries at a time, in their order."""
    for video, group in groupby(queries, key=lambda q: q.video):
        some = list(group)
        yield from ((video, some[i : i + TOGETHER]) for i in range(0, len(some), TOGETHER))


def _choose_frames(policy: Policy, sampling: Sampling, episodes: dict[Query, Episode], report: Report) -> dict[Query, FrameSample]:
    """Of all queries but those about videos that cannot be read, which end here."""
    if not episodes:
        return {}
    if sampling.settings is not None:
        report.note(f"choosing frames with {sampling.settings.model}")
    with sampling.sampler(policy) as sampler:
        chosen = dict(zip(episodes, samples_of(sampler, list(episodes.values())), strict=True))
    for query in [q for q, sample in chosen.items() if isinstance(sample, VideoError)]:
        report.without_masks(query, Answered(episodes[query], None, "unreadable", error=str(chosen.pop(query))))
    if sampling.settings is not None:
        report.note(fallbacks_line(sum((Counter(sample.fallbacks) for sample in chosen.values()), Counter())))
    return chosen


def samples_of(sampler: FrameSampler, episodes: list[Episode]) -> list[FrameSample | VideoError]:
    """All together; where a video among them breaks, each half, until it is known which."""
    try:
        return sampler.sample(episodes)
    except VideoError as error:
        if len(episodes) == 1:
            return [error]
    half = len(episodes) // 2
    return samples_of(sampler, episodes[:half]) + samples_of(sampler, episodes[half:])


def _segment(model: Inference, path: Path, group: list[tuple[Query, Answered]], outputs: Outputs, report: Report) -> None:
    """Answers about one video to their files: those about one frame in one pass through the video, those that say nothing at once."""
    for query, answered in group:
        if answered.status not in MASKED:
            report.without_masks(query, answered)
    masked = [(q, a) for q, a in group if a.status in MASKED]
    for target in sorted({a.sample.target_frame for _, a in masked}):
        about = [(q, a) for q, a in masked if a.sample.target_frame == target]
        unfinished = dict(about)
        try:
            for query, answered in _masks_to_files(model, path, target, about, outputs, report):
                del unfinished[query]
                report.ended(query, answered)
        except VideoError as error:
            for query, answered in unfinished.items():
                report.without_masks(query, replace(answered, status="unreadable", error=str(error)))


def _masks_to_files(
    model: Inference, path: Path, target: int, about: list[tuple[Query, Answered]], outputs: Outputs, report: Report
) -> Iterator[tuple[Query, Answered]]:
    """Each, with its final status, when its folder is complete. Raises VideoError where a frame cannot be read; then the others have none."""
    folders: list[QueryFolder] = []
    try:
        video, start = open_video(path), time.perf_counter()
        masks = model.masks(video, target, [a.answer for _, a in about])
        segmented = time.perf_counter()
        folders += [QueryFolder(q.place, (a.episode.height, a.episode.width), a.episode.num_frames, outputs) for q, a in about]
        for t, g, masks_NHW in model.track(video, target, masks, progress=_tracking(path, report)):
            folders[g].add(t, masks_NHW)
        seconds = {"segment": segmented - start, "track": time.perf_counter() - segmented - sum(f.seconds for f in folders)}
        for (query, answered), folder, masks_NHW in zip(about, folders, masks):
            status = "no_mask" if answered.status == "ok" and not masks_NHW.any() else answered.status
            answered = replace(answered, status=status, seconds=answered.seconds | seconds)
            folder.finish(video, answered.episode.fps, report.record(answered, masks_NHW))
            yield query, answered
    finally:
        for folder in folders:
            folder.discard()


def _tracking(path: Path, report: Report) -> Callable[[int, int], None]:
    """Tells from time to time how far it is."""
    begun = said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= report.note_seconds:
            said = now
            report.note(f"{path.name}: {done} of {total} frames tracked, {duration((now - begun) / done * (total - done))} left")

    return progress


def _unread(query: Query) -> Episode:
    """The episode of a video of which nothing is known."""
    return Episode(query.text, "query", "", query.video.stem, str(query.video), 0, 0, 0, 0.0, query.text, None, (), ())
