"""Adapters for TRL, verl and OpenRLHF, called as these call them, in the process and through a server."""

import asyncio
import importlib.util
import json
import math
import pickle
import subprocess
import sys

import pytest
from scored import COMPLETIONS, GOOD, TARGETS, expected, item

from reward_service import RewardConfig, think_text
from reward_service.adapters.openrlhf import openrlhf_reward_func
from reward_service.adapters.scorer import Scorer, ScoringFailed
from reward_service.adapters.trl import trl_reward
from reward_service.adapters.verl import verl_compute_score
from reward_service.client import LocalClient, load
from reward_service.http_api import make_app
from reward_service.serve_config import RewardServeConfig
from segmentation_service.service_request import ServiceError
from tests.conftest import ROOT
from tests.segmentation_service.http_serving import serving

WORDS = {"length": {"unit": "think_words"}}
LABEL = json.dumps(TARGETS[0])


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return list(text)


@pytest.fixture(scope="module")
def server():
    config = RewardServeConfig()
    client = LocalClient(load(config))
    with serving(client, config, make_app) as url:
        yield url
    client.close()


@pytest.fixture(params=["here", "by HTTP"])
def url(request, server):
    return server if request.param == "by HTTP" else None


def totals(completions, length=lambda text: len(think_text(text)), **more):
    return [expected(item(c, length=length(c), **more))[0] for c in completions]


def trl_call(function, completions, **columns):
    """As `GRPOTrainer._calculate_rewards` of TRL 1.16 does: by keyword, columns as lists, and what it offers for logging."""
    metrics = {}
    n = len(completions)
    call = dict(prompts=["p"] * n, completions=completions, completion_ids=[[1, 2]] * n, **columns)
    found = function(**call, trainer_state=object(), log_extra=lambda *_: None, log_metric=lambda name, value: metrics.__setitem__(name, value))
    return (asyncio.run(found) if asyncio.iscoroutine(found) else found), metrics


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trl(url, asynchronous):
    function = trl_reward(url=url, tokenizer=Characters(), asynchronous=asynchronous)
    assert asyncio.iscoroutinefunction(function) == asynchronous and function.__name__ == "videoseg_reward"
    columns = {"target": [LABEL] * 4, "difficulty": [5.5] * 4, "answer": ["not ours"] * 4}
    rewards, metrics = trl_call(function, COMPLETIONS[:4], **columns)
    assert rewards == totals(COMPLETIONS[:4], difficulty=5.5) and metrics["videoseg/invalid"] == 0.0
    assert metrics["videoseg/iou"] == sum(expected(item(c))[1]["iou"] for c in COMPLETIONS[:4]) / 4


def test_trl_with_messages(url):
    function = trl_reward(url=url, tokenizer=Characters())
    messages = [[{"role": "assistant", "content": GOOD}], [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}]]
    assert trl_call(function, messages, target=[LABEL, TARGETS[0]])[0] == totals([GOOD, GOOD])


def test_trl_leaves_out_what_could_not_be_scored_and_stops_where_nothing_can(url):
    function = trl_reward(url=url, reward=WORDS)
    rewards, metrics = trl_call(function, [GOOD, GOOD, "x"], target=[LABEL, "no target", LABEL])
    assert rewards[1] is None and rewards[0] > rewards[2] and metrics["videoseg/invalid"] == pytest.approx(1 / 3)
    with pytest.raises(ScoringFailed, match="none of 2 .*no target"):
        trl_call(function, [GOOD, GOOD], target=["no target"] * 2)
    with pytest.raises(ServiceError, match="422: reward.lenght: unknown key"):
        trl_call(trl_reward(url=url, reward={"lenght": {}}), [GOOD], target=[LABEL])


def test_verl(url):
    """As verl's reward managers call it, by keyword."""
    function = verl_compute_score(url=url, tokenizer=Characters(), whole_response=True)
    call = dict(data_source="revos", solution_str=GOOD, ground_truth=LABEL)
    found = function(**call, extra_info={"difficulty": 2, "index": 7}, reward_router_address=None)
    total, terms = expected(item(length=len(GOOD), difficulty=2))
    assert found["score"] == total and found["iou"] == terms["iou"] and all(isinstance(v, float) for v in found.values())
    assert function(**call)["score"] == function("revos", GOOD, {"target": TARGETS[0], "difficulty": None}, None)["score"]
    with pytest.raises(ScoringFailed, match="not the JSON of a target"):
        function("revos", GOOD, "x")


def test_openrlhf(url):
    """As `SingleTurnAgentExecutor` calls a reward function: lists of one, positional."""
    import torch

    function = openrlhf_reward_func(url=url, reward=WORDS)
    prompt = "<|im_start|>user\ncat?<|im_end|>\n<|im_start|>assistant\n"
    found = function([prompt + GOOD + "<|im_end|>"], [prompt], [LABEL])
    total = expected(item(length=len(think_text(GOOD).split())))[0]
    assert found["rewards"].tolist() == [total] and found["scores"].tolist() == pytest.approx([total / 8])
    assert found["extra_logs"]["iou"].shape == (1,) and isinstance(found["extra_logs"]["iou"], torch.Tensor)
    with pytest.raises(ScoringFailed, match="422: 1 of 1 items could not be scored"):
        function([prompt + GOOD], [prompt], ["x"])


def test_a_server_that_is_not_there():
    scorer = Scorer(url="http://127.0.0.1:9")
    scorer._started().patience_seconds = 0.0
    with pytest.raises(ServiceError, match="503: no answer from the server"):
        scorer.score([item()])


def test_settings_travel_to_other_processes():
    scorer = Scorer(preset="vision_reasoner", reward={"weights": {"iou": 2.0}})
    first = scorer.score([item()])
    again = pickle.loads(pickle.dumps(scorer))
    assert again.score([item()]) == first and first.maximum == 8.0 and math.isfinite(first.scores[0].total)
    with pytest.raises(ValueError, match="segmentation is a setting of the server"):
        Scorer(url="http://x", segmentation="http://y")


@pytest.mark.parametrize("name, attribute", [("verl_reward", "compute_score"), ("openrlhf_reward", "reward_func")])
def test_example_files_are_loaded_as_verl_and_openrlhf_load_them(name, attribute):
    spec = importlib.util.spec_from_file_location("custom_module", ROOT / f"examples/rewards/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, attribute)
    config = RewardConfig.preset("vision_reasoner")
    if name == "verl_reward":
        assert function("revos", GOOD, LABEL, {})["score"] == expected(item(), config)[0]
    else:
        assert function([GOOD], [""], [LABEL])["rewards"].tolist() == [expected(item(), config)[0]]


def test_adapters_are_light():
    code = "import sys, reward_service.adapters.trl, reward_service.adapters.verl, reward_service.adapters.openrlhf\n"
    code += "found = [m for m in ('torch', 'ray', 'transformers', 'trl') if m in sys.modules]\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
