"""The commands that ask a policy: `videoseg segment`, `videoseg demo` and `videoseg eval`. As in `cluster.cli`, everything heavy is imported inside the commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.cli_parsing import add_command, file_and_overrides
from cluster.errors import UserError


def add_to(commands: Any) -> None:
    """Their parsers, into those of `videoseg`."""
    rule = (
        "Writes OUT/<video>/<query>/: masks/NNNNN.png (0 background, k object k), overlay.mp4, answer.json. Run it again after an\n"
        "interruption: what is finished is skipped. Exit status 3: some query got no mask. Settings are those of `videoseg train`;\n"
        "those that count are in the sections prompt, rollout and segmentation, and sampler.KEY=VALUE for --sampler htfs. docs/segment.md"
    )
    command = add_command(commands, "segment", segment, 'videoseg segment clip.mp4 "the red circle" "the largest shape" --out masks', rule)
    command.usage = "videoseg segment VIDEO QUERY [QUERY ...] --out OUT [key=value ...] [options]"
    command.add_argument("words", metavar="VIDEO QUERY", nargs="*", help="video file or folder of images, and queries; key=value changes a setting")
    command.add_argument("--out", required=True, metavar="OUT", help="folder for the results")
    command.add_argument("--batch", metavar="FOLDER", help="every video of a folder, in place of VIDEO")
    command.add_argument("--policy", metavar="CKPT", help="a run or its checkpoint, an export, a Hugging Face folder, a hub id (default: the toy policy)")
    command.add_argument("--config", metavar="CONFIG", help="recipe or YAML file of settings (default: those of the run or export; videoseg_r1_7b; without --policy debug)")
    command.add_argument("--sampler", default="middle", metavar="NAME", help="target frame: middle (default), first, htfs, or a YAML file of `videoseg sample-frames`")
    command.add_argument("--rle", action="store_true", help="masks.json of COCO RLEs in place of the PNGs")
    command.add_argument("--no-overlay", action="store_true", help="write no overlay.mp4")
    command.add_argument("--fps", type=float, default=24.0, metavar="N", help="frames a second of a folder of images (default 24)")

    rule = (
        "Upload a video, write a query, see masks, frames and reasoning. Without --policy the toy policy answers, about toy videos that are there to\n"
        "choose from. Settings are those of `videoseg segment`. The page has no authentication: it is for this machine, unless --host says\n"
        "otherwise. Ctrl-C stops it. Needs gradio: pip install 'videoseg-r1[demo]'. docs/demo.md"
    )
    command = add_command(commands, "demo", demo, "videoseg demo --policy runs/latest", rule)
    command.add_argument("settings", metavar="key=value", nargs="*", help="settings, as for `videoseg segment`")
    command.add_argument("--policy", metavar="CKPT", help="as for `videoseg segment` (default: the toy policy)")
    command.add_argument("--config", metavar="CONFIG", help="recipe or YAML file of settings (default: as for `videoseg segment`)")
    command.add_argument("--sampler", default="middle", metavar="NAME", help="target frame: middle (default), first, htfs, or a YAML file of `videoseg sample-frames`")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    command.add_argument("--port", type=int, metavar="N", help="its port (default 7860, or a free one where that is taken; 0: any free one)")

    rule = (
        "BENCHMARK: revos, mevis, ref_youtube_vos, ref_davis17, reasonvos, reasonseg, refcoco, refcoco+, refcocog, own (your videos), or\n"
        "whatever else the column `source` of the episodes says, such as toy. Predictions go to OUT/predictions/<video>/<expression>/<frame>.png,\n"
        "results to OUT/scores.json and OUT/expressions.parquet. Run it again after an interruption: what is answered is skipped. Settings\n"
        "are those of `videoseg segment`. docs/evaluation.md"
    )
    command = add_command(commands, "eval", evaluate, "videoseg eval mevis runs/latest --data data/mevis/valid_u --out evals/latest-mevis", rule)
    command.add_argument("benchmark", metavar="BENCHMARK", help="the benchmark, as `videoseg data import` calls it")
    command.add_argument("settings", metavar="[CHECKPOINT] key=value", nargs="*", help="a run or its checkpoint, an export, a Hugging Face folder, a hub id; and settings")
    command.add_argument("--data", required=True, metavar="DATA", help="imported episodes of one split")
    command.add_argument("--out", required=True, metavar="OUT", help="folder for the results")
    command.add_argument("--predictions", metavar="FOLDER", help="score these, of whatever program, in place of a CHECKPOINT's")
    command.add_argument("--oracle", choices=("frame", "box", "mask"), help="let the truth choose the target frame; also answer; also draw the masks on that frame")
    command.add_argument("--sampler", default="middle", metavar="NAME", help="target frame: middle (default), first, htfs, or a YAML file of `videoseg sample-frames`")
    command.add_argument("--config", metavar="CONFIG", help="recipe or YAML file of settings (default: as for `videoseg segment`)")
    command.add_argument("--zip", metavar="FILE", help="also pack the predictions, as the benchmarks' servers take them")
    command.add_argument("--against", metavar="OUT2", help="an earlier evaluation: print by how much this one is better, with a 95%% interval")
    command.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of policy and segmenter that share the videos, a GPU each, on the nodes of the Ray cluster if one is joined (default 1)")
    command.add_argument("--workers", type=int, metavar="N", help="processes that score (default: one a CPU)")


def segment(options: argparse.Namespace) -> None:
    """Segment what queries refer to, in a video or in all videos of a folder: masks, a video of them, and the policy's reasoning."""
    import re

    setting = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=")  # a dot before the equals sign, so that a query may hold one
    settings, words = ([w for w in options.words if bool(setting.match(w)) == which] for which in (True, False))
    if not options.batch and len(words) < 2:
        raise UserError("a video and a query are needed" if words else "no video is given", 'write: videoseg segment clip.mp4 "the red car" --out OUT')
    from cluster import segment as segmenting

    if options.batch:
        videos, queries = segmenting.find_videos(Path(options.batch)), words
    else:
        videos, queries = [Path(words[0]).expanduser()], words[1:]
    policy, sampling = _policy_and_sampling(options.policy, options, settings)
    outputs = segmenting.Outputs(png=not options.rle, rle=options.rle, overlay=not options.no_overlay)
    statuses = segmenting.segment_videos(policy, videos, queries, Path(options.out), sampling, outputs, options.fps)
    print(segmenting.summary(Path(options.out), statuses))


def demo(options: argparse.Namespace) -> None:
    """Serve a page in the browser that segments what a query refers to in a video: masks, frames and the policy's reasoning."""
    stray, settings = file_and_overrides(options)
    if stray is not None:
        raise UserError(f"'{stray}' is not a setting", "a policy is given as --policy CKPT, a recipe as --config CONFIG, a video in the page")
    from cluster import demo as showing

    policy, sampling = _policy_and_sampling(options.policy, options, settings)
    showing.serve(policy, sampling, options.host, options.port, toy=options.policy is None)


def _policy_and_sampling(given: str | None, options: argparse.Namespace, settings: Sequence[str]) -> tuple[Any, Any]:
    """Who answers, and who chooses the frames, whose settings begin with `sampler.`."""
    from cluster.policies import find_policy
    from cluster.segment import Sampling

    sampling = Sampling.of(options.sampler, [s.removeprefix("sampler.") for s in settings if s.startswith("sampler.")])
    return find_policy(given, options.config, [s for s in settings if not s.startswith("sampler.")]), sampling


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a policy, or predictions that are there, on a benchmark: its official numbers, strict ones, and every expression's."""
    from cluster import evaluate as evaluating
    from cluster import eval_results
    from cluster.benchmark_scores import score_predictions
    from cluster.expression_scores import has_truth
    from rollout.episodes import read_episodes

    checkpoint, settings = file_and_overrides(options)
    if (checkpoint is None) == (options.predictions is None):
        what = "neither a CHECKPOINT nor --predictions is" if checkpoint is None else "both a CHECKPOINT and --predictions are"
        raise UserError(f"{what} given", "give the policy to evaluate, or the folder of predictions to score")
    for_a_policy = {"--oracle": options.oracle, "--config": options.config, "--sampler": options.sampler != "middle", "--replicas": options.replicas != 1, "key=value": settings}
    if options.predictions and (unused := [name for name, given in for_a_policy.items() if given]):
        raise UserError(f"{', '.join(unused)}: --predictions are scored as they are, and no policy is asked", "leave out one or the other")
    if options.replicas < 1:
        raise UserError(f"--replicas {options.replicas} are too few", "use 1 or more")
    note = lambda text: print(text, file=sys.stderr, flush=True)
    episodes, out = list(read_episodes(options.data)), Path(options.out)
    if options.predictions and (out / evaluating.ABOUT).exists():
        raise UserError(f"{out} holds a policy's evaluation", "give another --out for the scores of --predictions")
    if options.against:
        eval_results.check_against(Path(options.against), out, episodes)
    predictions, answers = Path(options.predictions or out / evaluating.PREDICTIONS), {}
    if checkpoint is not None:
        policy, sampling = _policy_and_sampling(checkpoint, options, settings)
        evaluation = evaluating.Evaluation(options.benchmark, Path(options.data), out, policy, sampling, options.oracle)
        evaluating.predict(evaluation, episodes, note, replicas=options.replicas)
        answers = evaluation.answered()
    if options.zip:
        top = "Annotations" if options.benchmark == "ref_youtube_vos" else ""
        print(eval_results.write_zip(predictions, Path(options.zip), top, episodes))
    if episodes and not any(map(has_truth, episodes)):
        print(f"the masks of {options.data} are not public: nothing is scored here; the predictions are in {predictions}")
        return
    tell = lambda done, of: note(f"{done}/{of} videos scored") if done == of or not done % 50 else None
    scores = score_predictions(options.benchmark, episodes, predictions, options.workers or os.cpu_count() or 1, tell)
    out.mkdir(parents=True, exist_ok=True)
    eval_results.write_scores(scores, out, answers)
    print("\n".join(eval_results.table_lines(scores)))
    if options.against:
        print(f"{options.against} -> {options.out}: {eval_results.compare(Path(options.against), out)}")
