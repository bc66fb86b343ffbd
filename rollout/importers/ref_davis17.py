"""Ref-DAVIS17: DAVIS 2017 (unsupervised masks, 480p) with the texts of two annotators, each for first frames and for full videos.

Read as released (DAVIS/ and davis_text_annotations/), or as ReferFormer's converter lays it out (as Ref-YouTube-VOS). The ids of
expressions follow that converter: object number k of a video, counted from 0, has 4k to 4k+3, in the order of `ANNOTATORS`.
"""

from __future__ import annotations

from pathlib import Path

from rollout.importers.expressions import frame_names, read_videos
from rollout.importers.item import Benchmark, Defect, Item, Query, SourceError
from rollout.importers.masks import PalettePngs

ANNOTATORS = ("annot1", "annot1_full_video", "annot2", "annot2_full_video")
FPS = 24.0
_MISSPELT = {"clasic-car": "classic-car", "dog-scale": "dogs-scale", "motor-bike": "motorbike"}
_LISTS = {"train": "train.txt", "valid": "val.txt"}


def _converted(source: Path, split: str) -> Path:
    return source / "meta_expressions" / split / "meta_expressions.json"


def _files(source: Path, split: str) -> list[Path]:
    if _converted(source, split).exists() or not (source / "DAVIS").is_dir():
        return [_converted(source, split)]
    texts = [source / "davis_text_annotations" / f"Davis17_{a}.txt" for a in ANNOTATORS]
    return [source / "DAVIS/ImageSets/2017" / _LISTS[split], *texts]


def _items(source: Path, split: str, out: Path) -> list[Item]:
    files = _files(source, split)
    return _from_release(source, *files) if len(files) > 1 else _from_conversion(source / split, read_videos(files[0]))


def _from_conversion(root: Path, videos: dict[str, dict]) -> list[Item]:
    items = []
    for video_id, entry in videos.items():
        expressions = {str(n): e for n, e in entry["expressions"].items()}
        queries = []
        for n, e in expressions.items():
            four = {str(expressions.get(str(int(n) // 4 * 4 + i), {}).get("obj_id")) for i in range(4)} if n.isdecimal() else {n, ""}
            defect = None if len(four) == 1 else Defect("annotators cannot be told apart", f"objects {sorted(four)} where four texts about one were expected")
            annotator = None if defect else ANNOTATORS[int(n) % 4]
            queries.append(Query(n, str(e.get("exp", "")), (str(e.get("obj_id")),), annotator, "referring", defect))
        masks = PalettePngs(root / "Annotations" / video_id)
        items.append(Item(video_id, root / "JPEGImages" / video_id, tuple(queries), masks, frame_names(entry), fps=FPS))
    return items


def _from_release(source: Path, video_list: Path, *texts: Path) -> list[Item]:
    by_annotator = [_read_texts(file, "utf-8" if "annot1" in file.name else "latin-1") for file in texts]
    items = []
    for video_id in sorted(video_list.read_text(encoding="utf-8").split()):
        lists = [sorted(texts.get(video_id, []), key=lambda line: line[0]) for texts in by_annotator]
        same = all([o for o, _ in lines] == [o for o, _ in lists[0]] for lines in lists)
        defect = None if same and lists[0] else Defect("annotators name different objects", str([[o for o, _ in lines] for lines in lists]))
        queries = []
        for a, lines in enumerate(lists):
            for k, (object_id, text) in enumerate(lines):
                queries.append(Query(str(4 * k + a), text, (object_id,), ANNOTATORS[a], "referring", defect))
        frames, masks = source / "DAVIS/JPEGImages/480p" / video_id, source / "DAVIS/Annotations_unsupervised/480p" / video_id
        items.append(Item(video_id, frames, tuple(sorted(queries, key=lambda q: int(q.expression_id))), PalettePngs(masks), fps=FPS))
    return items


def _read_texts(file: Path, encoding: str) -> dict[str, list[tuple[str, str]]]:
    """Video -> (object, text) of each line `video object "text"`."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(file.read_text(encoding=encoding).splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) < 3:
            raise SourceError(f'{file}:{number} is not `video object "text"`: {line!r}; download the file again')
        texts.setdefault(_MISSPELT.get(parts[0], parts[0]), []).append((parts[1], " ".join(parts[2:]).strip('"')))
    return texts


REF_DAVIS17 = Benchmark(
    name="ref_davis17",
    splits=("train", "valid"),
    files=_files,
    items=_items,
    published={"train": (60, None), "valid": (30, 244)},
)
