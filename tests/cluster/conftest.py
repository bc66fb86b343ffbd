"""The toy policy with vLLM, SAM2 and XMem, for what puts a policy to use."""

from contextlib import nullcontext

import pytest

from cluster.inference import Inference
from cluster.policies import find_policy
from tests.conftest import TOY

TOY_MODELS = [f"policy.path={TOY / 'policy'}", f"segmentation.checkpoint={TOY / 'sam2'}", f"segmentation.propagation.checkpoint={TOY / 'xmem'}"]


@pytest.fixture(scope="module")
def policy():
    return find_policy(overrides=TOY_MODELS)


@pytest.fixture(scope="module")
def model(policy):
    with Inference(policy) as model:
        yield model


@pytest.fixture
def start(model):
    """What a command starts: the model that runs already."""
    return lambda policy: nullcontext(model)
