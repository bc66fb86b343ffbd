"""Rollouts on disk: `rollouts/step_NNNNNN.parquet`, one row a completion, enough to train again without vLLM or to look at."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.checkpoints import flush_to_disk
from cluster.errors import DataError

FORMAT = 1
_NAME = re.compile(r"step_(\d{6,})\.parquet")
_RLE = pa.struct([("size", pa.list_(pa.int32(), 2)), ("counts", pa.string())])


@dataclass(frozen=True)
class RolloutRow:
    """One completion of one group. Sizes are (height, width) in pixels; `policy_hw` is the target frame as resized.

    `weight_versions` are spans over the response tokens: (version, number of tokens), in order. `answer_json` holds the
    parsed answer in pixels of the original target frame, None if nothing could be parsed. `masks` are COCO RLEs, one an
    object. `valid` is False if the completion could not be scored (`failure` says why): then `reward` and `advantage`
    are None and it took no part in training. A row without `masks` was scored without them.
    """

    step: int
    group: int
    index: int
    episode_id: str
    query: str
    difficulty: float | None
    difficulty_class: str | None
    video: str
    frame_ids: list[int]
    target_frame: int
    frame_hw: list[int]
    policy_hw: list[int]
    grid_thw: list[list[int]]
    units: str
    prompt_text: str
    prompt_token_ids: list[int]
    prompt_fingerprint: str
    processor_fingerprint: str
    response_text: str
    response_token_ids: list[int]
    rollout_logprobs: list[float]
    weight_versions: list[tuple[str, int]]
    seed: int
    finish_reason: str
    valid: bool
    failure: str | None
    answer_json: str | None
    reward: float | None
    reward_terms: dict[str, float]
    length_factor: float | None
    box_iou: float | None
    mask_iou: float | None
    advantage: float | None
    masks: list[dict[str, Any]] | None


SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int32()),
        ("index", pa.int32()),
        ("episode_id", pa.string()),
        ("query", pa.string()),
        ("difficulty", pa.float64()),
        ("difficulty_class", pa.string()),
        ("video", pa.string()),
        ("frame_ids", pa.list_(pa.int32())),
        ("target_frame", pa.int32()),
        ("frame_hw", pa.list_(pa.int32(), 2)),
        ("policy_hw", pa.list_(pa.int32(), 2)),
        ("grid_thw", pa.list_(pa.list_(pa.int32(), 3))),
        ("units", pa.string()),
        ("prompt_text", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("prompt_fingerprint", pa.string()),
        ("processor_fingerprint", pa.string()),
        ("response_text", pa.string()),
        ("response_token_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("weight_versions", pa.list_(pa.struct([("version", pa.string()), ("tokens", pa.int32())]))),
        ("seed", pa.int64()),
        ("finish_reason", pa.string()),
        ("valid", pa.bool_()),
        ("failure", pa.string()),
        ("answer_json", pa.string()),
        ("reward", pa.float64()),
        ("reward_terms", pa.map_(pa.string(), pa.float64())),
        ("length_factor", pa.float64()),
        ("box_iou", pa.float64()),
        ("mask_iou", pa.float64()),
        ("advantage", pa.float64()),
        ("masks", pa.list_(_RLE)),
    ]
)


def write_rollouts(folder: str | Path, step: int, rows: Sequence[RolloutRow], extra: Mapping[str, str] | None = None) -> Path:
    """Write one step's rows in order of (group, index); `extra` (texts: weight hash, config fingerprint) goes into the file's metadata.

    The file appears under its name only when it is complete. Raises DataError if a row contradicts itself.
    """
    ordered = sorted(rows, key=lambda r: (r.group, r.index))
    for row in ordered:
        _check(row, step)
    columns = [pa.array([_plain(f.name, getattr(row, f.name)) for row in ordered], type=f.type) for f in SCHEMA]
    metadata = {"format": str(FORMAT), "step": str(step), **(extra or {})}
    table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = file_of(folder, step)
    temporary = final.with_name(f".{final.name}.tmp")
    # A group's rows share prompt, query and frames; the dictionary stores them once.
    pq.write_table(table, temporary, compression="zstd", use_dictionary=True)
    flush_to_disk(temporary)
    os.replace(temporary, final)
    return final


def read_rollouts(file: str | Path) -> list[RolloutRow]:
    """The rows of one file. Raises DataError if it is not a rollout file or lacks columns."""
    table = _read(file, None)
    names = [f.name for f in fields(RolloutRow)]
    return [RolloutRow(**{n: _restored(n, row[n]) for n in names}) for row in table.to_pylist()]


def read_columns(file: str | Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Some columns of one file as lists, without reading the rest."""
    unknown = [c for c in columns if c not in SCHEMA.names]
    if unknown:
        raise DataError(f"rollout files have no column {', '.join(unknown)}", f"the columns are {', '.join(SCHEMA.names)}")
    table = _read(file, list(columns))
    return {c: [_restored(c, v) for v in table.column(c).to_pylist()] for c in columns}


def read_metadata(file: str | Path) -> dict[str, str]:
    """What `extra` held, and `format` and `step`."""
    metadata = pq.read_schema(file).metadata or {}
    return {k.decode(): v.decode() for k, v in metadata.items() if not k.startswith(b"ARROW:")}


def file_of(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}.parquet"


def rollout_files(folder: str | Path) -> Iterator[tuple[int, Path]]:
    """(step, file) of every finished step, in order."""
    matches = [(_NAME.fullmatch(p.name), p) for p in Path(folder).iterdir()] if Path(folder).is_dir() else []
    yield from sorted((int(m[1]), p) for m, p in matches if m)


def drop_after(folder: str | Path, step: int) -> list[int]:
    """Delete the files of steps later than `step` (a resumed run makes them again) and unfinished ones; returns their steps."""
    dropped = []
    for later, path in rollout_files(folder):
        if later > step:
            path.unlink()
            dropped.append(later)
    for path in Path(folder).glob(".step_*.parquet.tmp"):
        path.unlink()
    return dropped


def _check(row: RolloutRow, step: int) -> None:
    problem = None
    if row.step != step:
        problem = f"is of step {row.step}"
    elif len(row.response_token_ids) != len(row.rollout_logprobs):
        problem = f"has {len(row.response_token_ids)} response tokens but {len(row.rollout_logprobs)} log-probs"
    elif sum(n for _, n in row.weight_versions) != len(row.response_token_ids):
        problem = f"has weight versions for {sum(n for _, n in row.weight_versions)} of {len(row.response_token_ids)} response tokens"
    elif row.valid and row.reward is None:
        problem = "is valid but has no reward"
    if problem:
        raise DataError(f"rollout {row.group}/{row.index} of episode {row.episode_id}, step {step}, {problem}", "this is a defect: report it")


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if name == "weight_versions":
        return [{"version": str(v), "tokens": int(n)} for v, n in value]
    if name == "reward_terms":
        return list(value.items())
    if name == "masks" and value is not None:
        return [{"size": list(m["size"]), "counts": m["counts"]} for m in value]
    return value


def _restored(name: str, value: Any) -> Any:
    if name == "weight_versions":
        return [(span["version"], span["tokens"]) for span in value]
    return dict(value) if name == "reward_terms" else value


def _read(file: str | Path, columns: list[str] | None) -> pa.Table:
    remedy = "give a file from a run's rollouts/ folder"
    wanted = columns or SCHEMA.names
    try:
        names = pq.read_schema(file).names
        missing = [c for c in wanted if c not in names]
        if not missing:
            return pq.read_table(file, columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}", remedy) from error
    raise DataError(f"{file} lacks the columns {', '.join(missing)}", remedy)
