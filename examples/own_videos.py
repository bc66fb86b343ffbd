"""Three short videos with a table of queries and masks, laid out as `videoseg data import own` reads your own: look at it, then do as it does.

    python -m examples.own_videos mine                                     # mine/queries.csv, mine/*.mp4, mine/masks/<video>/NNNNN.png
    videoseg data import own mine data/mine
    videoseg data inspect data/mine --check --sheet mine.png
    videoseg train data.generate=null data.train=data/mine/train data.evaluation=data/mine/valid loop.steps=2 run.name=mine
    videoseg eval own runs/mine --data data/mine/valid --out evals/mine
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from rollout.toy_world import make_video
from segmentation_service.palette import save_palette
from segmentation_service.video_writer import write_video

SPLITS = {"first": "train", "second": "train", "third": "valid"}
FPS = 12.0


def write_own_videos(out: Path) -> Path:
    """The folder, with videos of the toy world in the place of yours; returns the table."""
    if out.exists():
        raise SystemExit(f"{out} exists already; give the name of a new folder")
    rows = []
    for seed, (name, split) in enumerate(SPLITS.items(), 500):
        video = make_video(seed)
        out.mkdir(parents=True, exist_ok=True)
        write_video(out / f"{name}.mp4", map(video.frame, range(video.num_frames)), FPS)
        folder = out / "masks" / name
        folder.mkdir(parents=True)
        for t in range(video.num_frames):
            masks_NHW = video.masks(t)
            save_palette(folder / f"{t:05d}.png", masks_NHW, masks_NHW.shape[1:])
        for query in video.queries:
            objects = " ".join(str(o + 1) for o in query.targets) or "none"
            rows.append({"split": split, "video": f"{name}.mp4", "query": query.text, "masks": f"masks/{name}", "objects": objects})
    table = out / "queries.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    print(f"{write_own_videos(parser.parse_args().out)}: queries, one a line")


if __name__ == "__main__":
    main()
