"""Imports a benchmark: its items in shards, several at a time, resumable, with a report of what was left out and why.

    OUT/<split>           shard-NNNNN.parquet, report.json: there only when the split is complete
    OUT/<split>.partial   the same while it is being made; a later command goes on after its last whole shard

The order of the episodes is that of the items, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as pq

from rollout.episodes import SCHEMA_VERSION, Episode, write_episodes
from rollout.importers.convert import Skipped, convert
from rollout.importers.item import Benchmark, Item, SourceError
from rollout.importers.mevis import MEVIS
from rollout.importers.own import OWN
from rollout.importers.reasonseg import REASONSEG
from rollout.importers.reasonvos import REASONVOS
from rollout.importers.ref_davis17 import REF_DAVIS17
from rollout.importers.ref_youtube_vos import REF_YOUTUBE_VOS
from rollout.importers.refcoco import REFCOCO, REFCOCO_PLUS, REFCOCOG
from rollout.importers.revos import REVOS
from rollout.importers.visionreasoner import VISIONREASONER
from rollout.report_file import REPORT, read_report, write_report

BENCHMARKS = {
    b.name: b
    for b in (REVOS, MEVIS, REF_YOUTUBE_VOS, REF_DAVIS17, REASONVOS, REASONSEG, REFCOCO, REFCOCO_PLUS, REFCOCOG, VISIONREASONER, OWN)
}
EXAMPLES = 10
"""Skipped queries of one reason that a report names."""


def import_data(
    kind: str,
    source: str | Path,
    out: str | Path,
    splits: Sequence[str] = (),
    workers: int = 1,
    keep_suspect: bool = False,
    shard_items: int = 64,
    progress: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Imports the splits (default: all that are there) of a benchmark in `source` to `out`; returns split -> report.

    workers: processes. keep_suspect: keep doubtful masks in the training split too. shard_items: videos or images a shard.
    Raises SourceError where a split's files are not there, DataError where `out` holds another import.
    """
    benchmark, source, out = BENCHMARKS[kind], Path(source), Path(out)
    unknown = [s for s in splits if s not in benchmark.splits]
    if unknown:
        raise SourceError(f"{kind} has no split {', '.join(unknown)}; its splits are {', '.join(benchmark.splits)}")
    here = [s for s in benchmark.splits if benchmark.files(source, s)[0].exists()]
    missing = [s for s in splits or (() if here else benchmark.splits) if s not in here]
    if missing:
        looked = ", ".join(str(benchmark.files(source, s)[0]) for s in missing)
        raise SourceError(f"{source} is not {kind} as its authors lay it out; looked for {looked}. docs/data.md shows the folders")
    with _pool(workers) as run:
        reports = {s: _import_split(benchmark, source, out, s, run, keep_suspect, shard_items, progress) for s in splits or here}
    empty = [s for s, report in reports.items() if report is None]
    if splits and empty or len(empty) == len(reports):
        raise SourceError(f"{source}: {', '.join(empty)} of {kind} lists no video or image; download the data set again")
    return {s: report for s, report in reports.items() if report is not None}


def _import_split(
    benchmark: Benchmark, source: Path, out: Path, split: str, run: Callable, keep_suspect: bool, shard_items: int, progress: Callable[[str], None]
) -> dict | None:
    """The report of one split; None if there is nothing in it."""
    folder, partial_folder = out / split, out / f"{split}.partial"
    settings = {
        "benchmark": benchmark.name,
        "source": str(source.resolve()),
        "split": split,
        "schema_version": SCHEMA_VERSION,
        "keep_suspect": keep_suspect,
        "shard_items": shard_items,
        "annotation_sha256": _hashes(benchmark.files(source, split), source),
    }
    if folder.exists():
        report = read_report(folder, settings, "import")
        progress(f"{benchmark.name}/{split}: already imported to {folder}")
        return report
    items = _items(benchmark, source, split, out)
    if not items:
        return None
    partial_folder.mkdir(parents=True, exist_ok=True)
    if not (partial_folder / REPORT).exists():
        write_report(partial_folder, settings)
    read_report(partial_folder, settings, "import")
    shards = [items[i : i + shard_items] for i in range(0, len(items), shard_items)]
    task = partial(convert, source=benchmark.name, split=split, folder=folder, keep_suspect=keep_suspect)
    begin, done_before = time.monotonic(), 0
    skipped: dict[str, dict] = {}
    counts = {"items": len(items), "queries": sum(len(i.queries) for i in items), "episodes": 0, "skipped": 0}
    for n, shard in enumerate(shards):
        file = partial_folder / f"shard-{n:05d}.parquet"
        if file.exists():
            done_before += len(shard)
        else:
            _write_shard(file, run(task, shard))
        metadata = pq.read_metadata(file)
        counts["episodes"] += metadata.num_rows
        for reason, found in json.loads(metadata.metadata[b"skipped"]).items():
            total = skipped.setdefault(reason, {"queries": 0, "examples": []})
            total["queries"] += found["queries"]
            total["examples"] = (total["examples"] + found["examples"])[:EXAMPLES]
            counts["skipped"] += found["queries"]
        done = min((n + 1) * shard_items, len(items))
        rate = (done - done_before) / max(time.monotonic() - begin, 1e-9)
        left = f", {(len(items) - done) / rate:.0f} s left" if rate and done < len(items) else ""
        progress(f"{benchmark.name}/{split}: {done}/{len(items)} videos or images, {counts['episodes']} episodes, {counts['skipped']} skipped{left}")
    report = settings | counts | {"skipped_by_reason": skipped, "notes": _notes(benchmark, split, settings, counts)}
    write_report(partial_folder, report)
    os.replace(partial_folder, folder)
    return report


def _items(benchmark: Benchmark, source: Path, split: str, out: Path) -> list[Item]:
    try:
        return benchmark.items(source, split, out)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        files = ", ".join(str(f) for f in benchmark.files(source, split)[:3])
        what = f"{type(error).__name__}: {error}"
        raise SourceError(f"the annotation of {split} is not in the layout of {benchmark.name} ({what}) in one of {files}; download it again") from error


def _write_shard(file: Path, results: Iterator[tuple[list[Episode], list[Skipped]]]) -> None:
    episodes, skipped = [], {}
    for found, left_out in results:
        episodes += found
        for skip in left_out:
            reason = skipped.setdefault(skip.reason, {"queries": 0, "examples": []})
            reason["queries"] += 1
            reason["examples"] = (reason["examples"] + [skip.where])[:EXAMPLES]
    write_episodes(episodes, file, metadata={"skipped": json.dumps(skipped)})


def _notes(benchmark: Benchmark, split: str, settings: Mapping, counts: Mapping) -> list[str]:
    """What a person should know about the release that was imported."""
    notes = []
    for what, expected in zip(("items", "queries"), benchmark.published.get(split, ())):
        if expected is not None and counts[what] != expected:
            what_found = "queries" if what == "queries" else "videos or images"
            notes.append(f"{counts[what]} {what_found}; the release that papers report on has {expected}")
    for file, known in benchmark.sha256.items():
        found = settings["annotation_sha256"].get(file)
        if found and not found.startswith(known):
            notes.append(f"{file} is not the published file: its SHA-256 begins {found[:16]}, not {known}")
    return notes


def _hashes(files: Sequence[Path], source: Path) -> dict[str, str]:
    """SHA-256 of each annotation file; of many, one over all."""
    missing = [str(f) for f in files if not f.exists()]
    if missing:
        raise SourceError(f"{', '.join(missing)} is missing; download the data set in full")
    digests = {}
    for file in files:
        with file.open("rb") as handle:
            digests[file.relative_to(source).as_posix()] = hashlib.file_digest(handle, "sha256").hexdigest()
    if len(digests) > 8:
        return {f"{len(digests)} files": hashlib.sha256(json.dumps(digests).encode()).hexdigest()}
    return digests


@contextmanager
def _pool(workers: int):
    """`map` over processes, or in this one."""
    if workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)
