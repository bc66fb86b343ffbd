"""What the tests of the segmentation service share."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

from tiny_sam2 import save_tiny_sam2


@pytest.fixture(scope="session")
def tiny_sam2(tmp_path_factory) -> Path:
    """The folder of a tiny random SAM2."""
    return save_tiny_sam2(tmp_path_factory.mktemp("sam2") / "tiny")


@pytest.fixture
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def frame():
    """A frame that is not square, uint8 (60, 100, 3)."""
    y, x = np.mgrid[0:60, 0:100]
    image = np.stack([x * 2, y * 3, (x * y) % 255], -1).astype(np.uint8)
    image[20:45, 30:70] = (250, 60, 40)
    return image
