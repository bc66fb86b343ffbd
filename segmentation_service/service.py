"""The segmentation service without its shells: a batch of requests in, for each an answer or the error that it alone gets."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from .embedding_cache import EmbeddingCache
from .prompts import ObjectPrompt
from .references import OpenVideo, References
from .segmenter import Segmenter
from .serve_config import ServeConfig, check
from .service_request import Rle, SegmentRequest, SegmentResponse, ServiceError
from .video import VideoError, check_frame_number, read_frame

logger = logging.getLogger(__name__)

Answer = SegmentResponse | ServiceError

PROBE_AGREEMENT = 0.99
"""How much of the probe's mask must stay as it was at the start; rounding may flip a pixel."""


class SegmentationService:
    """Answers requests about the videos of `references` within the limits of `config`. Not thread-safe."""

    def __init__(self, segmenter: Segmenter, references: References, config: ServeConfig) -> None:
        self.segmenter, self.references, self.config = segmenter, references, config
        self.alive_at = time.monotonic()
        """When work last went on: a frame was propagated, a group decoded."""
        self._probe_mask = self._probe()

    @classmethod
    def load(cls, config: ServeConfig) -> SegmentationService:
        """With the networks of `config.segmentation`. Raises CheckpointError or ValueError where they cannot be used."""
        check(config)
        s = config.segmentation
        cache = EmbeddingCache(config.cache_bytes) if config.cache_bytes else None
        segmenter = Segmenter(s.checkpoint, s.backend, s.device, s.dtype, s.max_prompts_per_batch, s.propagation, s.model_config, cache)
        return cls(segmenter, References(config.roots, config.uploads, config.max_frame_pixels), config)

    def segment_batch(self, requests: Sequence[SegmentRequest]) -> list[Answer]:
        """One answer or error a request, in their order. What is wrong with a request never reaches another."""
        answers: dict[int, Answer] = dict(self.answers(requests))
        return [answers[i] for i in range(len(requests))]

    def answers(self, requests: Sequence[SegmentRequest]) -> Iterator[tuple[int, Answer]]:
        """(place in the batch, answer), each as soon as it is known: errors first, then masks, then tracks.

        Requests about one frame share its encoding and are decoded together; those that ask for the same frames of the
        same video from the same target frame go through it together. Never do more objects than one request may have.
        """
        opened: dict[str, OpenVideo | ServiceError] = {}
        by_frame: dict[Hashable, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            try:
                video = self._open(request, opened)
                self._check(request, video)
                by_frame[request.video, request.frame].append(i)
            except Exception as error:
                yield i, _service_error(error)

        masks: dict[int, list[list[dict]]] = {}
        by_track: dict[Hashable, list[int]] = defaultdict(list)
        for (name, frame), members in by_frame.items():
            video = opened[name]

            def segment(members: list[int]) -> list[list[list[dict]]]:
                return self._segment(video, frame, [requests[i].prompts() for i in members])

            for i, found in self._each(requests, members, segment):
                propagate = requests[i].propagate
                if isinstance(found, ServiceError):
                    yield i, found
                elif propagate is False:
                    yield i, _response(found)
                else:
                    masks[i] = found
                    by_track[name, frame, True if propagate is True else frozenset(propagate)].append(i)

        for (name, frame, frames), members in by_track.items():
            video = opened[name]

            def track(members: list[int]) -> list[list[dict[int, list[dict]]]]:
                return self._track(video, frame, [masks[i] for i in members], None if frames is True else frames)

            for i, found in self._each(requests, members, track):
                yield i, found if isinstance(found, ServiceError) else _response(masks[i], found)

    def probe(self) -> None:
        """Proves that the model answers, and as it did at the start. Raises RuntimeError where it does not."""
        agreement = float(np.mean(self._probe() == self._probe_mask))
        if agreement < PROBE_AGREEMENT:
            raise RuntimeError(f"the model's mask of the probe agrees in only {agreement:.1%} of its pixels with that at the start")

    def stats(self) -> dict[str, float]:
        """Counters of the segmenter and its cache since the start."""
        return self.segmenter.stats()

    def _open(self, request: SegmentRequest, opened: dict[str, OpenVideo | ServiceError]) -> OpenVideo:
        if request.video not in opened:
            try:
                opened[request.video] = self.references.open(request.video)
            except ServiceError as error:
                opened[request.video] = error
        video = opened[request.video]
        if isinstance(video, ServiceError):
            raise video
        return video

    def _check(self, request: SegmentRequest, video: OpenVideo) -> None:
        """Raises ServiceError 413 where a limit is passed, VideoError where the video has no such frame."""
        c, objects = self.config, _objects(request)
        for number, limit, what in (
            (len(video), c.max_frames, "frames in the video"),
            (len(request.hypotheses), c.max_hypotheses, "hypotheses"),
            (objects, c.max_objects, "objects in all hypotheses"),
            (max((len(o.points) for hypothesis in request.hypotheses for o in hypothesis), default=0), c.max_points, "points of an object"),
        ):
            if number > limit:
                raise ServiceError(413, f"{number} {what} are more than the {limit} that this service takes")
        check_frame_number(video, request.frame)
        if request.propagate is False:
            return
        if self.segmenter.propagator is None:
            raise ServiceError(422, "this service was started without weights for propagation; ask for the target frame only (propagate: false)")
        frames = range(len(video)) if request.propagate is True else {check_frame_number(video, t) for t in request.propagate}
        if objects * len(frames) > c.max_masks:
            raise ServiceError(413, f"{objects} objects on {len(frames)} frames are more than the {c.max_masks} masks of an answer; ask for fewer frames")

    def _segment(self, video: OpenVideo, frame: int, groups: list[list[list[ObjectPrompt]]]) -> list[list[list[dict]]]:
        """Masks of several requests about one frame, as one group."""
        key = video.identity(frame)  # before it is read, so that a frame replaced meanwhile is not kept under its new name
        return _regrouped(self.segmenter.segment_group(read_frame(video, frame), [h for group in groups for h in group], key), groups)

    def _track(self, video: OpenVideo, frame: int, groups: list[list[list[dict]]], frames: frozenset[int] | None) -> list[list[dict[int, list[dict]]]]:
        """Tracks of the masks of several requests about one video, in one pass."""
        end = time.monotonic() + self.config.work_seconds

        def progress(done: int, total: int) -> None:
            self.alive_at = time.monotonic()
            if self.alive_at > end and done < total:
                raise ServiceError(413, f"{done} of {total} frames took the {self.config.work_seconds:g} s of a request; ask for fewer frames or objects")

        return _regrouped(self.segmenter.propagate_group(video, frame, [h for group in groups for h in group], frames, progress), groups)

    def _each(self, requests: Sequence[SegmentRequest], members: list[int], work: Callable[[list[int]], list]) -> Iterator[tuple[int, object]]:
        """(member, its part of the work or its error). Where the work fails for several, it is done for each alone: the fault may be one's."""
        parts = [[]]
        for i in members:
            if parts[-1] and sum(_objects(requests[j]) for j in (*parts[-1], i)) > self.config.max_objects:
                parts.append([])
            parts[-1].append(i)
        while parts:
            part = parts.pop(0)
            self.alive_at = time.monotonic()
            try:
                found = work(part)
            except Exception as error:
                if len(part) > 1 and not isinstance(error, (VideoError, OSError)):  # a video is the fault of all
                    parts = [[i] for i in part] + parts
                    continue
                found = [_service_error(error)] * len(part)
            yield from zip(part, found)

    def _probe(self) -> np.ndarray:
        y, x = np.mgrid[0:48, 0:64]
        frame_HW3 = np.stack([4 * x, 5 * y, np.where((abs(x - 30) < 12) & (abs(y - 24) < 9), 250, 10)], -1).astype(np.uint8)
        return self.segmenter.segment_frame(frame_HW3, [[ObjectPrompt((18, 15, 42, 33))]])[0]


def _objects(request: SegmentRequest) -> int:
    return sum(map(len, request.hypotheses))


def _regrouped(flat: list, groups: Sequence[Sequence]) -> list[list]:
    rest = iter(flat)
    return [[next(rest) for _ in group] for group in groups]


def _response(masks: list[list[dict]], tracks: list[dict[int, list[dict]]] | None = None) -> SegmentResponse:
    return SegmentResponse(
        masks=tuple(tuple(Rle(**mask) for mask in hypothesis) for hypothesis in masks),
        tracks=None if tracks is None else tuple({t: tuple(Rle(**mask) for mask in found) for t, found in track.items()} for track in tracks),
    )


def _service_error(error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, VideoError):
        return ServiceError(422, str(error))
    if isinstance(error, OSError):
        return ServiceError(422, "the video changed or went away while it was read")
    logger.error("a request failed", exc_info=error)
    return ServiceError(500, f"the request failed by a fault of the service ({type(error).__name__}); its log says more")
