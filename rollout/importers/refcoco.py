"""RefCOCO, RefCOCO+ and RefCOCOg: refs(unc).p or refs(umd).p with instances.json, over the images of COCO's train2014."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from rollout.episodes import annotate
from rollout.importers.expressions import read_json
from rollout.importers.item import Benchmark, Defect, Item, Query, SourceError, Track, Truth
from rollout.importers.masks import decoded
from rollout.importers.plain_pickle import read_plain_pickle
from rollout.media import Media

IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/mscoco/train2014", "mscoco/images/train2014", "images/train2014", "train2014")


@dataclass(frozen=True)
class CocoSegmentations:
    """COCO's segmentation of each object: polygons, or an RLE. Polygons are drawn by pycocotools, their union taken."""

    segmentations: Mapping[str, object]

    def read(self, media: Media, listed: Sequence[int], object_ids: Sequence[str]) -> Truth:
        tracks: dict[str, Track | Defect] = {}
        for o in object_ids:
            try:
                annotation = annotate(0, self._mask(o, media.hw))
                tracks[o] = Track((0,), (annotation,) if annotation else ())
            except Defect as defect:
                tracks[o] = defect
        return Truth((0,), tracks)

    def _mask(self, object_id: str, hw: tuple[int, int]) -> np.ndarray:
        from pycocotools import mask as coco

        segmentation, where = self.segmentations.get(object_id), f"annotation {object_id}"
        if not segmentation:
            raise Defect("unknown object" if object_id not in self.segmentations else "empty annotation list", where)
        if isinstance(segmentation, dict):
            return decoded(segmentation, hw, where)
        if any(len(p) < 6 or len(p) % 2 for p in segmentation):
            raise Defect("broken mask", f"{where}: a polygon needs three points")
        return coco.decode(coco.merge(coco.frPyObjects([[float(v) for v in p] for p in segmentation], *hw))).astype(bool)


def _files(name: str, refs: str, source: Path, split: str) -> list[Path]:
    return [source / name / refs, source / name / "instances.json"]


@lru_cache(maxsize=1)
def _load(refs: Path, instances: Path) -> tuple[list[dict], dict, dict]:
    """The references in a fixed order, and COCO's images and annotations by id."""
    data = read_json(instances)
    references = sorted(read_plain_pickle(refs), key=lambda r: (r["image_id"], r["ref_id"]))
    return references, {i["id"]: i for i in data["images"]}, {a["id"]: a for a in data["annotations"]}


def _items(name: str, refs: str, source: Path, split: str, out: Path) -> list[Item]:
    references, images, annotations = _load(*_files(name, refs, source, split))
    folder = next((source / f for f in IMAGE_FOLDERS if (source / f).is_dir()), None)
    if folder is None:
        raise SourceError(f"{source}: no folder of COCO's train2014 images; looked for {', '.join(IMAGE_FOLDERS)}")
    by_image: dict[int, list[dict]] = {}
    for reference in references:
        if reference["split"] == split:
            by_image.setdefault(reference["image_id"], []).append(reference)
    items = []
    for image_id, group in by_image.items():
        queries = tuple(Query(str(s["sent_id"]), str(s["sent"]), (str(r["ann_id"]),), query_type="referring") for r in group for s in r["sentences"])
        found = {str(r["ann_id"]): annotations[r["ann_id"]]["segmentation"] for r in group if r["ann_id"] in annotations}
        image = images.get(image_id, {"file_name": f"{image_id} (in no image list)", "height": 0, "width": 0})
        hw = (image["height"], image["width"])
        items.append(Item(str(image_id), folder / image["file_name"], queries, CocoSegmentations(found), hw=hw, kind="image"))
    return items


def _benchmark(name: str, refs: str, splits: tuple[str, ...]) -> Benchmark:
    return Benchmark(name=name, splits=splits, files=partial(_files, name, refs), items=partial(_items, name, refs))


REFCOCO = _benchmark("refcoco", "refs(unc).p", ("train", "val", "testA", "testB"))
REFCOCO_PLUS = _benchmark("refcoco+", "refs(unc).p", ("train", "val", "testA", "testB"))
REFCOCOG = _benchmark("refcocog", "refs(umd).p", ("train", "val", "test"))
