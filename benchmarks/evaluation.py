"""Speed of `videoseg eval`'s scoring against the way of the official video evaluators, on two cores: JSON, and a line a benchmark on the screen.

    videoseg bench evaluation --json OUT        (or python benchmarks/evaluation.py --json OUT)

Videos of 480x854 in each benchmark's own layout, imported, with predicted images; both sides read them, decode the truth and compute J and F (of ReVOS also A and R, of Ref-DAVIS17
both protocols), the official way (an expression at a time, J over the whole video, then F frame by frame, with plain_measures.py) in as many processes as ours. In turns, the
ratio within a round; the largest difference of any number, percent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment

import plain_measures
from side_by_side import in_turns, machine, publish, ratio
from cluster.benchmark_scores import score_predictions
from rollout.episodes import read_episodes
from rollout.importers.driver import import_data
from rollout.importers.ref_davis17 import ANNOTATORS
from segmentation_service.masks import encode_rle

HW, OBJECTS = (480, 854), 3
EXPRESSIONS = ([0], [1], [2], [0, 1], [0, 1, 2], [0], [1], [0, 1])
"""The objects that each expression about a video names, some the same as another one, as in the benchmarks; of Ref-DAVIS17 each annotator has a text for every object."""
SPLITS = {"mevis": "valid_u", "revos": "valid", "ref_davis17": "valid"}
Videos = dict[str, np.ndarray]


def tracks(videos: int, frames: int) -> Videos:
    """Of every video bool (objects, T, H, W)."""
    from measures import blobs  # imports torch, which the processes that score have no use for

    rng = np.random.default_rng(0)
    return {f"video{v}": np.stack([[np.roll(mask, (t, 2 * t), (0, 1)) for t in range(frames)] for mask in blobs(OBJECTS, rng)]) for v in range(videos)}


def write_frames(folder: Path, frames: int) -> list[str]:
    """Grey ones; returns their names."""
    folder.mkdir(parents=True)
    names, grey = [f"{t:05d}" for t in range(frames)], Image.fromarray(np.full((*HW, 3), 90, np.uint8))
    for name in names:
        grey.save(folder / f"{name}.jpg")
    return names


def write_rle_source(root: Path, videos: Videos, revos: bool) -> None:
    """A split of MeViS or of ReVOS: run-length masks of objects by number, and expressions."""
    place = root if revos else root / SPLITS["mevis"]
    meta, masks, foreground = {}, {}, {}
    for v, (name, objects_NTHW) in enumerate(videos.items()):
        names, ids = write_frames(place / "JPEGImages" / name, objects_NTHW.shape[1]), [OBJECTS * v + n for n in range(OBJECTS)]
        masks |= {str(number): [encode_rle(mask) for mask in track] for number, track in zip(ids, objects_NTHW)}
        foreground[name] = {"masks_rle": [encode_rle(mask) for mask in objects_NTHW.any(0)]}
        queries = {str(n): {"exp": f"query {n}", "obj_id": objects, "anno_id": [ids[o] for o in objects], "type_id": n % 2} for n, objects in enumerate(EXPRESSIONS)}
        meta[name] = {"vid_id": v, "height": HW[0], "width": HW[1], "frames": names, "expressions": queries}
    files = {"meta_expressions_valid_.json" if revos else "meta_expressions.json": {"videos": meta}, "mask_dict.json": masks} | ({"mask_dict_foreground.json": foreground} if revos else {})
    for file, content in files.items():
        (place / file).write_text(json.dumps(content))


def write_davis(root: Path, videos: Videos) -> None:
    """DAVIS 2017 with four annotators' texts."""
    for name, objects_NTHW in videos.items():
        names = write_frames(root / "DAVIS/JPEGImages/480p" / name, objects_NTHW.shape[1])
        place = root / "DAVIS/Annotations_unsupervised/480p" / name
        place.mkdir(parents=True)
        for t, file in enumerate(names):
            numbers_HW = np.max([(k + 1) * mask for k, mask in enumerate(objects_NTHW[:, t])], axis=0)
            image = Image.fromarray(numbers_HW.astype(np.uint8), "P")
            image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
            image.save(place / f"{file}.png")
    (root / "DAVIS/ImageSets/2017").mkdir(parents=True)
    (root / "davis_text_annotations").mkdir()
    for file, listed in (("train", ""), ("val", "".join(f"{name}\n" for name in videos))):
        (root / f"DAVIS/ImageSets/2017/{file}.txt").write_text(listed)
    texts = "".join(f'{name} {k + 1} "thing {k}"\n' for name in videos for k in range(OBJECTS))
    for annotator in ("annot1", "annot1_full_video", "annot2", "annot2_full_video"):
        (root / f"davis_text_annotations/Davis17_{annotator}.txt").write_text(texts)


WRITE: dict[str, Callable[[Path, Videos], None]] = {"mevis": partial(write_rle_source, revos=False), "revos": partial(write_rle_source, revos=True), "ref_davis17": write_davis}


def write_predictions(data: Path, folder: Path) -> int:
    """A few pixels beside the truth. Returns the number of expressions."""
    for n, episode in enumerate(read_episodes(data), 1):
        place = folder / episode.video_id / episode.expression_id
        place.mkdir(parents=True)
        for t in range(episode.num_frames):
            said_HW = np.roll(episode.masks(t).any(0), (3, 5), (0, 1))
            Image.fromarray(said_HW.astype(np.uint8) * np.uint8(255)).save(place / f"{t:05d}.png")
    return n


_FILES: tuple[Path, Path, dict] | None = None


def _load(source: Path, predictions: Path, files: dict[str, str]) -> None:
    global _FILES
    cv2.setNumThreads(1)
    _FILES = source, predictions, {name: json.loads((source / file).read_text()) for name, file in files.items()}


def _read(video: str, expression: str, frames: int) -> np.ndarray:
    """uint8 (T, H, W), as the official programs read predictions."""
    return np.stack([cv2.imread(str(_FILES[1] / video / expression / f"{t:05d}.png"), cv2.IMREAD_GRAYSCALE) for t in range(frames)])


def _j_and_f(said_THW: np.ndarray, true_THW: np.ndarray) -> tuple[float, float]:
    """All frames in memory, J of all, then F of each."""
    return float(plain_measures.jaccard(said_THW, true_THW).mean()), float(np.mean([plain_measures.boundary_f(said, true) for said, true in zip(said_THW, true_THW)]))


def _rle_expression(which: tuple[str, str]) -> tuple[float, ...]:
    """J and F of an expression, of ReVOS also A and R (of 0/255 images, as published, and of 0/1)."""
    (video, n), of = which, _FILES[2]
    entry = of["meta"]["videos"][video]
    true_THW = np.zeros((len(entry["frames"]), *HW), np.uint8)
    for t in range(len(true_THW)):
        for number in entry["expressions"][n]["anno_id"]:
            true_THW[t] += coco.decode(of["masks"][str(number)][t])
    said_THW = _read(video, n, len(true_THW))
    scores = _j_and_f(said_THW, true_THW)
    if "foreground" not in of:
        return scores
    foreground_THW = [coco.decode(rle) for rle in of["foreground"][video]["masks_rle"]]
    robust = lambda value: np.mean([plain_measures.robustness(np.uint8(value) * (said > 0), true, fore) for said, true, fore in zip(said_THW, true_THW, foreground_THW)])
    return *scores, float((said_THW == true_THW).mean()), float(robust(255)), float(robust(1))


def _davis_annotator(which: tuple[str, int, int]) -> tuple[list, list]:
    """(J and F of the true objects, each with the prediction paired with it; J and F of the texts) of a video for an annotator."""
    video, annotator, frames = which
    read = lambda t: np.array(Image.open(_FILES[0] / "DAVIS/Annotations_unsupervised/480p" / video / f"{t:05d}.png"))
    numbers_THW = np.stack([read(t) for t in range(frames)])
    said = [_read(video, str(len(ANNOTATORS) * k + annotator), frames) for k in range(OBJECTS)]
    merged_THW = np.zeros_like(numbers_THW)
    for k, said_THW in enumerate(said):
        merged_THW[(said_THW > 0) & (merged_THW == 0)] = k + 1
    pairs = np.array([[_j_and_f(merged_THW == p + 1, numbers_THW == g + 1) for g in range(OBJECTS)] for p in range(OBJECTS)])
    rows, columns = linear_sum_assignment(-pairs.mean(-1))
    return pairs[rows, columns].tolist(), [_j_and_f(said[k], numbers_THW == k + 1) for k in range(OBJECTS)]


def plain(benchmark: str, source: Path, predictions: Path, videos: dict[str, int], workers: int) -> dict[str, float]:
    """The numbers of a benchmark, percent, for videos of so many frames."""
    files = {
        "mevis": {"meta": "valid_u/meta_expressions.json", "masks": "valid_u/mask_dict.json"},
        "revos": {"meta": "meta_expressions_valid_.json", "masks": "mask_dict.json", "foreground": "mask_dict_foreground.json"},
        "ref_davis17": {},
    }[benchmark]
    with Pool(workers, _load, (source, predictions, files)) as pool:
        if benchmark == "ref_davis17":
            found = pool.map(_davis_annotator, [(v, a, frames) for v, frames in videos.items() for a in range(len(ANNOTATORS))], chunksize=1)
            merged, alone = (100 * np.mean([row[which] for row in found], axis=(0, 1)) for which in (0, 1))
            return {"J": merged[0], "F": merged[1], "J per expression": alone[0], "F per expression": alone[1]}
        asked = [(v, str(n)) for v in videos for n in range(len(EXPRESSIONS))]
        rows = 100 * np.array(pool.map(_rle_expression, asked, chunksize=1))
    if benchmark == "mevis":
        return dict(zip("JF", rows.mean(0)))
    kinds = np.array([int(n) % 2 for _, n in asked])
    overall = (rows[kinds == 0].mean(0) + rows[kinds == 1].mean(0)) / 2
    return {f"{name} overall": value for name, value in zip(("J", "F", "A", "R", "R (0/1)"), overall)}


def compare(benchmark: str, videos: Videos, workers: int, rounds: int) -> dict:
    frames = {name: objects_NTHW.shape[1] for name, objects_NTHW in videos.items()}
    with tempfile.TemporaryDirectory() as folder:
        source, predictions, out = (Path(folder) / name for name in ("source", "predictions", "data"))
        WRITE[benchmark](source, videos)
        import_data(benchmark, source, out, progress=lambda line: None, splits=[SPLITS[benchmark]])
        data, numbers = out / SPLITS[benchmark], defaultdict(dict)
        expressions = write_predictions(data, predictions)
        sides = {
            "plain": lambda: numbers["plain"].update(plain(benchmark, source, predictions, frames, workers)),
            "ours": lambda: numbers["ours"].update(score_predictions(benchmark, read_episodes(data), predictions, workers).strict),
        }
        times = in_turns(sides, rounds)
    difference = max(abs(value - numbers["ours"][name]) for name, value in numbers["plain"].items())
    size = {"videos": len(frames), "frames": max(frames.values()), "expressions": expressions, "height_width": HW}
    return {"size": size, "times": times, "plain_over_ours": ratio(times, "plain", "ours"), "max_difference_percent": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--benchmarks", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--videos", type=int, default=10, help="of Ref-DAVIS17, which has all pairs of objects to compare, a quarter of them, 2 at least")
    parser.add_argument("--frames", type=int, default=100, help="of each video")
    parser.add_argument("--workers", type=int, default=2, help="processes of each side (default 2)")
    args = parser.parse_args()
    record = {"machine": machine(args.workers), "processes": args.workers, "of": {}}
    for benchmark in args.benchmarks:
        videos = tracks(max(2, args.videos // 4) if benchmark == "ref_davis17" else args.videos, args.frames)
        record["of"][benchmark] = found = compare(benchmark, videos, args.workers, args.rounds)
        r = found["plain_over_ours"]
        print(f"{benchmark}: {r['median']} ({r['min']} to {r['max']}) times as fast as the official way, largest difference {found['max_difference_percent']:.1e} percent", file=sys.stderr)
    publish(record, args.json)


if __name__ == "__main__":
    main()
