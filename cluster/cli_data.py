"""The commands about data: `videoseg data ...` and `videoseg sample-frames`. As in `cluster.cli`, everything heavy is imported inside the commands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from cluster.cli_parsing import add_command, file_and_overrides
from cluster.errors import UserError

_EPISODES: dict[str, str] = dict(metavar="DATA", help="episodes: a folder with Parquet shards, or one file")


def add_to(commands: Any) -> None:
    """Their parsers, into those of `videoseg`."""
    data = commands.add_parser("data", help="Make or import episodes.", description="Make or import episodes.")
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = add_command(kinds, "toy", toy_data, "videoseg data toy data/toy", "Writes Parquet episodes and JPEG frames for train, validation and test.")
    command.add_argument("out", metavar="OUT", help="folder to make")
    command.add_argument("--seed", type=int, default=0, help="seed of the world (default 0)")

    rule = (
        "Training and evaluation take the file as data.train_frames and data.evaluation_frames. Run it again after an interruption or a\n"
        "change: an episode is sampled anew only if something that its sample depends on has changed."
    )
    example = "videoseg sample-frames data/valid frames/valid.parquet --model Qwen/Qwen2.5-VL-7B-Instruct htfs.intervals=8"
    command = add_command(commands, "sample-frames", sample_frames, example, rule)
    command.add_argument("data", **_EPISODES)
    command.add_argument("out", metavar="OUT", help="file to write")
    command.add_argument("settings", metavar="[CONFIG] key=value", nargs="*", help="YAML file of settings, and changes to it")
    command.add_argument("--sampler", metavar="NAME", help="htfs (default), or for comparison uniform, middle, first, random, oracle")
    command.add_argument("--model", help="model that htfs asks: a Hugging Face folder or a hub id")
    command.add_argument("--show", action="store_true", help="print the settings with their meaning, and end")

    more = (
        "KIND is revos, mevis, ref_youtube_vos, ref_davis17, reasonvos, reasonseg, refcoco, refcoco+, refcocog, visionreasoner (the\n"
        "training sets of Seg-Zero and VisionReasoner), or own: your videos, with SRC/queries.csv. docs/data.md shows each layout. Frames stay where\n"
        "they are. Run it again after an interruption: whole shards are kept. OUT/SPLIT/report.json says what was left out, and why."
    )
    command = add_command(kinds, "import", import_data, "videoseg data import mevis downloads/mevis data/mevis", more)
    command.add_argument("kind", metavar="KIND", help="the benchmark")
    command.add_argument("source", metavar="SRC", help="folder that holds it")
    command.add_argument("out", metavar="OUT", help="folder for the episodes: OUT/train and so on")
    command.add_argument("--splits", metavar="A,B", help="splits to import (default: all that are there)")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one a CPU)")
    command.add_argument("--keep-suspect", action="store_true", help="keep, in train too, masks of a release that are known to be doubtful")

    more = (
        "DATA may also be a folder of splits. With --check the exit status is 2 if any episode cannot be used. --oracle shows the segmenter\n"
        "each target's true box and point, as a right answer would, and compares its mask with the true one. With --out a copy is written\n"
        "without the episodes of which it misses a target; run it again after an interruption: it goes on."
    )
    command = add_command(kinds, "inspect", inspect_data, "videoseg data inspect data/mevis/train --check --sheet mevis.png --oracle", more)
    command.add_argument("data", **_EPISODES)
    command.add_argument("--check", action="store_true", help="compare every episode with its media: sizes, masks, boxes, points, ids")
    command.add_argument("--sheet", metavar="FILE.png", help="draw some episodes with their masks")
    command.add_argument("--episodes", type=int, default=12, metavar="N", help="episodes on the sheet (default 12)")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one a CPU)")
    command.add_argument("--oracle", action="store_true", help="report the segmenter's IoU where it is prompted with the truth")
    command.add_argument("--segmenter", metavar="SAM2", help="its folder or hub id (default facebook/sam2.1-hiera-large)")
    command.add_argument("--frames", type=int, metavar="N", help="most frames a target, evenly (default: all on which it has a mask)")
    command.add_argument("--drop-below", type=float, metavar="IOU", help="mean IoU over its frames under which a target is missed (default 0.6)")
    command.add_argument("--out", metavar="OUT", help="folder for a copy without the episodes of which a target is missed")

    more = (
        "vLLM runs the model here, on the GPUs of this machine or its CPU; with --endpoint any OpenAI-compatible service that takes\n"
        "images is asked instead. Run it again after an interruption: replies are kept in OUT/ratings.jsonl, and no question is asked twice."
    )
    example = "videoseg data difficulty data/train data/train_rated --model Qwen/Qwen2.5-VL-72B-Instruct --vllm tensor_parallel_size=4"
    command = add_command(kinds, "difficulty", difficulty, example, more)
    command.add_argument("data", **_EPISODES)
    command.add_argument("out", metavar="OUT", help="folder for the rated copy; its episodes refer to the same videos")
    command.add_argument("--model", required=True, help="checkpoint folder or hub id; with --endpoint the name that it knows")
    command.add_argument("--endpoint", metavar="URL", help="ask a service: base URL, usually ending in /v1")
    command.add_argument("--vllm", action="append", default=[], metavar="KEY=VALUE", help="argument of vLLM's engine, such as max_model_len=16384; may be repeated")
    variants = ("videoseg_r1", "pixelthink")
    command.add_argument("--variant", choices=variants, default=variants[0], help="five aspects (VideoSeg-R1, default) or three (PixelThink)")
    command.add_argument("--only-missing", action="store_true", help="leave episodes alone that have a difficulty")
    command.add_argument("--frames", type=int, default=8, help="frames shown, evenly over the video (default 8)")
    command.add_argument("--side", type=int, default=448, help="longest side of a frame as shown, pixels (default 448)")
    command.add_argument("--requests", type=int, help="requests in flight (default 64, with --endpoint 8)")
    command.add_argument("--tries", type=int, default=4, help="requests an episode before it is left unrated (default 4)")
    command.add_argument("--max-failures", type=int, default=20, help="unrated episodes of a shard before the command stops (default 20)")
    command.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the key (default OPENAI_API_KEY)")


def toy_data(options: argparse.Namespace) -> None:
    """Generate the toy world's videos and episodes."""
    out = Path(options.out)
    if out.exists():
        raise UserError(f"there is already something at {out}", "give a folder that does not exist yet")
    from rollout.toy_data import ToyDataConfig, write_toy_data

    write_toy_data(out, ToyDataConfig(seed=options.seed))
    print(f"toy world written to {out}: train on {out}/train, validate on {out}/valid_u, test on {out}/valid")


def import_data(options: argparse.Namespace) -> None:
    """Import a public benchmark: its queries and masks become Parquet episodes that refer to its frames."""
    from rollout.importers import driver

    if options.kind not in driver.BENCHMARKS:
        raise UserError(f"there is no importer {options.kind!r}", f"choose one of {', '.join(driver.BENCHMARKS)}")
    splits = [s for s in (options.splits or "").split(",") if s]
    workers = options.workers or os.cpu_count() or 1
    reports = driver.import_data(options.kind, options.source, options.out, splits, workers, options.keep_suspect)
    for split, report in reports.items():
        print(f"{options.out}/{split}: {report['episodes']} episodes of {report['queries']} queries about {report['items']} videos or images")
        for reason, found in report["skipped_by_reason"].items():
            print(f"  skipped {found['queries']}: {reason} (such as {found['examples'][0]})")
        for note in report["notes"]:
            print(f"  note: {note}")
    print(f"details are in {options.out}/<split>/report.json; `videoseg data inspect {options.out} --check` looks at the result")


def inspect_data(options: argparse.Namespace) -> None:
    """Print what a data set holds; check it; draw a sheet of its frames, masks and queries; prompt the segmenter with its truth."""
    from cluster import inspect_data

    given = {name: value for name in ("segmenter", "frames", "drop_below", "out") if (value := getattr(options, name)) is not None}
    if given and not options.oracle:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is for --oracle, which is not given", "add --oracle")
    if options.oracle:
        from cluster.inspect_oracle import OracleConfig, inspect

        out = given.pop("out", None)
        config = OracleConfig(**given)
    bad, folders, workers = 0, inspect_data.data_folders(Path(options.data)), options.workers or os.cpu_count() or 1
    for folder in folders:
        found = inspect_data.look(folder, options.check, workers)
        print(f"{folder}: " + "\n".join(found.lines()))
        for what, where in found.problems.items():
            print(f"  PROBLEM in {len(where)} episodes: {what} (such as {', '.join(where[:3])})")
        bad += len({name for where in found.problems.values() for name in where})
    if options.sheet:
        from cluster.contact_sheet import write_sheet

        print(f"{write_sheet(folders, Path(options.sheet), options.episodes)} episodes drawn to {options.sheet}")
    if bad:
        raise UserError(f"{bad} episodes of {options.data} cannot be used as they are", "restore the media, or import the data set again")
    if options.check:
        print("checked: no problems")
    if options.oracle:
        for folder, report in inspect(folders, config, out and Path(out), workers):
            print(f"{folder}: " + "\n".join(report.lines()))
        if out:
            print(f"what stays is in {out}; report.json there says what went, oracle.jsonl what each target's IoU is on each frame")


def difficulty(options: argparse.Namespace) -> None:
    """Let a vision-language model rate how difficult each query is; writes a copy of the data set with the ratings."""
    from cluster.config_file import read_settings
    from cluster.rate_difficulty import RatingConfig, rate_data, summary

    config = RatingConfig(
        model=options.model,
        endpoint=options.endpoint,
        variant=options.variant,
        frames=options.frames,
        side=options.side,
        requests=options.requests,
        tries=options.tries,
        max_failures=options.max_failures,
        api_key=os.environ.get(options.api_key_env, ""),
        vllm=read_settings(None, options.vllm)[0],
    )
    counts = rate_data(Path(options.data), Path(options.out), config, options.only_missing)
    print(f"rated episodes written to {options.out}: {summary(counts)}")


def sample_frames(options: argparse.Namespace) -> None:
    """Choose the frames that prompts show, and the target frames, by a frozen vision-language model; writes them to a Parquet file."""
    from cluster import config_dump
    from cluster.sample_frames import load_settings, sample_data

    file, overrides = file_and_overrides(options)
    overrides += [f"{name}={value}" for name in ("sampler", "model") if (value := getattr(options, name)) is not None]
    settings = load_settings(file, overrides)
    if options.show:
        print(config_dump.dump_yaml(settings), end="")
    else:
        print(f"{options.out}: {sample_data(Path(options.data), Path(options.out), settings)}")
