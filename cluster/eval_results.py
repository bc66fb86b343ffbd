"""What `videoseg eval` leaves: scores.json, a Parquet row for each expression, a zip for a server, and the difference of two such results."""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.episodes import Episode

from cluster.benchmark_scores import BenchmarkScores
from cluster.checkpoints import replace_text
from cluster.errors import UserError
from cluster.expression_scores import SCORED, ExpressionScore

SCORES, EXPRESSIONS = "scores.json", "expressions.parquet"


def write_scores(scores: BenchmarkScores, out: Path, answers: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """scores.json with both columns, and expressions.parquet with a row an expression: what it scored, and of its answer status and lengths."""
    table = []
    for e in scores.expressions:
        answer = answers.get(e.episode_id, {})
        table.append(asdict(e) | {f"answer_{k}": answer.get(k) for k in ("status", "response_tokens", "reasoning_words")})
    partial = out / f".{EXPRESSIONS}.partial"
    pq.write_table(pa.Table.from_pylist(table, _EXPRESSION_SCHEMA), partial)
    os.replace(partial, out / EXPRESSIONS)
    words = [a["reasoning_words"] for a in answers.values() if a.get("reasoning_words") is not None]
    failures = [{"episode_id": e.episode_id, "why": e.status, "detail": e.detail, "answer": answers.get(e.episode_id, {}).get("status")} for e in scores.failures]
    record = {"benchmark": scores.benchmark, "expressions": len(scores.expressions), "official": scores.official, "strict": scores.strict}
    write_json(out / SCORES, record | {"mean_reasoning_words": float(np.mean(words)) if words else None, "without_score": failures, "notes": scores.notes})


_KINDS = {"str": pa.string(), "str | None": pa.string(), "int": pa.int64(), "float": pa.float64()}
_EXPRESSION_SCHEMA = pa.schema(
    [(f.name, _KINDS[f.type]) for f in fields(ExpressionScore)]
    + [("answer_status", pa.string()), ("answer_response_tokens", pa.int64()), ("answer_reasoning_words", pa.int64())]
)


def table_lines(scores: BenchmarkScores) -> list[str]:
    """Both columns as text."""
    show = lambda value: "-" if value is None else f"{value:.2f}"
    width = max(map(len, scores.strict))
    lines = [f"{'':{width}}  official  strict"]
    lines += [f"{name:{width}}  {show(scores.official[name]):>8}  {show(scores.strict[name]):>6}" for name in scores.strict]
    lines.append(f"{len(scores.expressions)} expressions, {len(scores.failures)} of them without a usable prediction")
    lines += [f"  {count} {status}" for status, count in Counter(e.status for e in scores.failures).most_common()]
    return lines + [f"note: {note}" for note in scores.notes]


def write_zip(predictions: Path, file: Path, top: str, episodes: Iterable[Episode]) -> str:
    """The predictions as a server takes them: `top`/<video>/<expression>/<frame>.png. Returns what is in it, and what of the episodes is not. Raises
    UserError where nothing is."""
    images = sorted(p for p in predictions.rglob("*.png") if not any(part.startswith(".") for part in p.relative_to(predictions).parts))
    if not images:
        raise UserError(f"{predictions} holds no predictions", "run videoseg eval with a policy first")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for image in images:
            archive.write(image, Path(top) / image.relative_to(predictions))
    os.replace(partial, file)
    lacking = [e.episode_id for e in episodes if not (predictions / e.video_id / e.expression_id).is_dir()]
    return f"{file}: {len(images)} images" + (f"; {len(lacking)} expressions have none, such as {lacking[0]}" if lacking else "")


def write_json(file: Path, content: Any) -> None:
    replace_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Difference:
    """How much better the second of two policies is: percent points of `measure` in the strict column, with its 95% interval over resampled videos."""

    measure: str
    first: float
    second: float
    low: float
    high: float
    videos: int

    def __str__(self) -> str:
        return f"{self.measure}: {self.first:.2f} -> {self.second:.2f}, {self.second - self.first:+.2f} (95% interval {self.low:+.2f} to {self.high:+.2f}, bootstrap over {self.videos} videos)"


def compare(first: Path, second: Path, resamples: int = 2000, seed: int = 0) -> Difference:
    """Two evaluations (their OUT folders) of the same expressions. Videos are resampled, with all their expressions, as those are not independent.

    The measure is J&F over expressions (ReVOS: the mean of both types'), gIoU of images. Raises UserError where the expressions differ.
    """
    tables = [_rows(folder) for folder in (first, second)]
    if only := sorted(tables[0].keys() ^ tables[1].keys()):
        raise UserError(f"{first} and {second} are about different expressions, {only[0]} among {len(only)} that only one has", "evaluate both on the same data set")
    images = any(row["union"] for row in tables[0].values())
    revos = next(iter(tables[0])).startswith("revos/")
    names = [n for n, row in tables[0].items() if not revos or row["query_type"] in ("referring", "reasoning")]
    kinds = sorted({tables[0][n]["query_type"] for n in names}) if revos else [None]
    videos = sorted({tables[0][n]["video_id"] for n in names})
    place, kind_of = {v: i for i, v in enumerate(videos)}, lambda n: kinds.index(tables[0][n]["query_type"]) if revos else 0
    sums_2VK, counts_VK = np.zeros((2, len(videos), len(kinds))), np.zeros((len(videos), len(kinds)))
    for n in names:
        at = place[tables[0][n]["video_id"]], kind_of(n)
        counts_VK[at] += 1
        for which, table in enumerate(tables):
            sums_2VK[which][at] += _value(table[n], images)
    weights_BV = np.random.default_rng(seed).multinomial(len(videos), np.full(len(videos), 1 / len(videos)), resamples)
    weights_BV = np.vstack([np.ones(len(videos)), weights_BV])  # first of all the videos as they are
    with np.errstate(invalid="ignore"):
        means_2B = np.nanmean(100 * (weights_BV @ sums_2VK) / (weights_BV @ counts_VK), axis=2)
    low, high = np.nanpercentile((means_2B[1] - means_2B[0])[1:], [2.5, 97.5])
    return Difference("gIoU" if images else "J&F", float(means_2B[0, 0]), float(means_2B[1, 0]), float(low), float(high), len(videos))


def check_against(first: Path, second: Path, episodes: Iterable[Episode]) -> None:
    """What `compare` will need, before `second` is evaluated on these episodes. Raises UserError."""
    if first.resolve() == second.resolve():
        raise UserError(f"--against and --out are both {second}", "give two folders")
    if others := sorted(_rows(first).keys() - {e.episode_id for e in episodes}):
        raise UserError(f"{first} is about other expressions, {others[0]} among {len(others)}", "evaluate both on the same data set")


def _rows(folder: Path) -> dict[str, dict]:
    file = folder / EXPRESSIONS
    if not file.is_file():
        raise UserError(f"{file} is missing", "give the OUT folder of a finished `videoseg eval`")
    return {row["episode_id"]: row for row in pq.read_table(file).to_pylist()}


def _value(row: Mapping[str, Any], images: bool) -> float:
    if not images:
        return (row["j"] + row["f"]) / 2
    return row["intersection"] / row["union"] if row["union"] else float(row["status"] == SCORED)
