"""From the scores of expressions to the numbers of a benchmark, in two columns.

official: what the benchmark's own program prints, with its rule for predictions that are missing or broken. strict: each of them counts 0,
which is what it is worth, so that two policies compare. They agree where every expression has its prediction. All numbers are percent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reward_service.measures import ciou, giou
from rollout.episodes import Episode

from cluster.davis_merged import MergedScore, merge_annotators, score_merged
from cluster.errors import UserError
from cluster.expression_scores import NO_VIDEO, ExpressionScore, by_video, has_truth, over_videos, score_video

Column = dict[str, float]
Rows = Sequence[ExpressionScore]


@dataclass(frozen=True)
class BenchmarkScores:
    """official, strict: measure -> percent, None where there is nothing to average. expressions: what each of them scored, failures included."""

    benchmark: str
    official: dict[str, float | None]
    strict: dict[str, float | None]
    expressions: list[ExpressionScore] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[ExpressionScore]:
        return [e for e in self.expressions if not e.scored]


def score_predictions(benchmark: str, episodes: Iterable[Episode], folder: Path, workers: int = 1, progress: Callable[[int, int], None] | None = None) -> BenchmarkScores:
    """The numbers of a benchmark for the predictions in a folder (laid out as `cluster.expression_scores` says).

    benchmark: the episodes' source: a name of `videoseg data import`, or another one, whose videos get J&F over expressions as well and images
    gIoU and cIoU. progress: told (videos done, videos). Expressions whose masks are not public are left out, with a note. Raises UserError where
    the episodes are another's, or none has public masks.
    """
    episodes, notes = list(episodes), []
    check_source(benchmark, episodes)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of predictions", "give the folder that holds one folder for each video")
    if benchmark == "reasonseg" and (others := sum(e.expression_id != "0" for e in episodes)):
        episodes = [e for e in episodes if e.expression_id == "0"]  # LISA evaluates the first text of an image
        notes.append(f"{others} further texts of images are left out: the benchmark asks for the first")
    if hidden := [e.episode_id for e in episodes if not has_truth(e)]:
        episodes = [e for e in episodes if has_truth(e)]
        notes.append(f"{len(hidden)} expressions whose masks are not public are left out, such as {hidden[0]}")
    if not episodes:
        raise UserError(f"{hidden[0]}: its masks are not public, as no other's are", "score a split whose masks are, or hand the predictions in (--zip)")
    videos = list(by_video(episodes).values())
    rows, merged = [], []
    for done, of_video in enumerate(over_videos(_score, videos, folder, workers), 1):
        rows += of_video[0]
        merged += of_video[1]
        if progress:
            progress(done, len(videos))
    official, strict = RULES.get(benchmark, _images if episodes[0].media == "image" else _plain)(rows)
    if merged:
        official, strict = merge_annotators(merged, False) | official, merge_annotators(merged, True) | strict
    return BenchmarkScores(benchmark, *({k: None if math.isnan(v) else v for k, v in column.items()} for column in (official, strict)), rows, notes)


def check_source(benchmark: str, episodes: Sequence[Episode]) -> None:
    """Raises UserError where these are not the benchmark's episodes, or none, or where their ids name no folder of their own for each expression."""
    found = sorted({e.source for e in episodes})
    if found != [benchmark]:
        known = "" if benchmark in RULES else f" (benchmarks: {', '.join(RULES)})"
        raise UserError(f"the data are not of {benchmark!r} but of {', '.join(map(repr, found)) or 'nothing'}{known}", "give the data set of `videoseg data import`, and its name as BENCHMARK")
    places: set[tuple[str, str]] = set()
    for e in episodes:
        place = e.video_id, e.expression_id
        if not all(place) or any(Path(p).is_absolute() or ".." in Path(p).parts for p in place):
            raise UserError(f"{e.episode_id}: video_id {e.video_id!r} and expression_id {e.expression_id!r} are to name a folder of predictions", "give both, as relative paths without ..")
        if place in places:
            raise UserError(f"{e.episode_id}: another episode has video_id {e.video_id!r} and expression_id {e.expression_id!r} too", "give one split, in which they differ")
        places.add(place)
    if len({e.media for e in episodes}) > 1:
        raise UserError("the data hold images and videos, which have different measures", "put them into data sets of their own")


def _score(episodes: list[Episode], folder: Path) -> tuple[list[ExpressionScore], list[MergedScore]]:
    return score_video(episodes, folder), score_merged(episodes, folder) if episodes[0].source == "ref_davis17" else []


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def _j_and_f(rows: Rows) -> Column:
    """Means over expressions, not over videos; of nothing: NaN."""
    j, f = 100 * _mean(r.j for r in rows), 100 * _mean(r.f for r in rows)
    return {"J&F": (j + f) / 2, "J": j, "F": f}


def _mevis(rows: Rows) -> tuple[Column, Column]:
    """MeViS's eval_mevis.py. A video without a folder counts 0; an expression whose images are missing or broken ends one of the program's
    processes and with it is left out of the means."""
    return _j_and_f([r for r in rows if r.scored or r.status == NO_VIDEO]), _j_and_f(rows)


def _ref_davis17(rows: Rows) -> tuple[Column, Column]:
    """Each expression for itself, as VISA's eval_davis17.py, which is MeViS's program, and rounds what it prints. The four-annotator protocol
    comes from `cluster.davis_merged`."""
    official, strict = ({f"{name} per expression": value for name, value in column.items()} for column in _mevis(rows))
    return {name: round(value, 2) for name, value in official.items()}, strict


def _reasonvos(rows: Rows) -> tuple[Column, Column]:
    """VideoLISA's eval_reason_vos.py: what has no prediction is left out."""
    return _j_and_f([r for r in rows if r.scored]), _j_and_f(rows)


def _plain(rows: Rows) -> tuple[Column, Column]:
    """Where no program is public (Ref-YouTube-VOS is scored by a server) or there is none: whatever fails counts 0 in both columns."""
    return _j_and_f(rows), _j_and_f(rows)


def _revos(rows: Rows) -> tuple[Column, Column]:
    """VISA's eval_revos.py: whatever fails counts 0, each expression's numbers are rounded to two decimals, the overall number is the mean
    of the two types', and queries without a target are in none. R is the published one; "R (0/1)" that of evaluators which read run-length
    masks. The strict column does not round."""
    values = {"J": "j", "F": "f", "A": "accuracy", "R": "robustness_255", "R (0/1)": "robustness"}
    columns: list[Column] = []
    for rounded in (lambda x: round(100 * x, 2), lambda x: 100 * x):
        column: Column = {}
        for kind in ("referring", "reasoning"):
            mine = [r for r in rows if r.query_type == kind]
            means = {name: _mean(rounded(getattr(r, value)) for r in mine) for name, value in values.items()}
            column |= {f"{name} {kind}": value for name, value in ({"J&F": (means["J"] + means["F"]) / 2} | means).items()}
        overall = {f"{name} overall": (column[f"{name} referring"] + column[f"{name} reasoning"]) / 2 for name in ("J&F", *values)}
        columns.append(overall | column)
    return columns[0], columns[1]


def _images(rows: Rows) -> tuple[Column, Column]:
    """LISA's evaluation of ReasonSeg and RefCOCO: gIoU and cIoU. It never lacks a prediction, so both columns count a missing one as no pixel."""
    shared = [r.intersection for r in rows]
    unions = [r.union for r in rows], [r.union if r.scored else max(r.union, 1) for r in rows]  # 0 would earn a missing prediction full marks
    official, strict = ({"gIoU": 100 * giou(shared, either), "cIoU": 100 * ciou(shared, either)} for either in unions)
    return official, strict


RULES: Mapping[str, Callable[[Rows], tuple[Column, Column]]] = {
    "revos": _revos,
    "mevis": _mevis,
    "ref_youtube_vos": _plain,
    "ref_davis17": _ref_davis17,
    "reasonvos": _reasonvos,
    **dict.fromkeys(("reasonseg", "refcoco", "refcoco+", "refcocog"), _images),
}
