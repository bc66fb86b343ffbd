"""The driver of the importers: shards that are kept, an order that does not depend on processes, and earlier imports that are not mixed up."""

import json

import miniatures
import pytest

from rollout.episodes import DataError, read_episodes
from rollout.importers.driver import import_data


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """MeViS's training split with five videos of one query, the fourth of them missing."""
    root = tmp_path_factory.mktemp("source") / "mevis"
    tracks = {f"v{i}": {i: miniatures.track()} for i in range(5)}
    miniatures.mevis_split(root / "train", tracks, {f"v{i}": {"0": (f"query {i}", [i])} for i in range(5)})
    (root / "train/JPEGImages/v3").rename(root / "v3")
    return root


def content(out):
    return {f.name: f.read_bytes() for f in sorted((out / "train").iterdir()) if f.suffix == ".parquet"}


class Stopped(Exception):
    pass


def test_an_interrupted_import_goes_on_where_it_was(source, tmp_path):
    whole = import_data("mevis", source, tmp_path / "whole", shard_items=1, progress=lambda line: None)

    def stop(line):
        if ": 4/5" in line:
            raise Stopped

    with pytest.raises(Stopped):
        import_data("mevis", source, tmp_path / "out", shard_items=1, progress=stop)
    assert not (tmp_path / "out/train").exists()  # nothing to train on by mistake
    partial = tmp_path / "out/train.partial"
    assert sorted(f.name for f in partial.iterdir()) == ["report.json"] + [f"shard-0000{n}.parquet" for n in range(4)]
    written = {f.name: f.stat().st_mtime_ns for f in partial.glob("*.parquet")}
    (partial / "shard-00004.partial").write_bytes(b"half a shard")

    lines = []
    resumed = import_data("mevis", source, tmp_path / "out", shard_items=1, progress=lines.append)
    assert {name: (tmp_path / "out/train" / name).stat().st_mtime_ns for name in written} == written
    assert content(tmp_path / "out") == content(tmp_path / "whole") and not partial.exists()
    assert resumed == whole and whole["train"]["skipped_by_reason"]["media missing"]["queries"] == 1
    assert lines[-1] == "mevis/train: 5/5 videos or images, 4 episodes, 1 skipped"
    assert [e.video_id for e in read_episodes(tmp_path / "out/train")] == ["v0", "v1", "v2", "v4"]
    assert json.loads((tmp_path / "out/train/report.json").read_text()) == resumed["train"]


def test_processes_change_nothing_and_a_second_import_does_nothing(source, tmp_path):
    import_data("mevis", source, tmp_path / "one", shard_items=3, progress=lambda line: None)
    first = import_data("mevis", source, tmp_path / "two", shard_items=3, workers=2, progress=lambda line: None)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    lines = []
    assert import_data("mevis", source, tmp_path / "two", shard_items=3, progress=lines.append) == first
    assert lines == [f"mevis/train: already imported to {tmp_path / 'two/train'}"]


def test_imports_are_not_mixed(source, tmp_path):
    import_data("mevis", source, tmp_path / "out", progress=lambda line: None)
    with pytest.raises(DataError, match="of another import .*keep_suspect was False, is True.*remove it or give another folder"):
        import_data("mevis", source, tmp_path / "out", keep_suspect=True, progress=lambda line: None)
    (tmp_path / "own/train").mkdir(parents=True)
    with pytest.raises(DataError, match="was not made by an import"):
        import_data("mevis", source, tmp_path / "own", progress=lambda line: None)


def test_data_set_and_frames_move_together(source, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "mevis").symlink_to(source)
    import_data("mevis", home / "mevis", home / "data", progress=lambda line: None)
    assert all(e.video_path.is_dir() for e in read_episodes(home / "data/train"))
    copied = tmp_path / "copied"
    import shutil

    shutil.copytree(source, copied / "mevis")
    import_data("mevis", copied / "mevis", copied / "data", progress=lambda line: None)
    copied.rename(tmp_path / "elsewhere")
    assert all(e.video_path.is_dir() for e in read_episodes(tmp_path / "elsewhere/data/train"))
