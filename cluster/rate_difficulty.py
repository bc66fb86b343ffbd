"""`videoseg data difficulty`: a vision-language model rates every query of a data set; a copy with the ratings is written.

The model is run here by vLLM or asked over the OpenAI protocol (`cluster.raters`). Each reply is appended to a cache as soon as it is
read: a command that was stopped goes on where it was, and one that is repeated asks nothing twice.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from cluster.difficulty_ratings import BadReply, difficulty_of, rating_prompt, rating_schema, read_ratings
from cluster.errors import UserError
from cluster.raters import EndpointRater, Rater, TryAgain, Unrated, VllmRater
from rollout.episodes import Episode, read_episodes, shards, write_episodes
from rollout.order import uniform_frames
from segmentation_service.video import VideoError, read_frames

CACHE = "ratings.jsonl"
PROGRESS_EVERY = 100  # questions


@dataclass(frozen=True)
class RatingConfig:
    """model: its name at `endpoint` (base URL that ends in /v1), or, without an endpoint, the checkpoint folder or hub id that vLLM
    runs here with the arguments `vllm`. side: longest side of a frame as shown, pixels. requests: in flight at a time; None: 8 at an
    endpoint, 64 here. tries: requests an episode, before it is left unrated. max_failures: episodes of a shard left unrated before
    the command stops."""

    model: str
    endpoint: str | None = None
    variant: str = "videoseg_r1"
    frames: int = 8
    side: int = 448
    requests: int | None = None
    tries: int = 4
    timeout_seconds: float = 120.0
    first_pause_seconds: float = 1.0
    max_failures: int = 20
    api_key: str = ""
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise UserError(f"endpoint {self.endpoint!r} is not a URL", "for example http://localhost:8000/v1")
        if self.endpoint is not None and self.vllm:
            raise UserError(f"--vllm {', '.join(self.vllm)} with an endpoint, where vLLM is not ours to set", "leave out --vllm or --endpoint")
        for name in ("frames", "side", "in_flight", "tries"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('in_flight', 'requests')}={getattr(self, name)} must be at least 1", "give a positive number")

    @property
    def in_flight(self) -> int:
        return self.requests if self.requests is not None else 64 if self.endpoint is None else 8

    def rater(self) -> Rater:
        """Raises MissingFileError for a model that is neither a folder nor a hub id."""
        schema = rating_schema(self.variant)
        if self.endpoint is None:
            return VllmRater(self.model, schema, self.frames, self.vllm)
        return EndpointRater(self.endpoint, self.model, schema, self.api_key, self.timeout_seconds)


class Cache:
    """Ratings by what was asked: a JSON-lines file of {key, episode_id, ratings}. A line cut short by a crash is dropped."""

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
        if lines[-1]:
            with open(file, "r+b") as handle:
                handle.truncate(handle.seek(0, os.SEEK_END) - len(lines[-1]))
        self.ratings: dict[str, dict[str, float]] = {}
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = json.loads(line)
                self.ratings[record["key"]] = record["ratings"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}:{number} is not a line of ratings ({error})", "remove the line; its episode is then asked again") from error
        self._file = open(file, "a", encoding="utf-8")

    def add(self, key: str, episode_id: str, ratings: dict[str, float]) -> None:
        self.ratings[key] = ratings
        self._file.write(json.dumps({"key": key, "episode_id": episode_id, "ratings": ratings}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def rate_data(data: Path, out: Path, config: RatingConfig, only_missing: bool = False) -> dict[str, int]:
    """Writes to `out` the shards of `data` with their difficulties; returns how many were asked, cached, kept and left unrated, and
    of those how many for which reason ("over the context length").

    only_missing: episodes that have a difficulty keep it. Raises UserError if `out` is `data`, the model cannot be asked, or more
    than `max_failures` episodes of a shard stay unrated; what was rated until then is in `out/ratings.jsonl`.
    """
    files = shards(data)
    if out.resolve() in (data.resolve(), files[0].parent.resolve()):
        raise UserError(f"{out} holds the episodes themselves", "give another folder for the rated copy")
    return asyncio.run(_rate_shards(files, out, config, only_missing))


async def _rate_shards(files: Sequence[Path], out: Path, config: RatingConfig, only_missing: bool) -> dict[str, int]:
    counts = Counter(asked=0, cached=0, kept=0, unrated=0)
    rater = config.rater()
    cache = Cache(out / CACHE)
    try:
        for file in files:
            rated = await _rate_all(list(read_episodes(file)), rater, config, cache, only_missing, counts)
            write_episodes((replace(e, video=os.path.relpath(e.video_path.resolve(), out.resolve())) for e in rated), out / file.name)
            print(f"{file.name}: {len(rated)} episodes; {summary(counts)}", file=sys.stderr, flush=True)
    finally:
        cache.close()
        await rater.close()
    return dict(counts)


def summary(counts: Mapping[str, int]) -> str:
    """The counts of `rate_data` as a line."""
    parts = [f"{n} {what}" for what, n in counts.items()]
    return ", ".join(parts[:4]) + (f" ({', '.join(parts[4:])})" if parts[4:] else "")


async def _rate_all(episodes: Sequence[Episode], rater: Rater, config: RatingConfig, cache: Cache, only_missing: bool, counts: Counter) -> list[Episode]:
    """The episodes with their difficulties, in their order."""
    slots, asked = asyncio.Semaphore(config.in_flight), {}
    failures = 0

    async def one(episode: Episode) -> Episode:
        if only_missing and episode.difficulty is not None:
            counts["kept"] += 1
            return episode
        key = _key(episode, config)
        if key in cache.ratings:
            counts["cached"] += 1
        else:
            if key not in asked:  # the same question twice in a shard is asked once
                asked[key] = group.create_task(ask(key, episode))
            if reason := await asked[key]:
                counts["unrated"] += 1
                counts[reason] += 1
                return replace(episode, difficulty=None)
        return replace(episode, difficulty=difficulty_of(cache.ratings[key]))

    async def ask(key: str, episode: Episode) -> str | None:
        """Why the episode stays unrated; None: its ratings are in the cache."""
        nonlocal failures
        async with slots:
            try:
                ratings = await _ask(rater, episode, config)
            except Unrated as error:
                print(f"unrated: {episode.episode_id}: {error}", file=sys.stderr, flush=True)
                failures += 1
                if failures > config.max_failures:
                    remedy = f"mend the cause and run the command again: it goes on from {CACHE}"
                    raise UserError(f"{failures} episodes could not be rated, last: {error}", remedy) from error
                return error.reason
        cache.add(key, episode.episode_id, ratings)
        counts["asked"] += 1
        if counts["asked"] % PROGRESS_EVERY == 0:
            print(f"so far {summary(counts)}", file=sys.stderr, flush=True)
        return None

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(e)) for e in episodes]
    except* UserError as errors:
        stopped = errors.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise stopped


async def _ask(rater: Rater, episode: Episode, config: RatingConfig) -> dict[str, float]:
    """The ratings of one episode. Raises Unrated after `tries`, UserError if every other question will fail too."""
    try:
        messages = await asyncio.to_thread(_messages, episode, config)
    except VideoError as error:
        raise Unrated("unreadable frames", str(error)) from error
    temperature, cause = 0.0, ""
    for attempt in range(config.tries):
        if attempt:
            await asyncio.sleep(config.first_pause_seconds * 2 ** (attempt - 1))
        try:
            return read_ratings(await rater.reply(messages, temperature), config.variant)
        except BadReply as error:
            temperature, cause = 0.7, str(error)  # the greedy reply would be the same again
        except TryAgain as error:
            cause = str(error)
    raise Unrated("no ratings in the replies" if temperature else "no reply", f"{config.tries} tries, last: {cause}")


def _messages(episode: Episode, config: RatingConfig) -> list[dict]:
    """The chat that asks: the frames in order, then the text."""
    frames = read_frames(episode.video_path, uniform_frames(episode.num_frames, config.frames))
    images = [{"type": "image_url", "image_url": {"url": _data_url(frames[t], config.side)}} for t in sorted(frames)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": rating_prompt(episode.query, config.variant)}]}]


def _data_url(frame, side: int) -> str:
    image, buffer = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _key(episode: Episode, config: RatingConfig) -> str:
    """Identifies a question: the model, what it is told and which frames of which video it sees."""
    video = [episode.source, episode.split, episode.video_id, episode.height, episode.width, episode.num_frames]
    asked = [config.model, rating_prompt(episode.query, config.variant), config.frames, config.side, video]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
