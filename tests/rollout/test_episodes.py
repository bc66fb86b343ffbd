"""Episodes on disk, and the order of draws: exact round trips and errors that name the file."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from rollout.episodes import DataError, Episode, TargetObject, annotate, fingerprint, read_episodes, write_episodes
from rollout.order import episode_at, substitute_at, target_frame_at, uniform_frames


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


def test_fingerprint_follows_the_content(tmp_path):
    write_episodes([episode()], tmp_path / "x.parquet")
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path)
    write_episodes([episode(difficulty=3.6)], tmp_path / "x.parquet")
    assert fingerprint(tmp_path) != first


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


def test_every_epoch_is_a_permutation_and_any_position_can_be_asked_for():
    for epoch in range(3):
        drawn = [episode_at(epoch * 7 + i, 7, seed=3) for i in range(7)]
        assert sorted(drawn) == list(range(7))
    assert [episode_at(i, 7, 3) for i in range(7)] != [episode_at(i, 7, 4) for i in range(7)]
    assert {target_frame_at(i, [2, 5, 9], seed=0) for i in range(50)} == {2, 5, 9}
    for stand_ins in ([substitute_at(5, a, 7, seed=0) for a in range(1, 60)], [substitute_at(p, 1, 7, seed=0) for p in range(60)]):
        assert set(stand_ins) == set(range(7))


def test_uniform_frames():
    assert uniform_frames(9, 4) == [0, 3, 5, 8]
    assert uniform_frames(2, 4) == [0, 1]
    assert uniform_frames(9, 0) == []
