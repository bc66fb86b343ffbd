"""Episodes on disk: exact round trips and errors that name the file; and the order of draws."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from PIL import Image

from rollout.episodes import Annotation, DataError, Episode, IgnoreMask, TargetObject, annotate, read_episodes, write_episodes
from rollout.order import substitute_at, target_frame_at, uniform_frames
from segmentation_service.masks import encode_rle
from segmentation_service.video import VideoError, open_video, read_frame


def episode(name="a", difficulty=3.5, masks=None):
    mask = np.zeros((20, 30), bool)
    mask[2:6, 3:9] = True
    objects = (TargetObject("7", (annotate(0, mask), annotate(2, ~mask))),) if masks is None else masks
    return Episode(name, "test", "train", "v", "frames/v", 20, 30, 4, 8.0, "the thing", difficulty, (0, 1, 2), objects)


def test_round_trip(tmp_path):
    written = [episode(), episode("b", None), episode("none", masks=())]
    assert write_episodes(written, tmp_path / "x.parquet", rows_per_group=2) == 3
    read = list(read_episodes(tmp_path))
    assert [e.episode_id for e in read] == ["a", "b", "none"]
    assert read[0].objects == written[0].objects and read[1].difficulty is None
    assert read[0].masks(0).sum() == 24 and read[0].masks(1).shape == (0, 20, 30)
    assert read[0].objects[0].annotations[0].box == (3, 2, 8, 5)
    assert read[0].video_path == tmp_path / "frames/v"
    assert not list(tmp_path.glob("*.partial"))


def test_target_frames_are_those_that_show_the_target():
    assert episode().target_frames() == [0, 2]
    assert episode().target_frames(min_share=0.5) == [2]
    assert episode(masks=()).target_frames() == [0, 1, 2]  # no target anywhere: every annotated frame is a fair question


def test_what_is_wrong_with_a_data_set_is_said(tmp_path):
    with pytest.raises(DataError, match="no Parquet files here"):
        list(read_episodes(tmp_path))
    file = tmp_path / "x.parquet"
    write_episodes([episode()], file)
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["query", "fps"]), file)
    with pytest.raises(DataError, match="x.parquet: column fps, query is missing"):
        list(read_episodes(tmp_path))
    pq.write_table(table.set_column(table.schema.get_field_index("fps"), "fps", [["fast"]]), file)
    with pytest.raises(DataError, match="fps is string, not float"):
        list(read_episodes(tmp_path))
    file.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_episodes(tmp_path))


def test_no_ignored_pixels_may_be_written_as_null(tmp_path):
    write_episodes([episode()], tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    place = table.schema.get_field_index("ignore")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array([None], table.schema.field(place).type)), tmp_path / "x.parquet")
    assert [e.ignore for e in read_episodes(tmp_path)] == [()]


def test_what_version_1_lacks_is_filled_in(tmp_path):
    write_episodes([episode()], tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    old = table.drop_columns(["expression_id", "annotator", "query_type", "media", "ignore", "suspect"])
    pq.write_table(old.replace_schema_metadata({"schema_version": "1"}), tmp_path / "x.parquet")
    (read,) = read_episodes(tmp_path)
    assert (read.objects, read.media, read.ignore, read.suspect) == (episode().objects, "video", (), None)
    pq.write_table(table.replace_schema_metadata({"schema_version": "3"}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="written in version 3 of the schema, this one reads 1 and 2; import the data set again"):
        list(read_episodes(tmp_path))


def test_what_version_2_adds_comes_back(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[:3, 4:] = True
    ignore = (IgnoreMask(1, encode_rle(mask)["counts"]),)
    box = TargetObject("0", (Annotation(0, None, 6, (1, 2, 3, 3), (2, 2)),))
    written = replace(episode(), expression_id="9", annotator="annot2", query_type="reasoning", media="image", ignore=ignore, suspect="old", objects=(box,))
    write_episodes([written], tmp_path / "x.parquet", metadata={"more": "things"})
    (read,) = read_episodes(tmp_path)
    assert replace(read, root=".") == written and not read.has_masks and episode().has_masks
    assert np.array_equal(read.ignored(1), mask) and not read.ignored(0).any()
    assert pq.read_metadata(tmp_path / "x.parquet").metadata[b"more"] == b"things"
    with pytest.raises(DataError, match="has boxes and points but no masks"):
        read.masks(0)


def test_an_image_is_a_video_of_one_frame(tmp_path):
    Image.new("RGB", (30, 20), (9, 0, 0)).save(tmp_path / "a.png")
    video = open_video(tmp_path / "a.png")
    assert len(video) == 1 and read_frame(video, 0).shape == (20, 30, 3)
    with pytest.raises(VideoError, match="frame 1 was asked for, but the video has frames 0 to 0"):
        read_frame(video, 1)


def test_target_frames_and_stand_ins_are_drawn_from_all():
    assert {target_frame_at(i, [2, 5, 9], seed=0) for i in range(50)} == {2, 5, 9}
    for stand_ins in ([substitute_at(5, a, 7, seed=0) for a in range(1, 60)], [substitute_at(p, 1, 7, seed=0) for p in range(60)]):
        assert set(stand_ins) == set(range(7))


def test_uniform_frames():
    assert uniform_frames(9, 4) == [0, 3, 5, 8]
    assert uniform_frames(2, 4) == [0, 1]
    assert uniform_frames(9, 0) == []
