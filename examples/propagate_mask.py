"""An object marked on one frame, by a box, and its mask on all others: SAM2 and XMem by themselves, without a policy.

    python -m examples.propagate_mask clip.mp4 --frame 12 --box 40 30 90 80 --out masks
    python -m examples.propagate_mask clip.mp4 --box 40 30 90 80 --out masks --sam2 facebook/sam2.1-hiera-large --xmem XMem.pth

Writes masks/NNNNN.png (0 background, 1 the object). Without --sam2 and --xmem the toy models do it, which know coloured shapes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from segmentation_service.config import PropagationConfig
from segmentation_service.palette import save_palette
from segmentation_service.segmenter import ObjectPrompt, Segmenter
from segmentation_service.video import open_video, read_frame

MODELS = Path(__file__).parent / "toy/models"


def propagate(clip: Path, frame: int, box: tuple[float, float, float, float], out: Path, sam2: str, xmem: str) -> int:
    """Returns the number of frames. Raises VideoError where one cannot be read."""
    segmenter = Segmenter(sam2, propagation=PropagationConfig(checkpoint=xmem))
    video = open_video(clip)
    (masks_NHW,) = segmenter.segment_frame(read_frame(video, frame), [[ObjectPrompt(box=box)]])  # one hypothesis with one object
    out.mkdir(parents=True, exist_ok=True)
    for t, _, found_NHW in segmenter.propagator.propagate(video, frame, [masks_NHW]):
        save_palette(out / f"{t:05d}.png", found_NHW, found_NHW.shape[1:])
    return len(video)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, help="video file or folder of images")
    parser.add_argument("--frame", type=int, default=0, help="the frame that the box is about, from 0 (default 0)")
    parser.add_argument("--box", type=float, nargs=4, required=True, metavar=("X1", "Y1", "X2", "Y2"), help="pixels, corners inclusive")
    parser.add_argument("--out", type=Path, required=True, help="folder for the masks")
    parser.add_argument("--sam2", default=str(MODELS / "sam2"), help="folder or hub id of a SAM2")
    parser.add_argument("--xmem", default=str(MODELS / "xmem"), help="weights of XMem")
    args = parser.parse_args()
    print(f"{args.out}: {propagate(args.clip, args.frame, tuple(args.box), args.out, args.sam2, args.xmem)} masks")


if __name__ == "__main__":
    main()
