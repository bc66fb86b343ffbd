"""What the tests of XMem share: the vectors, and networks filled by the recipe, official or tiny."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))  # plain_xmem.py

import xmem_recipe as recipe
from segmentation_service.xmem import load_xmem
from tiny_xmem import tiny_state_dict

VECTORS = Path(__file__).parent / "vectors"


@pytest.fixture(scope="session")
def vectors():
    return json.loads((VECTORS / "xmem_vectors.json").read_text())


@pytest.fixture(scope="session")
def arrays():
    with np.load(VECTORS / "xmem_vectors.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def official_shapes():
    """Names and shapes of the published checkpoint, in its order."""
    lines = (VECTORS / "xmem_state_dict.tsv").read_text().splitlines()[1:]
    fields = [line.split("\t") for line in lines]
    return {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape, _ in fields}


@pytest.fixture(scope="session")
def official(official_shapes):
    """seed -> a network of official size, the last one kept."""
    last = {}

    def network(seed):
        if seed not in last:
            last.clear()
            last[seed] = load_xmem(recipe.fill(official_shapes, seed))
        return last[seed]

    return network


@pytest.fixture(scope="session")
def tiny_weights():
    return tiny_state_dict()


@pytest.fixture(scope="session")
def tiny(tiny_weights):
    return load_xmem(tiny_weights)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small convolutions gain nothing from threads, and the vectors hold for any number."""
