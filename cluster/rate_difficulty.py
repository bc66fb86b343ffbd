"""`videoseg data difficulty`: a vision-language model rates every query of a data set; a copy with the ratings is written.

The model is asked over the OpenAI protocol, so that any service and any model under `vllm serve` will do. Each reply is appended
to a cache as soon as it is read: a command that was stopped goes on where it was, and one that is repeated asks nothing twice.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from PIL import Image

from cluster.difficulty_ratings import BadReply, difficulty_of, rating_prompt, read_ratings
from cluster.errors import UserError
from rollout.episodes import Episode, read_episodes, shards, write_episodes
from rollout.order import uniform_frames
from segmentation_service.video import VideoError, open_video, read_frame

CACHE = "ratings.jsonl"
_RETRIED = (408, 409, 429)  # and every 5xx


@dataclass(frozen=True)
class RatingConfig:
    """endpoint: base URL that ends in /v1. side: longest side of a frame as sent, pixels. tries: requests an episode, before it is
    left unrated. max_failures: episodes left unrated before the command stops."""

    endpoint: str
    model: str
    variant: str = "videoseg_r1"
    frames: int = 8
    side: int = 448
    requests: int = 8
    tries: int = 4
    timeout_seconds: float = 120.0
    first_pause_seconds: float = 1.0
    max_failures: int = 20
    api_key: str = ""

    def __post_init__(self):
        if not self.endpoint.startswith(("http://", "https://")):
            raise UserError(f"endpoint {self.endpoint!r} is not a URL", "for example http://localhost:8000/v1")
        for name in ("frames", "side", "requests", "tries"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1", "give a positive number")


class Unrated(Exception):
    """An episode that could not be rated, after all tries."""


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
    """Writes to `out` the shards of `data` with their difficulties; returns how many were asked, cached, kept and left unrated.

    only_missing: episodes that have a difficulty keep it. Raises UserError if `out` is `data`, the endpoint refuses, or more than
    `max_failures` episodes stay unrated; what was rated until then is in `out/ratings.jsonl`.
    """
    files = shards(data)
    if out.resolve() in (data.resolve(), files[0].parent.resolve()):
        raise UserError(f"{out} holds the episodes themselves", "give another folder for the rated copy")
    counts = {"asked": 0, "cached": 0, "kept": 0, "unrated": 0}
    cache = Cache(out / CACHE)
    try:
        for file in files:
            rated = asyncio.run(_rate_all(list(read_episodes(file)), config, cache, only_missing, counts))
            write_episodes((replace(e, video=os.path.relpath(e.video_path.resolve(), out.resolve())) for e in rated), out / file.name)
            print(f"{file.name}: {len(rated)} episodes; " + ", ".join(f"{n} {what}" for what, n in counts.items()), file=sys.stderr, flush=True)
    finally:
        cache.close()
    return counts


async def _rate_all(episodes: Sequence[Episode], config: RatingConfig, cache: Cache, only_missing: bool, counts: dict[str, int]) -> list[Episode]:
    """The episodes with their difficulties, in their order."""
    slots, asked = asyncio.Semaphore(config.requests), {}

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
            if not await asked[key]:
                counts["unrated"] += 1
                return replace(episode, difficulty=None)
        return replace(episode, difficulty=difficulty_of(cache.ratings[key]))

    async def ask(key: str, episode: Episode) -> bool:
        async with slots:
            try:
                ratings = await _ask(client, episode, config)
            except Unrated as error:
                print(f"unrated: {episode.episode_id}: {error}", file=sys.stderr, flush=True)
                failures.append(str(error))
                if len(failures) > config.max_failures:
                    remedy = f"mend the cause and run the command again: it goes on from {CACHE}"
                    raise UserError(f"{len(failures)} episodes could not be rated, last: {error}", remedy) from error
                return False
        cache.add(key, episode.episode_id, ratings)
        counts["asked"] += 1
        return True

    failures: list[str] = []
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    try:
        async with httpx.AsyncClient(base_url=config.endpoint.rstrip("/"), headers=headers, timeout=config.timeout_seconds) as client:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(e)) for e in episodes]
    except* UserError as errors:
        stopped = errors.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise stopped


async def _ask(client: httpx.AsyncClient, episode: Episode, config: RatingConfig) -> dict[str, float]:
    """The ratings of one episode. Raises Unrated after `tries`, UserError if the endpoint will refuse every other request too."""
    try:
        body = await asyncio.to_thread(_request, episode, config)
    except VideoError as error:
        raise Unrated(str(error)) from error
    cause = ""
    for attempt in range(config.tries):
        if attempt:
            await asyncio.sleep(config.first_pause_seconds * 2 ** (attempt - 1))
        try:
            response = await client.post("/chat/completions", json=body)
            if response.status_code in (401, 403, 404):
                raise UserError(f"{config.endpoint} answers {response.status_code}: {response.text[:300]}", "check --endpoint, --model and the key in --api-key-env")
            if response.status_code < 500 and response.status_code not in (200, *_RETRIED):
                raise Unrated(f"status {response.status_code}: {response.text[:300]}")
            if response.status_code == 200:
                return read_ratings(_content(response), config.variant)
            cause = f"status {response.status_code}: {response.text[:300]}"
        except BadReply as error:
            cause = str(error)
            body["temperature"] = 0.7  # the greedy reply would be the same again
        except httpx.HTTPError as error:
            cause = f"{type(error).__name__}: {error}"
    raise Unrated(f"{config.tries} tries, last: {cause}")


def _content(response: httpx.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise BadReply(f"not a chat completion: {response.text[:200]!r}", "check --endpoint") from error
    if not isinstance(content, str):
        raise BadReply(f"a chat completion whose content is {content!r}", "use a model that answers in text")
    return content


def _request(episode: Episode, config: RatingConfig) -> dict:
    video = open_video(episode.video_path)
    frames = [read_frame(video, t) for t in uniform_frames(episode.num_frames, config.frames)]
    images = [{"type": "image_url", "image_url": {"url": _data_url(frame, config.side)}} for frame in frames]
    text = {"type": "text", "text": rating_prompt(episode.query, config.variant)}
    return {"model": config.model, "messages": [{"role": "user", "content": [*images, text]}], "temperature": 0.0, "max_tokens": 1024}


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
