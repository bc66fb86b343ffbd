"""Run folders and checkpoint folders: whole or absent, never overwritten, found again, damage is named."""

import json
import os
import pickle
import time
from dataclasses import dataclass, field

import pytest

from cluster import checkpoints, run_folder
from cluster.errors import CheckpointError, RunFolderError
from cluster.run_folder import RunFolder, find, plan


@dataclass
class Run:
    name: str = "x"
    seed: int = field(default=0, metadata={"help": "The seed."})


@dataclass
class Config:
    run: Run = field(default_factory=Run)


@dataclass
class Machine:
    cuda_devices: int = 0


def test_planning_makes_nothing_and_creating_makes_all(tmp_path):
    folder = plan(tmp_path / "runs", "one", "debug")
    assert list(tmp_path.iterdir()) == [] and not folder.exists()
    folder.create(Config(), Machine(), ["videoseg", "train"])
    assert folder.exists() and folder.rollouts.is_dir() and folder.checkpoints.is_dir()
    stamp = json.loads(folder.environment.read_text())
    assert stamp["command_line"] == ["videoseg", "train"] and stamp["hardware"] == {"cuda_devices": 0}
    assert stamp["packages"]["torch"] and stamp["videoseg_r1"]
    assert "seed: 0  # The seed." in folder.config.read_text()
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"one", "latest"}
    assert os.readlink(tmp_path / "runs" / "latest") == "one"


def test_latest_moves_but_never_replaces_a_real_folder(tmp_path):
    for name in ("a", "b"):
        plan(tmp_path, name, "debug").create(Config())
    assert find("latest", tmp_path).name == "b" and find(tmp_path / "a").name == "a" and find("a", tmp_path).name == "a"
    other = tmp_path / "other"
    (other / "latest").mkdir(parents=True)
    plan(other, "c", "debug").create(Config())
    assert (other / "latest").is_dir() and not (other / "latest").is_symlink()


def test_names_that_are_taken_or_impossible_are_refused(tmp_path):
    plan(tmp_path, "a", "debug").create(Config())
    with pytest.raises(RunFolderError, match="already something") as caught:
        plan(tmp_path, "a", "debug")
    assert "videoseg resume" in caught.value.remedy
    for name in ("latest", "../x", "", ".hidden", "a b"):
        with pytest.raises(RunFolderError, match="cannot be a run's name"):
            plan(tmp_path, name, "debug")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="not a folder"):
        plan(tmp_path / "file", "a", "debug")


def test_automatic_names_carry_recipe_and_time_and_never_collide(tmp_path):
    now = time.struct_time((2026, 1, 2, 3, 4, 5, 0, 1, 0))
    first = plan(tmp_path, "auto", "debug", now)
    assert first.name == "debug-20260102-030405"
    first.create(Config())
    assert plan(tmp_path, "auto", "debug", now).name == "debug-20260102-030405-2"


def test_a_name_taken_between_planning_and_creating_is_not_overwritten(tmp_path):
    folder = plan(tmp_path, "a", "debug")
    (tmp_path / "a").mkdir()  # empty: a plain rename would replace it
    with pytest.raises(RunFolderError, match="already something"):
        folder.create(Config())
    assert list((tmp_path / "a").iterdir()) == [] and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_crash_while_creating_leaves_nothing(tmp_path, monkeypatch):
    folder = plan(tmp_path, "a", "debug")
    monkeypatch.setattr(run_folder, "flush_to_disk", lambda path: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(RunFolderError, match="no space left"):
        folder.create(Config())
    assert list(tmp_path.iterdir()) == []


def test_finding_none_names_those_that_exist(tmp_path):
    plan(tmp_path, "a", "debug").create(Config())
    with pytest.raises(RunFolderError) as caught:
        find("b", tmp_path)
    assert "are a, latest" in caught.value.remedy
    with pytest.raises(RunFolderError) as caught:
        find("b", tmp_path / "none")
    assert "there are no runs" in caught.value.remedy


def test_git_stamp_only_of_a_checkout(tmp_path):
    assert run_folder.git_stamp(tmp_path) is None


def test_run_folder_paths():
    folder = RunFolder(run_folder.Path("runs/a"))
    assert [str(p) for p in (folder.metrics, folder.tensorboard)] == ["runs/a/metrics.jsonl", "runs/a/tensorboard"]


def write(folder, step, content=b"weights", **extra):
    with checkpoints.writing(folder, step, extra) as temporary:
        (temporary / "rank0").mkdir()
        (temporary / "rank0" / "state.bin").write_bytes(content)


def test_checkpoint_round_trip(tmp_path):
    write(tmp_path, 40, data_position=7)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000040"]
    found, rejected = checkpoints.latest(tmp_path)
    assert found.step == 40 and found.manifest["data_position"] == 7 and rejected == []
    assert found.manifest["files"] == [{"path": "rank0/state.bin", "bytes": 7, "sha256": checkpoints.file_hash(found.path / "rank0/state.bin")}]


def test_a_failed_write_leaves_nothing_and_the_old_one_stays(tmp_path):
    write(tmp_path, 1, b"old")
    with pytest.raises(RuntimeError), checkpoints.writing(tmp_path, 1) as temporary:
        (temporary / "half").write_bytes(b"x")
        raise RuntimeError("rank 1 died")
    assert (tmp_path / "step_000001/rank0/state.bin").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    with pytest.raises(CheckpointError, match="nothing was written"), checkpoints.writing(tmp_path, 2):
        pass


def test_the_same_step_can_be_written_again(tmp_path):
    write(tmp_path, 1, b"old")
    write(tmp_path, 1, b"new")
    assert (checkpoints.latest(tmp_path)[0].path / "rank0/state.bin").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "manifest"])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    file = tmp_path / "step_000002/rank0/state.bin"
    if damage == "truncate":
        file.write_bytes(b"wei")
    elif damage == "alter":
        file.write_bytes(b"WEIGHTS")
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / "step_000002/manifest.json").write_text("{")
    found, rejected = checkpoints.latest(tmp_path)
    assert found.step == 1 and len(rejected) == 1
    assert ("manifest.json" if damage == "manifest" else "rank0/state.bin") in str(rejected[0])
    with pytest.raises(CheckpointError, match="step_000002"):
        checkpoints.load(tmp_path / "step_000002")
    if damage == "alter":
        assert checkpoints.load(tmp_path / "step_000002", hashes=False).step == 2


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoints.latest(tmp_path / "none")
    (tmp_path / ".step_000009.tmp").mkdir()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoints.latest(tmp_path)


def test_keep_last(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step)
    (tmp_path / ".step_000120.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoints.keep_last(tmp_path, 2, protect=(5,)) == [10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_000005", "step_000015", "step_000100"]
    with pytest.raises(ValueError):
        checkpoints.keep_last(tmp_path, 0)


def test_steps_sort_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 7):
        write(tmp_path, step)
    assert [s for s, _ in checkpoints.steps(tmp_path)] == [7, 999_999, 1_000_000]


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(CheckpointError("broken", "mend it")))
    assert (str(error), error.remedy) == ("broken", "mend it")
