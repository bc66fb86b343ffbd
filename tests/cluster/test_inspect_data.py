"""videoseg data import and inspect as commands; every kind of damage is found; the sheet shows the masks."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster import cli
from cluster.contact_sheet import CAPTION, HEIGHT, MARGIN, WIDTH, drawn_frame, shown_frames
from rollout.check_data import problems
from rollout.episodes import IgnoreMask, TargetObject, read_episodes, write_episodes

sys.path.insert(0, str(Path(__file__).parent.parent / "rollout"))
import miniatures


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ref-DAVIS17's miniature, imported by the command."""
    root = tmp_path_factory.mktemp("davis")
    miniatures.ref_davis17(root / "davis")
    assert cli.main(["data", "import", "ref_davis17", str(root / "davis"), str(root / "out"), "--workers", "1"]) == 0
    return root / "out"


def test_import_says_what_it_did(tmp_path, capsys):
    miniatures.revos(tmp_path / "ReVOS")
    assert cli.main(["data", "import", "revos", str(tmp_path / "ReVOS"), str(tmp_path / "out"), "--splits", "train", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "3 episodes of 4 queries about 2 videos or images" in printed
    assert "skipped 1: masks may belong to other frames (TAO, UVO) (such as UVO/all/-CiPki3XuVI/0)" in printed
    assert "note: 2 videos or images; the release that papers report on has 626" in printed
    assert cli.main(["data", "import", "coco", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "choose one of revos, mevis" in capsys.readouterr().err
    assert cli.main(["data", "import", "mevis", str(tmp_path / "ReVOS"), str(tmp_path / "out")]) == 2
    assert "is not mevis as its authors lay it out" in capsys.readouterr().err


def test_inspect_a_good_data_set(data, tmp_path, capsys):
    assert cli.main(["data", "inspect", str(data), "--check", "--workers", "1", "--sheet", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr().out
    assert f"{data / 'train'}: 8 episodes, 2 videos or images" in printed and f"{data / 'valid'}: 8 episodes, 1 videos" in printed
    assert "ref_davis17 valid referring: 8 (100.0%)" in printed and "with ignored pixels: 8" in printed
    assert "frames a video: mean 6," in printed and "difficulty: none" in printed and "12 episodes drawn" in printed
    assert printed.strip().endswith("checked: no problems")
    cell = (3 * (WIDTH + MARGIN) + 2 * MARGIN, HEIGHT + CAPTION + 2 * MARGIN)
    assert Image.open(tmp_path / "sheet.png").size == (2 * cell[0], 6 * cell[1])


def test_the_sheet_shows_masks_points_and_ignored_pixels(data):
    episode = next(read_episodes(data / "train"))
    frame_HW3 = np.zeros((episode.height, episode.width, 3), np.uint8)
    drawn_HW3, mask_HW = drawn_frame(episode, 2, frame_HW3), episode.masks(2)[0]
    x, y = episode.visible(2)[0].point
    assert tuple(drawn_HW3[y, x]) == (255, 255, 255)
    assert np.median(drawn_HW3[mask_HW].max(-1)) > 50
    assert (drawn_HW3[episode.ignored(2) & ~mask_HW] == 128).all(-1).any()
    assert shown_frames(replace(episode, objects=())) == [0, 2, 5] and len(shown_frames(episode)) in (2, 3)


def test_every_kind_of_damage_is_found(data):
    good = next(read_episodes(data / "valid"))
    (target,) = good.objects
    first = target.annotations[0]
    (x1, y1, x2, y2), (_, y) = first.box, first.point
    assert problems(good) == []

    def found(**changes):
        return problems(replace(good, **changes))

    def with_annotation(**changes):
        return found(objects=(TargetObject(target.object_id, (replace(first, **changes), *target.annotations[1:])),))

    outside = np.argwhere(~good.masks(first.frame)[0][y1 : y2 + 1, x1 : x2 + 1])
    assert with_annotation(box=(x1, y1, x2 + 1, y2)) == ["box is not the mask's"]
    assert with_annotation(box=(x1, y1, good.width, y2)) == ["box outside of the frame"]
    assert with_annotation(point=(x1 - 1, y)) == ["point outside of its box"]
    if len(outside):
        assert with_annotation(point=(x1 + int(outside[0][1]), y1 + int(outside[0][0]))) == ["point outside of its mask"]
    assert with_annotation(area=first.area + 1) == ["area is not the mask's"]
    assert with_annotation(counts=first.counts[:-1]) == ["mask of another size, or broken"]
    assert with_annotation(counts=None) == ([] if first.area == (x2 - x1 + 1) * (y2 - y1 + 1) else ["area is not the box's"])
    assert with_annotation(frame=1) == ["annotation outside of the annotated frames"]
    assert found(objects=(target, target)) == ["object id given twice"]
    assert found(objects=(TargetObject("1", ()),)) == ["targets that are never in view"]
    assert found(annotated_frames=(1, 0, 2, 3, 4, 5)) == found(annotated_frames=(0, 1, 2, 3, 4, 5, 6)) == ["annotated frames are not rising numbers of the video"]
    assert found(annotated_frames=(), ignore=())[0] == "objects without an annotated frame"
    assert found(num_frames=7) == ["number of frames is not that of the media"]
    assert found(ignore=(IgnoreMask(2, "x"),)) == ["ignore mask of no annotated frame, or of another size"]
    assert found(query=" ") == ["empty query"] and found(query_type="no_target") == ["query type does not fit"]
    assert found(difficulty=11.0) == ["difficulty outside of 1..10"] and found(fps=0.0) == ["frame rate is not positive"]
    assert found(video="../nowhere") == ["media missing"]
    assert found(media="image") == ["media is neither a video nor an image of one frame"]
    assert "size is not that of the media" in found(height=23)


def test_inspect_ends_with_an_error_where_something_is_wrong(data, tmp_path, capsys):
    episodes = [replace(e, video=str(e.video_path.resolve())) for e in read_episodes(data / "valid")]
    write_episodes([*episodes, episodes[0], replace(episodes[1], episode_id="x", query="")], tmp_path / "set/a.parquet")
    assert cli.main(["data", "inspect", str(tmp_path / "set"), "--check"]) == 2
    printed = capsys.readouterr()
    assert "PROBLEM in 1 episodes: episode id given twice" in printed.out and "PROBLEM in 1 episodes: empty query (such as x)" in printed.out
    assert "2 episodes of" in printed.err and "import the data set again" in printed.err
    assert cli.main(["data", "inspect", str(tmp_path / "set")]) == 0
    assert cli.main(["data", "inspect", str(tmp_path / "nothing")]) == 2
