"""A policy's predictions for a benchmark, in the layout of the benchmark's own programs; what is done is not done again.

OUT/predictions/<video>/<expression>/<frame>.png is what `cluster.benchmark_scores` reads, of whatever program it comes.
OUT/answers.jsonl has a line for each answered expression, OUT/frames/ what HTFS chose (as `videoseg sample-frames` keeps it).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reward_service import Answer, AnswerObject
from rollout.dataset import EpisodeDataset
from rollout.episodes import Episode
from rollout.frame_samples import FrameSample
from rollout.media import frame_names
from rollout.prompts import check_query
from segmentation_service.video import VideoError, open_video

from cluster.benchmark_scores import check_source
from cluster.errors import UserError
from cluster.eval_results import SCORES, write_json
from cluster.expression_scores import has_truth
from cluster.inference import MASKED, Answered, Inference, check_tracking, default_sampler
from cluster.policies import Policy
from cluster.progress import duration
from cluster.sample_frames import KeptSampler
from cluster.segment import TOGETHER, Sampling, samples_of, settings_fingerprint
from cluster.segment_output import RETRIED

PREDICTIONS, ANSWERS, ABOUT, FRAMES = "predictions", "answers.jsonl", "eval.json", "frames"
ORACLES = ("frame", "box", "mask")
"""What the truth stands in for: the choice of the target frame; besides it the policy's answer; besides it SAM2's masks on that frame."""
CHUNK = 256  # expressions that are asked together
NOTE_SECONDS = 10.0

Asked = Sequence[tuple[Episode, FrameSample | VideoError]]
"""Expressions with the frames that the policy is to see, or why it cannot."""


@dataclass(frozen=True)
class Evaluation:
    """One benchmark, one policy, one folder. oracle: one of ORACLES, or none."""

    benchmark: str
    data: Path
    out: Path
    policy: Policy
    sampling: Sampling = Sampling()
    oracle: str | None = None

    @property
    def asks(self) -> bool:
        """Whether the policy says anything."""
        return self.oracle not in ("box", "mask")

    @property
    def predictions(self) -> Path:
        return self.out / PREDICTIONS

    def begin(self, episodes: Sequence[Episode]) -> None:
        """The folder, which belongs to this evaluation alone. Raises UserError where it is another's, or where the data are another benchmark's or
        lack what is asked of them, PromptError for a query that holds a media token."""
        check_source(self.benchmark, episodes)
        check_tracking(self.policy.settings, episodes)
        self.sampling.check(self.policy)
        if self.oracle and self.sampling != Sampling():
            raise UserError(f"--oracle {self.oracle} chooses the target frame, and --sampler {self.sampling.name} is to choose it too", "give one of them")
        if self.oracle and (hidden := [e.episode_id for e in episodes if not has_truth(e)]):
            raise UserError(f"--oracle {self.oracle} needs the truth, and the masks of {len(hidden)} expressions are not public, such as {hidden[0]}", "leave it out")
        for episode in episodes:
            check_query(episode.episode_id, episode.query)
        about = {
            "benchmark": self.benchmark,
            "split": sorted({e.split for e in episodes}),
            "data": EpisodeDataset(self.data).fingerprint,
            "policy": self.policy.name,
            "oracle": self.oracle,
            "settings": settings_fingerprint(self.policy, self.sampling),
        }
        file = self.out / ABOUT
        if not file.exists():
            if (self.out / SCORES).exists():
                raise UserError(f"{self.out} holds the scores of another program's predictions", "give another --out")
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, about)
        known = json.loads(file.read_text(encoding="utf-8"))
        for what, mine in about.items():
            if known.get(what) != mine:
                raise UserError(f"{self.out} holds an evaluation with {what} {known.get(what)!r}, not {mine!r}", f"give another --out, or delete {self.out}")

    def answered(self) -> dict[str, dict[str, Any]]:
        """The lines of answers.jsonl by episode, the last of each; one that was cut off is not read."""
        records = {}
        file = self.out / ANSWERS
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records[record["episode_id"]] = record
        return {name: record for name, record in records.items() if record["status"] not in RETRIED}


def predict(
    evaluation: Evaluation,
    episodes: Sequence[Episode],
    note: Callable[[str], None],
    start: Callable[[Policy], AbstractContextManager[Inference]] | None = None,
    replicas: int = 1,
) -> None:
    """Masks of every expression that has none yet, on the annotated frames (where the truth is not public: on all), and its line in answers.jsonl.

    An answer that cannot be read, or a video that cannot be, leaves an expression without masks; `unreadable` ones are tried again next time.
    replicas: copies of policy and segmenter that share the videos (`cluster.eval_replicas`); one is `start`ed in this process.
    """
    evaluation.begin(episodes)
    done = evaluation.answered()
    left = sorted((e for e in episodes if e.episode_id not in done), key=lambda e: e.video_id)
    if len(left) < len(episodes):
        note(f"{len(episodes) - len(left)} of {len(episodes)} expressions were answered before and are skipped")
    if not left:
        return
    samples = _samples(evaluation, left)  # before the policy starts: the sampler may need the device for a model of its own
    asked = list(zip(left, samples))
    note(f"starting {evaluation.policy.name if evaluation.asks else 'the segmenter'} on {evaluation.policy.settings.cluster.device}" + f", {replicas} times" * (replicas > 1))
    with _answering(evaluation, start, replicas) as answer, open(evaluation.out / ANSWERS, "a", encoding="utf-8") as answers:
        begun = said = time.monotonic()
        if not _ends_a_line(evaluation.out / ANSWERS):
            answers.write("\n")
        for finished, answered in enumerate(answer(asked), 1):
            answers.write(json.dumps(answer_line(answered), ensure_ascii=False) + "\n")
            answers.flush()
            if time.monotonic() - said > NOTE_SECONDS or finished == len(left):
                said = time.monotonic()
                note(f"{finished}/{len(left)} expressions, {duration((said - begun) / finished * (len(left) - finished))} left")


@contextmanager
def _answering(evaluation: Evaluation, start: Callable[[Policy], AbstractContextManager[Inference]] | None, replicas: int) -> Iterator[Callable[[Asked], Iterator[Answered]]]:
    if replicas > 1:
        from cluster.eval_replicas import copies

        with copies(evaluation, replicas) as answer:
            yield answer
    else:
        with here(evaluation) if start is None else start(evaluation.policy) as model:
            yield partial(with_masks, model, evaluation)


def here(evaluation: Evaluation) -> Inference:
    """What the evaluation needs of its policy, to be loaded in this process."""
    return Inference(evaluation.policy, asks=evaluation.asks)


def with_masks(model: Inference, evaluation: Evaluation, asked: Asked) -> Iterator[Answered]:
    """The answers, each when its masks are on disk."""
    yield from (Answered(e, None, "unreadable", error=str(broken)) for e, broken in asked if isinstance(broken, VideoError))
    readable = [(e, sample) for e, sample in asked if not isinstance(sample, VideoError)]
    for i in range(0, len(readable), CHUNK):
        some = readable[i : i + CHUNK]
        answers = model.answers(some) if evaluation.asks else (_true_answer(*one) for one in some)
        for _, of_video in groupby(answers, key=lambda a: a.episode.video_id):
            yield from _video_with_masks(model, evaluation, list(of_video))


def _video_with_masks(model: Inference, evaluation: Evaluation, answers: list[Answered]) -> Iterator[Answered]:
    yield from (a for a in answers if a.status not in MASKED)
    masked = [a for a in answers if a.status in MASKED]
    for target in sorted({a.sample.target_frame for a in masked}):
        about = [a for a in masked if a.sample.target_frame == target]
        for n in range(0, len(about), TOGETHER):
            yield from _masks_to_files(model, evaluation, target, about[n : n + TOGETHER])


def _samples(evaluation: Evaluation, episodes: list[Episode]) -> list[FrameSample | VideoError]:
    if evaluation.oracle is not None:
        return list(default_sampler(evaluation.policy.settings, "oracle").sample(episodes))
    with evaluation.sampling.sampler(evaluation.policy) as sampler:
        if (settings := evaluation.sampling.settings) is not None:
            sampler = KeptSampler(sampler, evaluation.out / FRAMES, settings.batch)
        return samples_of(sampler, episodes)


def _true_answer(episode: Episode, sample: FrameSample) -> Answered:
    """The answer of a policy that knows the truth: box and point of every target that is in view."""
    objects = tuple(AnswerObject(tuple(map(float, a.box)), (tuple(map(float, a.point)),), (), n) for n, a in enumerate(episode.visible(sample.target_frame)))
    answer = Answer("", True, True, len(objects), 2.0 if objects else 0.0, objects, objects)
    return Answered(episode, sample, "ok" if objects else "empty", answer)


def _masks_to_files(model: Inference, evaluation: Evaluation, target: int, about: list[Answered]) -> Iterator[Answered]:
    """Of expressions about one video whose answers are about one frame."""
    episode, folders = about[0].episode, []
    try:
        start = time.perf_counter()
        video = open_video(episode.video_path)
        names = frame_names(video)
        masks = [a.episode.masks(target) for a in about] if evaluation.oracle == "mask" else model.masks(video, target, [a.answer for a in about])
        wanted = {t for a in about for t in a.episode.annotated_frames or range(len(names))}
        folders += [_Folder(evaluation.predictions / a.episode.video_id / a.episode.expression_id) for a in about]
        for t, g, masks_NHW in model.track(video, target, masks, wanted):
            folders[g].add(names[t], masks_NHW.any(axis=0) if len(masks_NHW) else np.zeros((episode.height, episode.width), bool))
        seconds = {"segment_and_track": time.perf_counter() - start}
        for a, folder, masks_NHW in zip(about, folders, masks):
            folder.finish()
            status = "no_mask" if a.status == "ok" and not masks_NHW.any() else a.status
            yield replace(a, status=status, seconds=a.seconds | seconds)
    except VideoError as error:
        yield from (replace(a, status="unreadable", error=str(error)) for a in about)
    finally:
        for folder in folders:
            folder.discard()


def _ends_a_line(file: Path) -> bool:
    """False where the power went while a line was written."""
    with file.open("rb") as text:
        if not text.seek(0, os.SEEK_END):
            return True
        text.seek(-1, os.SEEK_END)
        return text.read() == b"\n"


class _Folder:
    """The images of one expression; the folder gets its name when all are there."""

    def __init__(self, place: Path) -> None:
        self._place, self._work = place, place.with_name(f".{place.name}.partial")
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)

    def add(self, name: str, mask_HW: np.ndarray) -> None:
        Image.fromarray(mask_HW.astype(np.uint8) * np.uint8(255)).save(self._work / f"{name}.png")

    def finish(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        self._work.rename(self._place)

    def discard(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)


def answer_line(answered: Answered) -> dict[str, Any]:
    """The line of answers.jsonl."""
    episode, sample, completion = answered.episode, answered.sample, answered.completion
    return {
        "episode_id": episode.episode_id,
        "query": episode.query,
        "status": answered.status,
        "error": answered.error,
        "completion": None if completion is None else completion.text,
        "response_tokens": None if completion is None else len(completion.token_ids),
        "reasoning_words": None if completion is None else len(answered.reasoning.split()),
        "objects": 0 if answered.answer is None else len(answered.answer.objects),
        "target_frame": None if sample is None else sample.target_frame,
        "seconds": {stage: round(seconds, 3) for stage, seconds in answered.seconds.items()},
    }
