"""What the tests of the served segmentation share: videos below a root, requests about them, and a service in this process."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parent / "xmem"))  # tiny_xmem.py

from segmentation_service.config import PropagationConfig, SegmentationConfig
from segmentation_service.masks import decode_rle
from segmentation_service.serve_config import ServeConfig
from segmentation_service.service_request import SegmentRequest

TOY_SAM2 = Path(__file__).resolve().parents[2] / "examples/toy/models/sam2"
FRAMES, HEIGHT, WIDTH = 5, 48, 64
BOX, OTHER_BOX = {"box": (10, 8, 30, 28)}, {"box": (28, 14, 60, 40)}
POINT = {"points": ((20, 18),), "labels": (1,)}


def write_video(folder: Path, seed: int, frames: int = FRAMES, hw: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    """A folder of frames in which a square goes over a ground of one colour."""
    ground, square = np.random.default_rng(seed).integers(0, 255, (2, 3))
    folder.mkdir(parents=True)
    for t in range(frames):
        image = np.empty((*hw, 3), np.uint8)
        image[:] = ground
        image[8:28, 10 + 3 * t : 30 + 3 * t] = square
        Image.fromarray(image).save(folder / f"{t:03d}.png")
    return folder


def make_config(folder: Path, **values) -> ServeConfig:
    """Three videos below `folder`/videos, the toy SAM2, and a tiny XMem."""
    import torch
    from tiny_xmem import tiny_state_dict

    for seed, name in enumerate(("red", "green", "deep/blue")):
        write_video(folder / "videos" / name, seed)
    torch.save(tiny_state_dict(), folder / "xmem.pth")
    propagation = PropagationConfig(checkpoint=str(folder / "xmem.pth"), size=0)
    segmentation = SegmentationConfig(checkpoint=str(TOY_SAM2), device="cpu", replicas=2, propagation=propagation)
    return ServeConfig(segmentation=segmentation, roots=[str(folder / "videos")], **values)


def ask(video="red", frame=0, *hypotheses, propagate=False) -> SegmentRequest:
    return SegmentRequest(video=video, frame=frame, hypotheses=hypotheses or ((BOX,),), propagate=propagate)


def same(a, b) -> bool:
    """Whether two responses agree, but for a pixel that another size of batch may round the other way."""
    pairs = [(a.masks, b.masks)]
    if (a.tracks is None) != (b.tracks is None):
        return False
    for track, other in zip(a.tracks or (), b.tracks or (), strict=True):
        if list(track) != list(other):
            return False
        pairs += [((track[t],), (other[t],)) for t in track]
    return all(len(x) == len(y) and all(len(g) == len(h) and all(_near(m, n) for m, n in zip(g, h)) for g, h in zip(x, y)) for x, y in pairs)


def _near(a, b) -> bool:
    return a.size == b.size and np.mean(decode_rle(a.model_dump()) != decode_rle(b.model_dump())) < 2e-3
