"""The committed toy XMem carries masks through toy videos that it never saw, and is trained on what the tracker does."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples.toy.train_xmem import DIMS, SIZES, SLOTS, evaluate, held_out, make_batch, unroll
from segmentation_service.config import PropagationConfig
from segmentation_service.propagation import Propagator
from segmentation_service.xmem import XMem, XMemConfig, XMemTracker, load_xmem

TOY = Path(__file__).resolve().parents[2] / "examples/toy/models/xmem"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_held_out_j():
    found = evaluate(Propagator.load(PropagationConfig(checkpoint=str(TOY), size=SIZES[-1])), held_out(12))
    assert found["J"] >= 0.8, found


def test_the_folder_is_small_and_loads_strictly():
    assert load_xmem(TOY, XMemConfig(dims=DIMS)).dims == DIMS
    assert sum(f.stat().st_size for f in TOY.iterdir()) < 4e6


@pytest.mark.parametrize("coin, mem_every", [(0.0, 1), (1.0, 100)])
def test_training_takes_the_steps_of_the_tracker(coin, mem_every):
    """Every frame remembered, or only the first."""
    torch.manual_seed(0)
    network = load_xmem(XMem(DIMS).state_dict())
    batch = make_batch(np.random.default_rng(1), clips=2, length=4, size=96)
    with torch.no_grad():
        trained = unroll(network, batch, SimpleNamespace(random=lambda: coin), top_k=30)
    for b in range(2):
        slots = batch.present[:, b].nonzero()[:, 0]
        tracker = XMemTracker(network, XMemConfig(mem_every=mem_every))
        tracker.step(batch.images[0, b], batch.labels[0, b] == 1 + slots[:, None, None])
        for t in range(1, 4):
            probs = tracker.step(batch.images[t, b])
            torch.testing.assert_close(trained[t - 1][[0, *(1 + slots)], b], probs, atol=1e-4, rtol=0)
            assert all(trained[t - 1][1 + slot, b].max() < 1e-6 for slot in range(SLOTS) if slot not in slots)
