"""Where the files that a configuration names are found, and what is made where it is missing."""

from pathlib import Path

import pytest

from cluster import config, config_files, paths
from cluster.errors import MissingFileError


def test_paths_as_given_then_from_the_root_then_the_hub(tmp_path, monkeypatch):
    root, here = tmp_path / "root", tmp_path / "here"
    (root / "models" / "a").mkdir(parents=True)
    (here / "models" / "b").mkdir(parents=True)
    monkeypatch.chdir(here)
    find = lambda given, hub=True: paths.resolve_path(given, "policy.path", hub, root)
    assert find("models/b") == str(here / "models" / "b")
    assert find("models/a") == str(root / "models" / "a")
    assert find(str(here / "models/b")) == str(here / "models/b")
    assert find("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    for missing in ("models/c", "examples/toy/models/polcy", "/nowhere/a", "./Qwen/x", "name"):
        with pytest.raises(MissingFileError, match="policy.path = ") as caught:
            find(missing)
        assert "tried" in str(caught.value) and "policy.path=PATH" in caught.value.remedy
    with pytest.raises(MissingFileError) as caught:
        find("models/c")
    assert str(here / "models/c") in str(caught.value) and str(root / "models/c") in str(caught.value)
    with pytest.raises(MissingFileError):
        find("org/name", hub=False)


def files_config(tmp_path, *more):
    for name in ("policy", "sam2"):
        (tmp_path / name).mkdir()
    models = [f"policy.path={tmp_path}/policy", f"segmentation.checkpoint={tmp_path}/sam2"]
    data = [f"data.train={tmp_path}/toy/train", f"data.evaluation={tmp_path}/toy/valid_u"]
    return config.load("debug", [*models, *data, *more])


def test_missing_files_are_all_listed_and_generated_data_is_not_missed(tmp_path):
    c = files_config(tmp_path)
    assert config_files.file_problems(c) == []
    (tmp_path / "x").mkdir()
    with pytest.raises(MissingFileError) as caught:
        config_files.locate(files_config(tmp_path / "x", "data.generate=null"))
    assert "data.train" in str(caught.value) and "data.evaluation" in str(caught.value)
    (tmp_path / "policy").rmdir()
    with pytest.raises(MissingFileError, match="policy.path"):
        config_files.make_missing_data(c)
    assert not (tmp_path / "toy").exists()  # nothing is generated for a run that cannot start


def test_weights_for_propagation_are_looked_for_where_they_are_named(tmp_path):
    (tmp_path / "xmem.pth").touch()
    for split in ("train", "valid_u"):
        (tmp_path / "toy" / split).mkdir(parents=True)
    c = files_config(tmp_path, f"segmentation.propagation.checkpoint={tmp_path}/xmem.pth", "segmentation.propagation.xmem.mem_every=3")
    located = config_files.locate(c).segmentation.propagation
    assert (located.checkpoint, located.xmem.mem_every) == (f"{tmp_path}/xmem.pth", 3)
    (tmp_path / "xmem.pth").unlink()
    with pytest.raises(MissingFileError, match="segmentation.propagation.checkpoint = .*xmem.pth"):
        config_files.locate(c)
    for split in ("x/toy/train", "x/toy/valid_u"):
        (tmp_path / split).mkdir(parents=True)
    hub = files_config(tmp_path / "x", "segmentation.propagation.method=sam2", "segmentation.propagation.checkpoint=facebook/sam2.1-hiera-large")
    assert config_files.locate(hub).segmentation.propagation.checkpoint == "facebook/sam2.1-hiera-large"


def test_an_architecture_is_a_file_or_a_name(tmp_path, monkeypatch):
    for split in ("train", "valid_u"):
        (tmp_path / "toy" / split).mkdir(parents=True)
    (tmp_path / "own.yaml").touch()
    monkeypatch.chdir(tmp_path)
    named = "configs/sam2.1/sam2.1_hiera_l.yaml"
    located = config_files.locate(files_config(tmp_path, f"segmentation.model_config={named}", "segmentation.propagation.model_config=own.yaml"))
    assert (located.segmentation.model_config, located.segmentation.propagation.model_config) == (named, str(tmp_path / "own.yaml"))


def test_missing_data_is_generated_once(tmp_path, monkeypatch):
    from rollout import toy_data

    made = []

    def write(out, progress):
        made.append(out)
        for split in ("train", "valid_u", "valid"):
            (Path(out) / split).mkdir(parents=True)

    monkeypatch.setattr(toy_data, "write_toy_data", write)
    c = files_config(tmp_path)
    config_files.make_missing_data(c, progress=lambda text: None)
    assert made == [tmp_path / "toy"] and config_files.locate(c).data.train == str(tmp_path / "toy/train")
    config_files.make_missing_data(c)
    assert len(made) == 1
    (tmp_path / "toy/train").rmdir()
    with pytest.raises(MissingFileError, match="is not there, but") as caught:
        config_files.make_missing_data(c)
    assert "delete" in caught.value.remedy
