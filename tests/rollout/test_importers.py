"""Every importer on a miniature in its benchmark's exact layout: masks, splits, targets and annotators come back exactly."""

import json
import pickle

import miniatures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniatures import HW, NAMES
from PIL import Image

from examples.own_videos import SPLITS, write_own_videos
from rollout.check_data import problems
from rollout.episodes import DataError, read_episodes
from rollout.importers.driver import BENCHMARKS, import_data
from rollout.importers.item import SourceError
from rollout.importers.reasonseg import paint
from rollout.toy_world import make_video
from segmentation_service.video_writer import write_video


def imported(kind, source, out, **options):
    """split -> {(video, expression): episode}, each without a problem; and the reports."""
    reports = import_data(kind, source, out, progress=lambda line: None, **options)
    found = {}
    for split in reports:
        episodes = list(read_episodes(out / split)) if reports[split]["episodes"] else []
        assert [problems(e) for e in episodes] == [[]] * len(episodes)
        assert {(e.source, e.split) for e in episodes} <= {(kind, split)}
        found[split] = {(e.video_id, e.expression_id): e for e in episodes}
        assert len({e.episode_id for e in episodes}) == len(found[split]) == reports[split]["episodes"]
    return found, reports


def assert_masks(episode, tracks, frames=range(len(NAMES))):
    """tracks: object id -> frame -> mask or None. Frame by frame, object by object, pixel by pixel."""
    assert episode.annotated_frames == tuple(frames) and [o.object_id for o in episode.objects] == [str(o) for o in tracks]
    for t in frames:
        expected = [m[t] for m in tracks.values() if m[t] is not None and m[t].any()]
        assert np.array_equal(episode.masks(t), np.stack(expected) if expected else np.zeros((0, *HW), bool)), t


def skipped(report):
    return {reason: found["queries"] for reason, found in report["skipped_by_reason"].items()}


def test_mevis(tmp_path):
    truth = miniatures.mevis(tmp_path / "mevis")
    found, reports = imported("mevis", tmp_path / "mevis", tmp_path / "out")
    assert list(found) == ["train", "valid_u", "valid"]
    for split, first in (("train", 0), ("valid_u", 20)):
        a, b, tracks = f"{split}_a", f"{split}_b", truth[split]
        assert list(found[split]) == [(a, "0"), (a, "1"), (a, "10"), (b, "0")]
        assert_masks(found[split][a, "0"], tracks[a])
        assert_masks(found[split][a, "10"], {first + 1: tracks[a][first + 1]})
        assert_masks(found[split][b, "0"], tracks[b])
        none = found[split][a, "1"]
        assert none.objects == () and none.query_type == "no_target" and none.target_frames() == list(range(6))
        assert found[split][a, "0"].query == "both of them" and found[split][a, "0"].num_frames == 6 and skipped(reports[split]) == {}
    hidden = found["valid"].values()
    assert len(hidden) == 4 and all(e.annotated_frames == () and e.objects == () and e.target_frames() == [] for e in hidden)
    assert "2 videos or images; the release that papers report on has 1662" in reports["train"]["notes"]
    assert any("mask_dict.json is not the published file" in note for note in reports["train"]["notes"])


def test_mevis_masks_that_are_public_must_be_there(tmp_path):
    miniatures.mevis(tmp_path / "mevis")
    (tmp_path / "mevis/train/mask_dict.json").unlink()
    with pytest.raises(SourceError, match="mask_dict.json is missing; the masks of train are public"):
        import_data("mevis", tmp_path / "mevis", tmp_path / "out", ["train"])


def test_defects_are_skipped_and_counted(tmp_path):
    root = tmp_path / "mevis/train"
    blob, track = miniatures.blob, miniatures.track
    tracks = {"v": {0: track(), 1: track()[:5], 2: [blob((10, 10))] * 6, 3: [None] * 6, 5: track()}}
    queries = {"v": {"0": ("good", [0]), "1": ("short", [0, 1]), "2": ("small", [2]), "3": ("never", [3]), "4": ("unknown", [4]), "5": ("broken", [5]), "6": ("  ", [0])}}
    miniatures.mevis_split(root, tracks, queries | {v: {"0": ("x", [0]), "1": ("y", [0])} for v in ("gone", "holed", "mixed", "torn")})
    (root / "JPEGImages/gone").rename(root / "elsewhere")
    (root / "JPEGImages/holed/00003.jpg").unlink()
    miniatures.write_frames(root / "JPEGImages/mixed", ["00002"], (12, 12))
    (root / "JPEGImages/torn/00001.jpg").write_bytes(b"not a picture")
    meta = json.loads((root / "meta_expressions.json").read_text())
    meta["videos"]["v"]["expressions"] |= {"7": {"exp": "uneven", "obj_id": [0, 1], "anno_id": [0]}, "8": {"exp": "none"}}
    miniatures.write_json(root / "meta_expressions.json", meta)
    masks = json.loads((root / "mask_dict.json").read_text())
    masks["5"][3]["counts"] = masks["5"][3]["counts"][:-1]
    miniatures.write_json(root / "mask_dict.json", masks)

    found, reports = imported("mevis", tmp_path / "mevis", tmp_path / "out")
    assert list(found["train"]) == [("v", "0")]
    assert skipped(reports["train"]) == {
        "media missing": 2,
        "frames missing on disk": 2,
        "frames of different sizes": 2,
        "unreadable frame": 2,
        "number of masks is not the number of frames": 1,
        "mask of another size than the frame": 1,
        "no mask on any frame": 1,
        "unknown object": 1,
        "broken mask": 1,
        "empty query": 1,
        "object ids and annotation ids differ in number": 1,
        "no annotation ids": 1,
    }
    assert reports["train"]["queries"] == 17 == reports["train"]["skipped"] + reports["train"]["episodes"]
    assert "v/1: annotation 1: 5 masks, 6 frames" in reports["train"]["skipped_by_reason"]["number of masks is not the number of frames"]["examples"]


def test_revos(tmp_path):
    truth = miniatures.revos(tmp_path / "ReVOS")
    found, reports = imported("revos", tmp_path / "ReVOS", tmp_path / "out")
    video = "mose/a1b2"
    assert list(found["train"]) == [(video, "0"), (video, "1"), (video, "2")]
    assert [e.query_type for e in found["train"].values()] == ["referring", "reasoning", "no_target"]
    assert_masks(found["train"][video, "0"], {0: truth[video][0]})
    assert_masks(found["train"][video, "1"], truth[video])
    assert found["train"][video, "2"].objects == ()
    assert skipped(reports["train"]) == {"masks may belong to other frames (TAO, UVO)": 1}
    assert_masks(found["valid"]["MeViS/x", "0"], truth["MeViS/x"])
    assert_masks(found["valid"]["TAO/y", "7"], truth["TAO/y"])
    assert found["valid"]["TAO/y", "7"].suspect and not found["valid"]["MeViS/x", "0"].suspect

    kept, _ = imported("revos", tmp_path / "ReVOS", tmp_path / "kept", keep_suspect=True)
    assert_masks(kept["train"]["UVO/all/-CiPki3XuVI", "0"], truth["UVO/all/-CiPki3XuVI"])
    assert kept["train"]["UVO/all/-CiPki3XuVI", "0"].suspect


def test_revos_contradictions_are_skipped(tmp_path):
    miniatures.revos(tmp_path / "ReVOS")
    file = tmp_path / "ReVOS/meta_expressions_train_.json"
    meta = json.loads(file.read_text())
    expressions = meta["videos"]["mose/a1b2"]["expressions"]
    expressions["0"]["obj_id"] = expressions["0"]["anno_id"] = []
    expressions["2"]["obj_id"] = expressions["2"]["anno_id"] = [1]
    expressions["1"]["type_id"] = 5
    meta["videos"]["UVO/all/-CiPki3XuVI"]["height"] = 25
    miniatures.write_json(file, meta)
    _, reports = imported("revos", tmp_path / "ReVOS", tmp_path / "out", keep_suspect=True, splits=["train"])
    assert skipped(reports["train"]) == {
        "empty annotation list": 1,
        "no-target query with objects": 1,
        "unknown type of query": 1,
        "frames of another size than the annotation says": 1,
    }


def test_ref_youtube_vos(tmp_path):
    root = tmp_path / "ref-youtube-vos"
    truth = miniatures.ref_youtube_vos(root)
    found, reports = imported("ref_youtube_vos", root, tmp_path / "out")
    assert list(found["train"]) == [(v, n) for v in ("00a", "00b") for n in ("0", "1", "2", "10")]
    for (video, n), episode in found["train"].items():
        number = 1 + int(n) % 2
        assert_masks(episode, {number: [v == number for v in truth[video]]})
        assert episode.query == f"thing {n}" and episode.fps == 6
    assert list(found["valid"]) == [("v1", "0"), ("v2", "0")] and list(found["test"]) == [("t1", "0")]
    assert all(e.target_frames() == [] for split in ("valid", "test") for e in found[split].values())
    assert "2 videos or images; the release that papers report on has 202" in reports["valid"]["notes"]

    miniatures.pickle_youtube_masks(root, truth)
    (root / "train/Annotations").rename(root / "train/elsewhere")
    pickled, _ = imported("ref_youtube_vos", root, tmp_path / "pickled", splits=["train"])
    assert {k: e.objects for k, e in pickled["train"].items()} == {k: e.objects for k, e in found["train"].items()}


def test_ref_youtube_vos_with_the_masks_of_valid(tmp_path):
    root = tmp_path / "ref-youtube-vos"
    miniatures.ref_youtube_vos(root)
    file = root / "meta_expressions/valid/meta_expressions.json"
    meta = json.loads(file.read_text())
    meta["videos"]["v1"]["expressions"]["0"]["obj_id"] = "3"
    miniatures.write_json(file, meta)
    values = [miniatures.blob() * 3 for _ in range(2)]
    for name, v in zip(("00010", "00020"), values):
        miniatures.write_png(root / f"valid/Annotations/v1/{name}.png", v)
    found, _ = imported("ref_youtube_vos", root, tmp_path / "out", splits=["valid"])
    assert_masks(found["valid"]["v1", "0"], {3: {2: values[0] == 3, 4: values[1] == 3}}, frames=(2, 4))
    assert found["valid"]["v2", "0"].annotated_frames == ()


def test_ref_youtube_vos_defects(tmp_path):
    root = tmp_path / "ref-youtube-vos"
    miniatures.ref_youtube_vos(root)
    file = root / "meta_expressions/train/meta_expressions.json"
    meta = json.loads(file.read_text())
    meta["videos"]["00a"]["expressions"] |= {"3": {"exp": "nobody", "obj_id": "9"}, "4": {"exp": "no object"}}
    miniatures.write_json(file, meta)
    (root / "train/Annotations/00a/00005.png").unlink()  # a frame that is listed and has no mask
    (root / "train/Annotations/00b/00005.png").rename(root / "train/Annotations/00b/00006.png")
    found, reports = imported("ref_youtube_vos", root, tmp_path / "out", splits=["train"])
    assert {e.annotated_frames for e in found["train"].values()} == {(0, 2, 3, 4, 5)}
    assert skipped(reports["train"]) == {"unknown object": 1, "no object id": 1, "mask on a missing frame": 4}


def test_a_pickle_that_follows_another_list_is_seen(tmp_path):
    root = tmp_path / "ref-youtube-vos"
    miniatures.pickle_youtube_masks(root, miniatures.ref_youtube_vos(root))
    (root / "train/Annotations").rename(root / "train/elsewhere")
    masks = pickle.loads((root / "train/mask_dict.pkl").read_bytes())
    (root / "train/mask_dict.pkl").write_bytes(pickle.dumps({n: masks[str((int(n) + 1) % 8)] for n in masks}))
    _, reports = imported("ref_youtube_vos", root, tmp_path / "out", splits=["train"])
    assert skipped(reports["train"])["masks do not follow the list of expressions"] >= 2


@pytest.mark.parametrize("converted", [False, True])
def test_ref_davis17(tmp_path, converted):
    truth, source = miniatures.ref_davis17(tmp_path / "davis"), tmp_path / "davis"
    if converted:
        source = tmp_path / "ref-davis"
        miniatures.convert_davis(tmp_path / "davis", source)
    found, reports = imported("ref_davis17", source, tmp_path / "out")
    assert {v for v, _ in found["train"]} == {"bear", "classic-car"} and {v for v, _ in found["valid"]} == {"dogs-scale"}
    assert list(found["valid"]) == [("dogs-scale", str(n)) for n in range(8)]
    annotators = ("annot1", "annot1_full_video", "annot2", "annot2_full_video")
    for (video, n), episode in (found["train"] | found["valid"]).items():
        number = 1 + int(n) // 4
        assert episode.annotator == annotators[int(n) % 4] and episode.query.endswith(f", {episode.annotator}")
        assert_masks(episode, {number: [v == number for v in truth[video]]})
        assert all(np.array_equal(episode.ignored(t), truth[video][t] == 255) for t in range(6))
        assert len(episode.ignore) == 1
    assert found["valid"]["dogs-scale", "6"].query == "dög two, annot2"
    assert skipped(reports["valid"]) == {}


def test_davis_annotators_that_cannot_be_told_apart(tmp_path):
    miniatures.ref_davis17(tmp_path / "davis")
    miniatures.convert_davis(tmp_path / "davis", tmp_path / "ref-davis")
    file = tmp_path / "ref-davis/meta_expressions/valid/meta_expressions.json"
    meta = json.loads(file.read_text())
    del meta["videos"]["dogs-scale"]["expressions"]["5"]
    miniatures.write_json(file, meta)
    found, reports = imported("ref_davis17", tmp_path / "ref-davis", tmp_path / "out", splits=["valid"])
    assert [n for _, n in found["valid"]] == ["0", "1", "2", "3"] and skipped(reports["valid"]) == {"annotators cannot be told apart": 3}
    texts = tmp_path / "davis/davis_text_annotations/Davis17_annot2.txt"
    texts.write_bytes(texts.read_bytes().replace(b"dog-scale 2", b"dog-scale 1"))
    _, reports = imported("ref_davis17", tmp_path / "davis", tmp_path / "out2", splits=["valid"])
    assert skipped(reports["valid"]) == {"annotators name different objects": 8}


def test_reasonvos(tmp_path):
    truth = miniatures.reasonvos(tmp_path / "ReasonVOS")
    found, reports = imported("reasonvos", tmp_path / "ReasonVOS", tmp_path / "out")
    episodes = found["test"]
    assert list(episodes) == [("12_ab_c", "0"), ("12_ab_c", "0#2"), ("12_ab_c", "1"), ("mose_7", "0")]
    assert_masks(episodes["12_ab_c", "0"], {1: truth["12_ab_c", 1]})
    assert_masks(episodes["12_ab_c", "0#2"], {2: truth["12_ab_c", 2]}, frames=(0, 2, 4))
    assert_masks(episodes["mose_7", "0"], {0: truth["mose_7", 0]})
    assert all(e.query_type == "reasoning" and e.suspect is None for e in episodes.values())

    miniatures.reasonvos(tmp_path / "old", old=True)
    old, _ = imported("reasonvos", tmp_path / "old", tmp_path / "out_old")
    assert len(old["test"]) == 4 and all("2024-12-27" in e.suspect for e in old["test"].values())


def test_reasonseg(tmp_path):
    miniatures.reasonseg(tmp_path / "reason_seg")
    found, _ = imported("reasonseg", tmp_path / "reason_seg", tmp_path / "out")
    assert list(found) == ["train", "val", "test"]
    assert list(found["train"]) == [("a_1", "0"), ("a_1", "1")] and list(found["val"]) == [("b", "0"), ("b", "1")]
    assert found["val"]["b", "0"].query == "the café’s sign" == found["test"]["c", "0"].query
    # Corners are cut to whole pixels and both ends of an outline are painted; the smallest polygon lies on top.
    target, ignore = np.zeros(HW, bool), np.zeros(HW, bool)
    target[2:16, 2:21] = True
    ignore[4:11, 6:13] = True
    ignore[6:8, 8:10] = False
    for episode in found["train"].values():
        assert episode.media == "image" and episode.num_frames == 1 and episode.video_path.is_file()
        assert np.array_equal(episode.masks(0)[0], target & ~ignore) and np.array_equal(episode.ignored(0), ignore)


def test_reasonseg_defects(tmp_path):
    miniatures.reasonseg(tmp_path)
    folder = tmp_path / "ReasonSeg/train"
    miniatures.write_frames(folder, ["lonely", "odd"])
    (folder / "odd.json").write_text("{")
    (folder / "nothing.json").write_text((folder / "a_1.json").read_text())
    _, reports = imported("reasonseg", tmp_path, tmp_path / "out", splits=["train"])
    assert skipped(reports["train"]) == {"no readable annotation": 2, "media missing": 2}


def test_of_equally_large_polygons_the_first_in_the_file_is_painted_last():
    square = miniatures.box_polygon(1, 1, 4, 4)
    assert paint([("target", square), ("ignore", square)], HW)[2, 2] == 1
    assert paint([("ignore", square), ("target", square)], HW)[2, 2] == 255


@pytest.mark.parametrize(
    "name, splits, refs",
    [("refcoco", ("train", "val", "testA", "testB"), "refs(unc).p"), ("refcoco+", ("train", "val", "testA", "testB"), "refs(unc).p"), ("refcocog", ("train", "val", "test"), "refs(umd).p")],
)
def test_refcoco(tmp_path, name, splits, refs):
    truth = miniatures.refcoco(tmp_path / "refer_seg", name, splits, refs)
    found, reports = imported(name, tmp_path / "refer_seg", tmp_path / "out")
    assert tuple(found) == splits
    for i, split in enumerate(splits):
        expected = [(str(100 + i), str(1000 + 10 * ann + k)) for ann in (10 * i, 10 * i + 1) for k in range(2)]
        assert list(found[split]) == expected and skipped(reports[split]) == {}
        for (_, sentence), episode in found[split].items():
            (target,) = episode.objects
            assert np.array_equal(episode.masks(0)[0], truth[target.object_id])
            assert episode.query == f"number {int(sentence) % 10} of {target.object_id}" and episode.media == "image"


def test_a_split_without_references_is_left_out_unless_it_was_asked_for(tmp_path):
    miniatures.refcoco(tmp_path, "refcoco", ("train", "testA"), "refs(unc).p")
    found, _ = imported("refcoco", tmp_path, tmp_path / "out")
    assert list(found) == ["train", "testA"] and not (tmp_path / "out/val").exists()
    with pytest.raises(SourceError, match="val of refcoco lists no video or image"):
        import_data("refcoco", tmp_path, tmp_path / "out", ["val"])


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    miniatures.refcoco(tmp_path, "refcoco", ("train",), "refs(unc).p")

    class Command:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps([Command()]))
    with pytest.raises(SourceError, match="not a pickle of plain types"):
        import_data("refcoco", tmp_path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("arrow", [False, True])
def test_visionreasoner(tmp_path, arrow):
    pictures, source = miniatures.visionreasoner(tmp_path / "set"), tmp_path / "set"
    if arrow:
        table, source = pq.read_table(source / "data"), tmp_path / "saved"
        source.mkdir()
        with pa.ipc.new_stream(source / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    found, reports = imported("visionreasoner", source, tmp_path / "out")
    assert list(found["train"]) == [("id_0", "0"), ("id_0", "1")]
    two, one = found["train"].values()
    assert [a.box for a in two.visible(0)] == [(1, 2, 10, 12), (20, 3, 31, 23)] and [a.point for a in two.visible(0)] == [(5, 6), (25, 20)]
    assert [(a.box, a.point) for a in one.visible(0)] == [((3, 4, 9, 11), (5, 6))]
    assert not two.has_masks and two.target_frames() == [0] and two.query == "Two of them"
    assert [e.video_path.read_bytes() for e in (two, one)] == pictures[:2]
    assert skipped(reports["train"]) == {"unreadable solution": 1, "box outside of the image": 1}


def test_wrong_folders_and_names_are_said(tmp_path):
    for kind in BENCHMARKS:
        with pytest.raises(SourceError, match=r"is not .* as its authors lay it out; looked for"):
            import_data(kind, tmp_path, tmp_path / "out")
    with pytest.raises(SourceError, match="mevis has no split val; its splits are train, valid_u, valid, test"):
        import_data("mevis", tmp_path, tmp_path / "out", ["val"])
    miniatures.write_json(tmp_path / "train/meta_expressions.json", {"videos": {"v": {"frames": []}}})
    with pytest.raises(SourceError, match="video v has no `expressions`"):
        import_data("mevis", tmp_path, tmp_path / "out")
    miniatures.write_json(tmp_path / "train/meta_expressions.json", {"videos": {"v": {"frames": [], "expressions": {"0": None}}}})
    miniatures.write_json(tmp_path / "train/mask_dict.json", {})
    with pytest.raises(SourceError, match="annotation of train is not in the layout of mevis .*download it again"):
        import_data("mevis", tmp_path, tmp_path / "out")


def test_own_videos(tmp_path):
    """Three video files with a table of queries: palette masks of two objects on some frames, 0/255 masks, and none at all."""
    source = tmp_path / "mine"
    clips = {name: make_video(seed) for name, seed in (("a.mp4", 1), ("sub/b.mp4", 2), ("c.mp4", 3))}
    for name, video in clips.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(source / name, map(video.frame, range(video.num_frames)), 12.5)
    hw = (96, 128)
    two, one = np.zeros(hw, np.uint8), np.zeros(hw, np.uint8)
    two[10:20, 30:50], two[40:60, 70:80], one[5:9, 5:9] = 1, 2, 255
    for t in (0, 4):
        miniatures.write_png(source / "masks/a" / f"{t:05d}.png", two)
    (source / "masks/b").mkdir()
    Image.fromarray(one).save(source / "masks/b/00002.png")
    rows = [
        "video,query,masks,objects,split",
        'a.mp4,"the left one, which leaves first",masks/a,1,',
        "a.mp4,all of them,masks/a,,train",
        "a.mp4,an elephant,masks/a,none,",
        "a.mp4,the third,masks/a,3,",
        "sub/b.mp4,the small one,masks/b,,valid",
        "c.mp4,who knows?,,,test",
        "gone.mp4,what?,,,test",
    ]
    (source / "queries.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    found, reports = imported("own", source, tmp_path / "out")
    train = found["train"]
    assert list(train) == [("a.mp4", "0"), ("a.mp4", "1"), ("a.mp4", "2")] and skipped(reports["train"]) == {"unknown object": 1}
    left, both, nothing = train.values()
    assert left.annotated_frames == both.annotated_frames == nothing.annotated_frames == (0, 4) and left.query == "the left one, which leaves first"
    assert np.array_equal(left.masks(4)[0], two == 1) and np.array_equal(both.masks(0)[0], two > 0)
    assert nothing.objects == () and nothing.query_type == "no_target" and (left.num_frames, left.fps) == (clips["a.mp4"].num_frames, 12.5)
    (b,) = found["valid"].values()
    assert b.video_path.resolve() == (source / "sub/b.mp4").resolve() and b.annotated_frames == (2,) and np.array_equal(b.masks(2)[0], one == 255)
    (c,) = found["test"].values()
    assert c.annotated_frames == () and skipped(reports["test"]) == {"media missing": 1}


@pytest.mark.parametrize(
    "table, said",
    [
        ("query\nwhat?\n", "has no column 'video'"),
        ("video,query,mask\na.mp4,what?,m\n", "has a column 'mask'"),
        ("video,query,split\na.mp4,what?,dev\n", "queries.csv:2: split 'dev'; the splits are train, valid, test"),
        ("video,query\n,what?\n", "queries.csv:2 names no video"),
        ("video,query,masks\na.mp4,what?,m\na.mp4,who?,n\n", "queries.csv:3: a.mp4 has masks in m and in n"),
        ("video,query\na.mp4,the dog, left one\n", "queries.csv:2 has more cells than columns"),
        ("video,query\n/data/a.mp4,what?\n", "queries.csv:2: video '/data/a.mp4' lies outside"),
        ("video,query\nb/../../a.mp4,what?\n", "lies outside"),
        ("video,query,masks\na.mp4,what?,m\n./a.mp4,who?,n\n", "queries.csv:3: a.mp4 has masks in m and in n"),
        (b"video,query\n\xff\xfe,what?\n", "cannot be read as a table in UTF-8"),
    ],
)
def test_a_wrong_table_is_said(tmp_path, table, said):
    (tmp_path / "queries.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(SourceError) as error:
        import_data("own", tmp_path, tmp_path / "out", progress=lambda line: None)
    assert said in str(error.value)


def test_a_broken_video_file_is_skipped(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    (tmp_path / "b.mp4").write_bytes(b"nor this")
    (tmp_path / "queries.csv").write_text("video,query\na.mp4,what?\nb.mp4,who?\n")
    _, reports = imported("own", tmp_path, tmp_path / "out")
    assert skipped(reports["train"]) == {"unreadable video": 2} and reports["train"]["episodes"] == 0


def test_numbered_masks_with_void_and_a_change_that_is_noticed(tmp_path):
    """255 beside numbers is neither an object nor background; a second import sees that a mask is another one."""
    values = np.zeros((96, 128), np.uint8)
    values[10:20, 30:50], values[40:60, 70:80], values[60:70, 70:80] = 1, 2, 255
    only_void = np.where(values == 255, values, 0)
    for t, of_frame in enumerate((values, only_void)):
        Image.fromarray(np.full((96, 128, 3), 40 * t, np.uint8)).save((tmp_path / "clip").mkdir(exist_ok=True) or tmp_path / f"clip/{t:05d}.png")
        miniatures.write_png(tmp_path / f"masks/{t:05d}.png", of_frame)
    (tmp_path / "queries.csv").write_text("video,query,masks,objects\nclip,all,masks,\nclip,the second,masks,2\nclip,a <|image_pad|>,masks,1\n")
    found, reports = imported("own", tmp_path, tmp_path / "out")
    every, second = found["train"].values()
    assert skipped(reports["train"]) == {"query with a media token": 1} and every.annotated_frames == (0, 1)
    assert np.array_equal(every.masks(0)[0], np.isin(values, (1, 2))) and np.array_equal(second.masks(0)[0], values == 2) and not len(every.masks(1))
    assert all(np.array_equal(every.ignored(t), values == 255) for t in (0, 1))
    miniatures.write_png(tmp_path / "masks/00000.png", only_void)
    with pytest.raises(DataError, match="annotation_sha256"):
        imported("own", tmp_path, tmp_path / "out")


def test_the_example_of_own_videos(tmp_path):
    write_own_videos(tmp_path / "mine")
    with pytest.raises(SystemExit, match="mine exists already"):
        write_own_videos(tmp_path / "mine")
    found, reports = imported("own", tmp_path / "mine", tmp_path / "out")
    assert {split: (r["items"], r["skipped"]) for split, r in reports.items()} == {"train": (2, 0), "valid": (1, 0)}
    for seed, (name, split) in enumerate(SPLITS.items(), 500):
        video = make_video(seed)
        episodes = [e for (v, _), e in found[split].items() if v == f"{name}.mp4"]
        assert [e.query for e in episodes] == [q.text for q in video.queries]
        for e, q in zip(episodes, video.queries):
            t = e.objects[0].annotations[0].frame
            assert np.array_equal(e.masks(t).any(0), video.masks(t)[list(q.targets)].any(0)) and len(e.annotated_frames) == video.num_frames
