"""`videoseg sample-frames`: chooses the frames of every episode of a data set, and keeps them in a Parquet file.

What was chosen is written batch by batch: a command that was stopped goes on where it was, and one that is repeated chooses anew only
where something that a sample depends on has changed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import paths
from cluster.config_check import build
from cluster.config_file import config_error, read_settings
from cluster.errors import UserError
from rollout.config import DEVICES, DTYPES, RolloutConfig, resolve_device, resolve_dtype
from rollout.episodes import Episode, read_episodes
from rollout.frame_samplers import BASELINES, Baseline, FrameSampler
from rollout.frame_samples import FrameSample, SampleRow, read_samples, sample_key, video_fingerprint, write_samples
from rollout.htfs import HTFS, Ask, HTFSConfig
from rollout.vllm_options import version_of

SHOW = "videoseg sample-frames DATA OUT --show"


@dataclass
class SampleFramesConfig:
    """Settings of `videoseg sample-frames`."""

    sampler: str = field(default="htfs", metadata={"help": "Who chooses; all but htfs ask no model and are for comparison.", "choices": ("htfs", *BASELINES)})
    model: str = field(default="Qwen/Qwen2.5-VL-7B-Instruct", metadata={"help": "Model that htfs asks, as it is: a Hugging Face folder or a hub id."})
    key_frames: int = field(default=4, metadata={"help": "Frames of the key segment that a prompt shows.", "min": 0, "max": 1024})
    reference_frames: int = field(default=4, metadata={"help": "Frames of the rest of the video that a prompt shows (X_r).", "min": 0, "max": 1024})
    seed: int = field(default=0, metadata={"help": "Seed of the replies, and of sampler=random.", "min": 0, "max": 2**31 - 1})
    batch: int = field(default=64, metadata={"help": "Episodes that go on together, and are saved together.", "min": 1})
    device: str = field(default="auto", metadata={"help": "What the model runs on; auto: CUDA where there is a GPU.", "choices": DEVICES})
    dtype: str = field(default="auto", metadata={"help": "Its precision; auto: float32 on a CPU, bfloat16 on a GPU.", "choices": DTYPES})
    htfs: HTFSConfig = field(default_factory=HTFSConfig, metadata={"help": "How htfs searches."})
    rollout: RolloutConfig = field(default_factory=RolloutConfig, metadata={"help": "How vLLM runs; group_size, temperature and the like have no say here."})


def load_settings(file: str | None, overrides: Sequence[str]) -> SampleFramesConfig:
    """Raises ConfigError with every problem at once."""
    values, sources = read_settings(file, overrides)
    config, problems = build(SampleFramesConfig, values, sources)
    if problems:
        raise config_error(problems, SHOW)
    return config


@dataclass
class Report:
    """What `sample_data` did: episodes sampled now, episodes whose sample was there, and the fall-backs in all of them by name."""

    sampled: int
    cached: int
    fallbacks: Counter[str]

    def __str__(self) -> str:
        return f"{self.sampled} episodes sampled, {self.cached} kept; {fallbacks_line(self.fallbacks)}"


def sample_data(data: Path, out: Path, config: SampleFramesConfig) -> Report:
    """Writes `out`, one row per episode of `data`."""
    with sampler_for(config) as make:
        return sample_with(make, data, out, config.batch)


@contextmanager
def sampler_for(config: SampleFramesConfig) -> Iterator[Callable[[list[Episode]], FrameSampler]]:
    """What makes the configured sampler for some episodes; a model behind it starts when it is first asked and ends with the context."""
    if config.sampler != "htfs":
        yield lambda episodes: Baseline(config.sampler, episodes, config.key_frames + config.reference_frames, config.seed)
        return
    from rollout.htfs_vllm import FrozenModel

    folder = paths.model_folder(config.model, "model")
    model = FrozenModel(folder, config.htfs, config.rollout, dtype=config.dtype, device=config.device)
    try:
        yield lambda episodes: htfs_sampler(config, folder, model)
    finally:
        model.close()


def htfs_sampler(config: SampleFramesConfig, folder: str, ask: Ask) -> HTFS:
    """HTFS with the identity of what answers: the checkpoint's contents, its precision, vLLM's version."""
    from rollout.fingerprints import model_fingerprint

    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    identity = f"{model_fingerprint(folder)} {dtype} vllm {version_of('vllm')}"
    return HTFS(config.htfs, ask, identity, config.key_frames, config.reference_frames, config.seed)


def sample_with(make: Callable[[list[Episode]], FrameSampler], data: Path, out: Path, batch: int) -> Report:
    """As `sample_data`, by the sampler that `make` makes for the episodes. Raises UserError if `out` is no good place for a file."""
    if out.is_dir() or out.resolve().parent == (data if data.is_dir() else data.parent).resolve():
        raise UserError(f"{out} is a folder, or lies beside the episodes and would be taken for one of their shards", "give the name of a file elsewhere")
    episodes, parts = list(read_episodes(data)), out.with_name(f"{out.name}.parts")
    stored = read_samples(out) if out.exists() else []
    kept = KeptSampler(make(episodes), parts, batch, stored)
    rows = kept.rows(episodes)
    if [row.key for row in stored] != [row.key for row in rows]:
        write_samples(rows, out)
    shutil.rmtree(parts, ignore_errors=True)
    return Report(kept.sampled, len(rows) - kept.sampled, _fallbacks(rows))


class KeptSampler:
    """A sampler whose samples are kept in a folder, a file a batch. Where nothing that a sample depends on has changed since, it is not chosen again."""

    def __init__(self, sampler: FrameSampler, folder: Path, batch: int, stored: Sequence[SampleRow] = ()) -> None:
        self.sampled = 0
        self._sampler, self._folder, self._batch, self._files = sampler, folder, batch, sorted(folder.glob("*.parquet"))
        self._known = {row.key: row for row in [*stored, *(row for file in self._files for row in read_samples(file))]}

    def sample(self, episodes: Sequence[Episode]) -> list[FrameSample]:
        return [row.sample for row in self.rows(episodes)]

    def depends_on(self, episode: Episode) -> Any:
        return self._sampler.depends_on(episode)

    def rows(self, episodes: Sequence[Episode]) -> list[SampleRow]:
        """One of each episode. Raises VideoError for a video that cannot be read; what was complete before stays."""
        settings = [json.dumps(self.depends_on(e), sort_keys=True) for e in episodes]
        keys = [sample_key(e, text) for e, text in zip(episodes, settings, strict=True)]
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        for first in range(0, len(missing), self._batch):
            chosen = missing[first : first + self._batch]
            samples = self._sampler.sample([episodes[i] for i in chosen])
            rows = [
                SampleRow(keys[i], episodes[i].episode_id, episodes[i].query, video_fingerprint(episodes[i].video_path), settings[i], sample)
                for i, sample in zip(chosen, samples, strict=True)
            ]
            self._files.append(self._folder / f"{len(self._files):06d}.parquet")
            write_samples(rows, self._files[-1])
            self._known |= {row.key: row for row in rows}
            self.sampled += len(rows)
            print(f"{first + len(chosen)}/{len(missing)} episodes sampled; {fallbacks_line(_fallbacks(rows))}", file=sys.stderr, flush=True)
        return [self._known[key] for key in keys]


def fallbacks_line(fallbacks: Counter[str]) -> str:
    """In words, the most frequent one first."""
    return "fall-backs: " + (", ".join(f"{count} {name}" for name, count in fallbacks.most_common()) or "none")


def _fallbacks(rows: Iterable[SampleRow]) -> Counter[str]:
    return sum((Counter(row.sample.fallbacks) for row in rows), Counter())
