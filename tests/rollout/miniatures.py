"""Miniatures of the public benchmarks, each in the exact layout that its authors release. Every mask's truth is kept as an array."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco

HW = (24, 32)
NAMES = [f"{t:05d}" for t in range(6)]
RNG = np.random.default_rng(7)


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def write_frames(folder, names=NAMES, hw=HW):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(RNG.integers(0, 256, (*hw, 3), np.uint8)).save(folder / f"{name}.jpg")


def blob(hw=HW):
    """A mask of two rectangles, never empty."""
    mask = np.zeros(hw, bool)
    for _ in range(2):
        y, x = RNG.integers(0, hw[0] - 5), RNG.integers(0, hw[1] - 5)
        mask[y : y + RNG.integers(2, 6), x : x + RNG.integers(2, 6)] = True
    return mask


def track(absent=(), names=NAMES, hw=HW):
    """Frame -> mask, None where the object is out of view."""
    return [None if t in absent else blob(hw) for t in range(len(names))]


def rle(mask):
    if mask is None:
        return None
    found = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def write_png(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([v for i in range(256) for v in (i, 255 - i, i * 7 % 256)])
    image.save(file)


def labels(tracks, t):
    """One palette image of tracks by object number, later ones on top; and each object's mask as it can then be seen."""
    values = np.zeros(HW, np.uint8)
    for number, masks in tracks.items():
        if masks[t] is not None:
            values[masks[t]] = number
    return values


def mevis_split(root, tracks, expressions, masks=True):
    """tracks: video -> {anno_id: track}. expressions: video -> {id: (text, anno_ids)}."""
    meta = {}
    for video in expressions:
        write_frames(root / "JPEGImages" / video)
        entries = {n: {"exp": text} | ({"obj_id": list(range(len(ids))), "anno_id": ids} if masks else {}) for n, (text, ids) in expressions[video].items()}
        meta[video] = {"vid_id": 1, "frames": NAMES[::-1], "expressions": entries}
    write_json(root / "meta_expressions.json", {"videos": meta})
    if masks:
        write_json(root / "mask_dict.json", {str(a): [rle(m) for m in t] for tracks_of in tracks.values() for a, t in tracks_of.items()})


def mevis(root):
    """Two videos with one, two and no targets; returns split -> video -> {anno_id: track}."""
    truth = {}
    for first, split in ((0, "train"), (20, "valid_u"), (40, "valid")):
        tracks = {f"{split}_a": {first: track(), first + 1: track(absent=(0, 3))}, f"{split}_b": {first + 2: track(absent=range(5))}}
        queries = {
            f"{split}_b": {"0": ("the one that enters last", [first + 2])},
            f"{split}_a": {"0": ("both of them", [first, first + 1]), "1": ("a dog that is not there", []), "10": ("the second", [first + 1])},
        }
        mevis_split(root / split, tracks, queries, masks=split != "valid")
        truth[split] = tracks
    return truth


def revos(root):
    """Videos of three sources; returns video -> {anno_id: track}."""
    truth = {"mose/a1b2": {0: track(), 1: track(absent=(2,))}, "UVO/all/-CiPki3XuVI": {2: track()}, "MeViS/x": {3: track(), 4: track()}, "TAO/y": {5: track()}}
    for video in truth:
        write_frames(root / "JPEGImages" / video)
    entry = lambda text, kind, ids: {"exp": text, "obj_id": ids, "anno_id": ids, "type_id": kind}
    train = {
        "mose/a1b2": {"0": entry("the left one", 0, [0]), "1": entry("what could carry us both?", 1, [0, 1]), "2": entry("the elephant", 2, [])},
        "UVO/all/-CiPki3XuVI": {"0": entry("a shifted one", 0, [2])},
    }
    valid = {"MeViS/x": {"0": entry("the pair", 1, [3, 4])}, "TAO/y": {"7": entry("another shifted one", 0, [5])}}
    for split, expressions in (("train", train), ("valid", valid)):
        videos = {v: {"vid_id": 0, "height": HW[0], "width": HW[1], "frames": NAMES, "expressions": e} for v, e in expressions.items()}
        write_json(root / f"meta_expressions_{split}_.json", {"videos": videos})
    masks = {str(a): [rle(m) for m in t] for tracks in truth.values() for a, t in tracks.items()}
    write_json(root / "mask_dict.json", masks)
    write_json(root / "mask_dict_foreground.json", {})
    return truth


def ref_youtube_vos(root):
    """Frames listed are every fifth one; two objects, of which the second is in front. Returns frame -> palette values, by video."""
    names = [f"{t:05d}" for t in range(0, 30, 5)]
    truth, expressions = {}, {n: {"exp": f"thing {n}", "obj_id": str(1 + int(n) % 2)} for n in ("0", "1", "2", "10")}
    videos = {v: {"frames": names, "expressions": expressions} for v in ("00b", "00a")}
    for video in videos:
        tracks = {1: track(absent=(1,)), 2: track(absent=(4, 5))}
        write_frames(root / "train/JPEGImages" / video, names)
        truth[video] = [labels(tracks, t) for t in range(6)]
        for name, values in zip(names, truth[video]):
            write_png(root / "train/Annotations" / video / f"{name}.png", values)
    write_json(root / "meta_expressions/train/meta_expressions.json", {"videos": videos})
    write_json(root / "train/meta.json", {"videos": {v: {"objects": {"1": {"category": "cat"}, "2": {"category": "dog"}}} for v in videos}})
    hidden = lambda *ids: {"videos": {v: {"frames": names, "expressions": {"0": {"exp": f"what is in {v}"}}} for v in ids}}
    write_json(root / "meta_expressions/valid/meta_expressions.json", hidden("v1", "v2", "t1"))
    write_json(root / "meta_expressions/test/meta_expressions.json", hidden("t1"))
    for folder, video in (("valid", "v1"), ("valid", "v2"), ("test", "t1")):
        write_frames(root / folder / "JPEGImages" / video, names)
    return truth


def pickle_youtube_masks(root, truth):
    """VISA's copy: a pickle in place of the palette images, numbered over sorted videos and expression ids sorted as text."""
    videos, masks = json.loads((root / "meta_expressions/train/meta_expressions.json").read_text())["videos"], {}
    for video in sorted(videos):
        for n in sorted(videos[video]["expressions"]):
            number = int(videos[video]["expressions"][n]["obj_id"])
            found = [coco.encode(np.asfortranarray((v == number).astype(np.uint8))) for v in truth[video]]
            masks[str(len(masks))] = [r if coco.area(r) else None for r in found]
    (root / "train/mask_dict.pkl").write_bytes(pickle.dumps(masks))


def ref_davis17(root):
    """The release: texts of two annotators in four files, misspelt names and all. Returns video -> frame -> palette values."""
    davis, truth = root / "DAVIS", {}
    for number, (video, objects) in enumerate({"classic-car": 1, "dogs-scale": 2, "bear": 1}.items()):
        tracks = {o: track() for o in range(1, objects + 1)}
        write_frames(davis / "JPEGImages/480p" / video)
        truth[video] = [labels(tracks, t) for t in range(len(NAMES))]
        truth[video][2][:2, :3] = 255  # void
        for name, values in zip(NAMES, truth[video]):
            write_png(davis / "Annotations_unsupervised/480p" / video / f"{name}.png", values)
    (davis / "ImageSets/2017").mkdir(parents=True)
    (davis / "ImageSets/2017/train.txt").write_text("classic-car\nbear\n")
    (davis / "ImageSets/2017/val.txt").write_text("dogs-scale\n")
    (root / "davis_text_annotations").mkdir()
    for name, coding in (("annot1", "utf-8"), ("annot1_full_video", "utf-8"), ("annot2", "latin-1"), ("annot2_full_video", "latin-1")):
        lines = [f'clasic-car 1 "the car, {name}"', f'dog-scale 2 "dög two, {name}"', f'dog-scale 1 "dog one, {name}"', f'bear 1 "a bear, {name}"']
        (root / f"davis_text_annotations/Davis17_{name}.txt").write_bytes("\n".join(lines).encode(coding) + b"\n")
    return truth


def convert_davis(source, out):
    """The release as ReferFormer's converter lays it out."""
    for split, file in (("train", "train.txt"), ("valid", "val.txt")):
        videos = {}
        for video in (source / "DAVIS/ImageSets/2017" / file).read_text().split():
            for old, new in (("JPEGImages", "JPEGImages"), ("Annotations_unsupervised", "Annotations")):
                (out / split / new).mkdir(parents=True, exist_ok=True)
                (out / split / new / video).symlink_to(source / "DAVIS" / old / "480p" / video)
            texts = {"classic-car": ["the car"], "bear": ["a bear"], "dogs-scale": ["dog one", "dög two"]}[video]
            annotators = ("annot1", "annot1_full_video", "annot2", "annot2_full_video")
            pairs = [(f"{text}, {a}", str(k + 1)) for k, text in enumerate(texts) for a in annotators]
            videos[video] = {"frames": NAMES, "expressions": {str(n): {"exp": text, "obj_id": o} for n, (text, o) in enumerate(pairs)}}
        write_json(out / "meta_expressions" / split / "meta_expressions.json", {"videos": videos})


def reasonvos(root, old=False):
    """Names with underscores, an id that repeats, and an object annotated on every second frame. Returns (video, object) -> track."""
    truth = {("12_ab_c", 1): track(), ("12_ab_c", 2): track(absent=(0,)), ("mose_7", 0): track()}
    shown = {key: NAMES[::2] if key == ("12_ab_c", 2) else NAMES for key in truth}
    source = {"12_ab_c": "VIPSeg", "mose_7": "MOSE"}
    for video in source:
        write_frames(root / "JPEGImages" / video)
    for (video, o), masks in truth.items():
        for name, mask in zip(NAMES, masks):
            if name in shown[video, o]:
                write_png(root / f"Annotations/{source[video]}_{video}_{o}/{name}.png", np.zeros(HW) if mask is None else mask * 255)
    e = lambda o, n, text: {"obj_id": o, "exp_id": n, "exp_text": text, "is_sent": True}
    lists = {"12_ab_c": [e(1, 0, "Which can fly?"), e(2, 0, "Which can swim?"), e(2, 1, "Which is hungry?")], "mose_7": [e(0, 0, "What is it?")]}
    if old:
        lists = {v: {str(n): x for n, x in enumerate(found)} for v, found in lists.items()}
    write_json(root / "meta_expressions.json", {"videos": {v: {"source": source[v], "frames": NAMES, "expressions": lists[v]} for v in source}})
    return truth


def box_polygon(x1, y1, x2, y2):
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def reasonseg(root):
    """An ignored region over a target over which lies another target, a flag, two texts; and texts in Windows' coding."""
    shape = lambda label, *box: {"label": label, "points": box_polygon(*box)}
    for split, name, coding in (("train", "a_1", "utf-8"), ("val", "b", "cp1252"), ("test", "c", "utf-8")):
        folder = root / "ReasonSeg" / split
        write_frames(folder, [name])
        shapes = [shape("target", 8.9, 6, 9, 7.2), shape("target", 2, 2, 20.7, 15), shape("flag", 0, 0, 31, 23), shape("ignore", 6, 4, 12, 10)]
        text = ["the café’s sign", "what is read?"]
        (folder / f"{name}.json").write_bytes(json.dumps({"text": text, "is_sentence": False, "shapes": shapes}, ensure_ascii=False).encode(coding))


def refcoco(root, name, splits, refs):
    """One image a split, with two references: a polygon in two parts, and an RLE of counts. Returns ann_id -> mask."""
    images, annotations, references, truth = [], [], [], {}
    for i, split in enumerate(splits):
        file = f"COCO_train2014_{i:012d}.jpg"
        write_frames(root / "images/mscoco/images/train2014", [Path(file).stem])
        images.append({"id": 100 + i, "file_name": file, "height": HW[0], "width": HW[1]})
        parts = np.zeros(HW, bool)
        parts[3:8, 2:10] = parts[12:15, 20:30] = True
        polygons = [[2, 3, 10, 3, 10, 8, 2, 8], [20.0, 12.0, 30.0, 12.0, 30.0, 15.0, 20.0, 15.0]]
        mask = blob()
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]]))), prepend=0).tolist()
        runs.append(mask.size - sum(runs))
        for ann, segmentation, truth_of in ((10 * i, polygons, parts), (10 * i + 1, {"size": list(HW), "counts": runs}, mask)):
            annotations.append({"id": ann, "image_id": 100 + i, "segmentation": segmentation, "category_id": 1})
            truth[str(ann)] = truth_of
            sentences = [{"sent_id": 1000 + 10 * ann + k, "sent": f"number {k} of {ann}", "raw": "x", "tokens": ["x"]} for k in range(2)]
            references.append(
                {"ref_id": ann, "ann_id": ann, "image_id": 100 + i, "category_id": 1, "split": split, "file_name": file.replace(".jpg", f"_{ann}.jpg")}
                | {"sent_ids": [s["sent_id"] for s in sentences], "sentences": sentences}
            )
    write_json(root / name / "instances.json", {"images": images, "annotations": annotations})
    (root / name / refs).write_bytes(pickle.dumps(references, protocol=2))
    return truth


def visionreasoner(root, rows=None):
    """Rows of both projects' training sets in Parquet; returns the bytes of their images."""
    rows = rows or [
        ("id_0", "Two of them", '[{"bbox_2d": [1, 2, 10, 12], "point_2d": [5, 6]}, {"bbox_2d": [20, 3, 32, 24], "point_2d": [25, 20]}]'),
        ("id_0", "One of them", "<box>(3,4),(9,11)</box><points>(5,6),(7,8)</points>"),
        ("id_2", "Broken", "<box>(3,4)</box>"),
        ("id_3", "Outside", '[{"bbox_2d": [1, 2, 40, 12], "point_2d": [5, 6]}]'),
    ]
    root.mkdir(parents=True, exist_ok=True)
    pictures = []
    for _ in rows:
        write_frames(root / "made", ["x"])
        pictures.append((root / "made/x.jpg").read_bytes())
    columns = {"id": [r[0] for r in rows], "problem": [r[1] for r in rows], "solution": [r[2] for r in rows]}
    columns |= {"image": [{"bytes": b, "path": "x.jpg"} for b in pictures], "img_height": [480] * len(rows), "img_width": [640] * len(rows)}
    (root / "data").mkdir()
    pq.write_table(pa.table(columns), root / "data/train-00000-of-00001.parquet", row_group_size=2)
    return pictures
