"""What a person gets wrong: one clear message, status 2, before anything starts, and no run folder left behind."""

import shutil

import pyarrow.parquet as pq
import pytest

from cluster import cli
from tests.cluster.test_loop import settings
from tests.conftest import TOY


@pytest.fixture
def refused(toy_data, tmp_path, capsys, monkeypatch):
    """Runs `videoseg train` with overrides that must be refused; returns the message."""
    monkeypatch.setattr("cluster.trainer.joined_cluster", None)  # nothing may get as far as starting processes

    def run(*overrides):
        status = cli.main(["train", *settings(toy_data, f"run.dir={tmp_path / 'runs'}", *overrides)])
        message = capsys.readouterr().err
        assert status == 2 and message.startswith("error: ") and "Traceback" not in message
        assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
        return message

    return run


def test_a_misspelt_key(refused):
    message = refused("rollout.group_sise=4")
    assert "rollout.group_sise" in message and "rollout.group_size" in message


def test_a_missing_checkpoint(refused):
    assert "policy.path = 'no/such/folder'" in refused("policy.path=no/such/folder")
    assert "segmentation.checkpoint" in refused("segmentation.checkpoint=no/such/folder")


def test_a_checkpoint_of_another_architecture(refused):
    assert "is a 'sam2' model" in refused(f"policy.path={TOY / 'sam2'}")
    assert "is a 'qwen2_5_vl' model, not SAM2" in refused(f"segmentation.checkpoint={TOY / 'policy'}")


def test_weights_of_another_size(refused, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(TOY / "policy", policy)
    config = (policy / "config.json").read_text()
    (policy / "config.json").write_text(config.replace('"intermediate_size": 384', '"intermediate_size": 320'))
    message = refused(f"policy.path={policy}")
    assert "do not fit its config.json" in message and "(384, 128) instead of (320, 128)" in message


def test_a_parquet_file_without_a_column(refused, toy_data, tmp_path):
    table = pq.read_table(toy_data / "train/episodes.parquet").drop_columns(["query"])
    pq.write_table(table, tmp_path / "episodes.parquet")
    assert "episodes.parquet: column query is missing" in refused(f"data.train={tmp_path / 'episodes.parquet'}")


@pytest.mark.parametrize("damage", ["truncated", "not a picture"])
def test_a_corrupt_jpeg(refused, toy_data, tmp_path, damage):
    data = tmp_path / "data"
    shutil.copytree(toy_data / "train", data)
    victim = sorted(data.rglob("*.jpg"))[37]
    victim.write_bytes(victim.read_bytes()[:900] if damage == "truncated" else b"hello")
    message = refused(f"data.train={data}", "data.max_broken_share=0")
    assert "1 of 16 videos cannot be read" in message and str(victim) in message and "raise data.max_broken_share" in message


def test_a_prompt_that_cannot_fit(refused):
    assert "more than prompt.max_tokens = 40" in refused("prompt.max_tokens=40")


def test_a_port_in_use(ray_session):
    """The learner's port is checked where it will be used: on rank 0's node."""
    import socket

    import ray
    from learner.actor import LearnerActor

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        learner = ray.remote(LearnerActor).remote()
        with pytest.raises(Exception, match=f"learner.port = {port} cannot be used") as caught:
            ray.get(learner.address.remote(port))
        from cluster.errors import user_error

        assert user_error(caught.value)  # `videoseg train` prints the message alone
        ray.kill(learner)
