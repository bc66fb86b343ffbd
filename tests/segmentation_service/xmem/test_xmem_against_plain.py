"""Our XMem against the plain one of `benchmarks/`: random sizes, settings, arrivals and corrections, in float64 where no choice is close."""

import random

import pytest
import torch

import xmem_recipe as recipe
from plain_xmem import PlainXMem
from segmentation_service.xmem import XMem, XMemConfig, XMemTracker
from tiny_xmem import TINY


@pytest.fixture(scope="module")
def network(tiny_weights):
    network = XMem(TINY)
    network.load_state_dict(tiny_weights)
    return network.eval().double()


@pytest.mark.parametrize("seed", range(10))
def test_random_videos(network, seed):
    draw = random.Random(seed)
    height, width, total = draw.randint(17, 60), draw.randint(17, 60), draw.randint(1, 4)
    t_min, prototypes = draw.randint(2, 3), draw.randint(2, 12)
    config = XMemConfig(
        mem_every=draw.randint(1, 3),
        deep_update_every=draw.choice([-1, -1, 0, 3]),
        top_k=draw.choice([30, 60]),
        enable_long_term=draw.random() < 0.8,
        min_mid_term_frames=t_min,
        max_mid_term_frames=t_min + draw.randint(1, 3),
        num_prototypes=prototypes,
        max_long_term_elements=draw.choice([3 * prototypes, 10000]),
    )
    rgb, index = recipe.video(22, height, width, total, seed)
    arrivals = sorted([0, *(draw.randint(1, 12) for _ in range(total - 1))])
    ours, plain = XMemTracker(network, config), PlainXMem(network.state_dict(), config)
    for t in range(len(rgb)):
        known = sum(a < t for a in arrivals)
        new = [o + 1 for o, a in enumerate(arrivals) if a == t]
        mask = labels = None
        if new or (t and draw.random() < 0.1):
            labels = new or [draw.randint(1, known)]
            mask = recipe.one_hot(index[t], known + len(new), labels).double()
            labels = draw.choice([labels, labels, None]) if t else labels
        image = recipe.to_input(rgb[t]).double()
        torch.testing.assert_close(ours.step(image, mask, labels), plain.step(image, mask, labels), atol=1e-8, rtol=0, msg=lambda m: f"frame {t}: {m}")
