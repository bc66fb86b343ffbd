"""ReasonSeg: {train,val,test}/NAME.jpg with NAME.json: texts, and polygons of targets and of regions to ignore."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rollout.episodes import IgnoreMask, annotate
from rollout.importers.item import Benchmark, Defect, Item, Query, Track, Truth
from rollout.media import Media
from segmentation_service.masks import encode_rle

TARGET, IGNORE = 1, 255
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class LabelledPolygons:
    """shapes: (label, points) in the file's order. All target polygons of an image are one object, "0"."""

    shapes: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]

    def read(self, media: Media, listed: Sequence[int], object_ids: Sequence[str]) -> Truth:
        with Image.open(media.path) as image:
            if image.getexif().get(_ORIENTATION, 1) != 1:
                raise Defect("image is stored turned", f"{media.path}: set it upright and remove its EXIF orientation")
        painted_HW = paint(self.shapes, media.hw)
        target, ignored_HW = annotate(0, painted_HW == TARGET), painted_HW == IGNORE
        ignore = (IgnoreMask(0, encode_rle(ignored_HW)["counts"]),) if ignored_HW.any() else ()
        return Truth((0,), {"0": Track((0,), (target,) if target else ())}, ignore)


def paint(shapes: Sequence[tuple[str, Sequence]], hw: tuple[int, int]) -> np.ndarray:
    """Polygons as LISA paints them: outline and inside, the largest first, so that smaller ones lie on top. uint8 (H, W): 0, 1, 255."""
    import cv2

    layers = []
    for label, points in shapes:
        if "flag" in label.lower():
            continue
        if not points or not np.isfinite(points).all():
            raise Defect("broken mask", f"polygon of {label}: {str(points)[:80]}")
        polygon, layer_HW = [np.array(points).astype(np.int32)], np.zeros(hw, np.uint8)
        cv2.polylines(layer_HW, polygon, True, 1, 1)
        cv2.fillPoly(layer_HW, polygon, 1)
        layers.append((int(layer_HW.sum()), IGNORE if "ignore" in label.lower() else TARGET, layer_HW))
    painted_HW = np.zeros(hw, np.uint8)
    # LISA sorts ascending and walks backwards: of equally large ones the last comes first.
    for _, value, layer_HW in sorted(layers, key=lambda layer: layer[0])[::-1]:
        painted_HW[layer_HW == 1] = value
    return painted_HW


def _folder(source: Path, split: str) -> Path:
    return (source / "ReasonSeg" if (source / "ReasonSeg").is_dir() else source) / split


def _files(source: Path, split: str) -> list[Path]:
    return sorted(_folder(source, split).glob("*.json")) or [_folder(source, split) / "*.json"]


def _items(source: Path, split: str, out: Path) -> list[Item]:
    folder = _folder(source, split)
    names = {f.stem for f in folder.glob("*.json")} | {f.stem for f in folder.glob("*.jpg")}
    return [_item(folder, name) for name in sorted(names)]


def _item(folder: Path, name: str) -> Item:
    image = folder / f"{name}.jpg"
    try:
        data = (folder / f"{name}.json").read_bytes()
        try:
            entry = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            entry = json.loads(data.decode("cp1252"))
        shapes = tuple((str(s["label"]), tuple((float(x), float(y)) for x, y in s["points"])) for s in entry["shapes"])
        texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
        if not texts:
            raise ValueError("no text")
        queries = tuple(Query(str(n), str(text), ("0",), query_type="reasoning") for n, text in enumerate(texts))
    except (OSError, ValueError, KeyError, TypeError) as error:
        defect = Defect("no readable annotation", f"{name}.json: {type(error).__name__}: {error}")
        return Item(name, image, (Query("0", name, None, defect=defect),), None, kind="image")
    return Item(name, image, queries, LabelledPolygons(shapes), kind="image")


REASONSEG = Benchmark(
    name="reasonseg",
    splits=("train", "val", "test"),
    files=_files,
    items=_items,
    published={"train": (239, None), "val": (200, None), "test": (779, None)},
)
