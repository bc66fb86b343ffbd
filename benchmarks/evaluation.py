"""Speed of `videoseg eval`'s scoring against the way of the official video evaluators, on two cores: JSON, and a line on the screen.

    videoseg bench evaluation --json OUT        (or python benchmarks/evaluation.py --json OUT)

Videos of 480x854 in MeViS's layout, imported, with predicted images; both sides read them, decode the truth and compute J and F, the official
way (an expression at a time, as eval_mevis.py goes about it, with plain_measures.py) in as many processes as ours. In turns, the ratio within a
round; the largest difference of J and F, percent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from multiprocessing import Pool
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

import plain_measures
from side_by_side import in_turns, machine, publish, ratio
from cluster.benchmark_scores import score_predictions
from rollout.episodes import read_episodes
from rollout.importers.driver import import_data

HW = (480, 854)
EXPRESSIONS = ([0], [1], [2], [0, 1], [0, 1, 2])
"""The objects that each expression about a video names."""


def write_source(root: Path, predictions: Path, videos: int, frames: int) -> None:
    """A split of MeViS, and predictions a few pixels beside the truth."""
    from measures import blobs  # imports torch, which the processes that score have no use for

    rng, meta, masks = np.random.default_rng(0), {}, {}
    names = [f"{t:05d}" for t in range(frames)]
    grey = Image.fromarray(np.full((*HW, 3), 90, np.uint8))
    for v in range(videos):
        folder = root / "valid_u/JPEGImages" / f"video{v}"
        folder.mkdir(parents=True)
        for name in names:
            grey.save(folder / f"{name}.jpg")
        still = blobs(3, rng)
        tracks_NTHW = np.stack([[np.roll(mask, (t, 2 * t), (0, 1)) for t in range(frames)] for mask in still])
        ids = [3 * v + n for n in range(3)]
        for number, track in zip(ids, tracks_NTHW):
            found = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in track]
            masks[str(number)] = [{"size": list(HW), "counts": rle["counts"].decode()} for rle in found]
        queries = {str(n): {"exp": f"query {n}", "obj_id": objects, "anno_id": [ids[o] for o in objects]} for n, objects in enumerate(EXPRESSIONS)}
        meta[f"video{v}"] = {"frames": names, "expressions": queries}
        for n, objects in enumerate(EXPRESSIONS):
            place = predictions / f"video{v}" / str(n)
            place.mkdir(parents=True)
            for t, name in enumerate(names):
                said = np.roll(tracks_NTHW[objects, t].any(0), (3, 5), (0, 1))
                Image.fromarray(said.astype(np.uint8) * np.uint8(255)).save(place / f"{name}.png")
    for file, content in (("meta_expressions.json", {"videos": meta}), ("mask_dict.json", masks)):
        (root / "valid_u" / file).write_text(json.dumps(content))


_TRUTH: tuple[dict, dict, Path] | None = None


def _load(source: Path, predictions: Path) -> None:
    global _TRUTH
    cv2.setNumThreads(1)
    read = lambda name: json.loads((source / "valid_u" / name).read_text())
    _TRUTH = read("meta_expressions.json")["videos"], read("mask_dict.json"), predictions


def _plain_expression(which: tuple[str, str]) -> tuple[float, float]:
    """One expression as the official programs score it: all frames in memory, J of all, then F of all."""
    (video, n), (videos, masks, predictions) = which, _TRUTH
    entry = videos[video]
    true_THW, said_THW = np.zeros((2, len(entry["frames"]), *HW), np.uint8)
    for t, name in enumerate(entry["frames"]):
        for number in entry["expressions"][n]["anno_id"]:
            true_THW[t] += coco.decode(masks[str(number)][t])
        said_THW[t] = cv2.imread(str(predictions / video / n / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
    f = [plain_measures.boundary_f(said, true) for said, true in zip(said_THW, true_THW)]
    return float(plain_measures.jaccard(said_THW, true_THW).mean()), float(np.mean(f))


def plain(source: Path, predictions: Path, workers: int) -> np.ndarray:
    """J and F, percent."""
    videos = json.loads((source / "valid_u/meta_expressions.json").read_text())["videos"]
    with Pool(workers, _load, (source, predictions)) as pool:
        return 100 * np.mean(pool.map(_plain_expression, [(v, n) for v, entry in videos.items() for n in entry["expressions"]], chunksize=1), axis=0)


def ours(data: Path, predictions: Path, workers: int) -> np.ndarray:
    found = score_predictions("mevis", read_episodes(data), predictions, workers).official
    return np.array([found["J"], found["F"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--frames", type=int, default=100, help="of each video")
    parser.add_argument("--workers", type=int, default=2, help="processes of each side (default 2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, predictions, out = (Path(folder) / name for name in ("mevis", "predictions", "data"))
        write_source(source, predictions, args.videos, args.frames)
        import_data("mevis", source, out, progress=lambda line: None)
        sides = {"plain": lambda: plain(source, predictions, args.workers), "ours": lambda: ours(out / "valid_u", predictions, args.workers)}
        difference = float(np.abs(sides["plain"]() - sides["ours"]()).max())
        times = in_turns(sides, args.rounds)
    size = {"videos": args.videos, "frames": args.frames, "expressions": args.videos * len(EXPRESSIONS), "height_width": HW, "processes": args.workers}
    record = {"machine": machine(args.workers), "size": size, "times": times, "plain_over_ours": ratio(times, "plain", "ours"), "max_difference_percent": difference}
    publish(record, args.json)
    r = record["plain_over_ours"]
    print(f"{r['median']} ({r['min']} to {r['max']}) times as fast as the official way, largest difference {difference:.1e} percent", file=sys.stderr)


if __name__ == "__main__":
    main()
