"""What the whole test session shares: one Ray cluster, one toy data set, one short real run of the loop."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a model hub
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore Ctrl-C, and what they start would inherit that

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "examples/toy/models"


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray cluster for the whole session."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=400 * 2**20, namespace="videoseg", log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A small toy data set: the folder with `train`, `valid_u` and `valid`."""
    from rollout.toy_data import ToyDataConfig, write_toy_data

    out = tmp_path_factory.mktemp("data") / "toy"
    write_toy_data(out, ToyDataConfig(train=16, valid_u=6, valid=4), progress=lambda line: None)
    return out
