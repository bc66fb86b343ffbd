"""OpenRLHF's remote-reward protocol: documented requests and replies, byte for byte, and what it cannot say."""

import json
from pathlib import Path

import httpx
import pytest
from openrlhf_fixtures import GOOD, PROMPT, REQUESTS, TARGET

from reward_service import RewardConfig
from reward_service.client import LocalClient, load
from reward_service.http_api import make_app
from reward_service.openrlhf_protocol import completion_of
from reward_service.serve_config import RewardServeConfig
from tests.segmentation_service.http_serving import serving

FIXTURES = Path(__file__).parent / "openrlhf"
ENDS = RewardServeConfig().end_tokens


@pytest.fixture(scope="module")
def http():
    config = RewardServeConfig(reward=RewardConfig.preset("vision_reasoner"))
    client = LocalClient(load(config))
    with serving(client, config, make_app) as url, httpx.Client(base_url=url, timeout=60, headers={"content-type": "application/json"}) as http:
        yield http
    client.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_documented_requests_get_the_documented_replies(http, name):
    answer = http.post("/get_reward", content=(FIXTURES / f"{name}.request.json").read_bytes())
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.content == (FIXTURES / f"{name}.reply.json").read_bytes()


def test_keys_that_are_not_ours_are_ignored_and_prompts_may_be_missing(http):
    asked = {"query": [GOOD], "labels": [TARGET], "datasources": ["x"], "query_token_ids": [[1]]}
    assert http.post("/get_reward", json=asked).json()["rewards"] == [7.0]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"labels": ["{}", "{}"]}, "1 queries, 1 prompts and 2 labels"),
        ({"labels": ["the cat"]}, "not the JSON of a target: 'the cat'"),
        ({"labels": ["[1]"]}, "not the JSON of a target"),
        ({"labels": ["[" * 100_000]}, "not the JSON of a target"),
        ({"labels": [None]}, "not the JSON of a target"),
        ({"labels": ["{}"]}, "target.image_size: Field required"),
        ({"labels": [json.dumps({"target": TARGET, "dificulty": 1})]}, "did you mean 'difficulty'?"),
        ({"query": ["no prompt"]}, "does not contain the end of its prompt"),
        ({"query": [3]}, "query.0: "),
        ({"labels": 3}, "labels: "),
    ],
)
def test_what_cannot_be_scored_fails_the_request_and_is_never_a_reward(http, changes, said):
    answer = http.post("/get_reward", json={**REQUESTS["one"], **changes})
    assert answer.status_code == 422 and said in answer.json()["error"] and "rewards" not in answer.json()


def test_one_invalid_item_fails_its_request(http):
    asked = {"query": [PROMPT + GOOD] * 3, "prompts": [PROMPT] * 3, "labels": [json.dumps(TARGET), "x", json.dumps(TARGET)]}
    answer = http.post("/get_reward", json=asked)
    assert answer.status_code == 422 and "1 of 3 items could not be scored" in answer.json()["error"]


def test_masks_that_cannot_be_had_are_worth_another_try():
    """OpenRLHF asks again five times, a second apart, and then gives up."""
    reward = RewardConfig.preset("videoseg_r1")
    reward.weights.mask_iou, reward.weights.negative_point, reward.length.penalty = 1.0, 0.0, False
    config = RewardServeConfig(reward=reward, segmentation="http://127.0.0.1:9", segmentation_seconds=0.2)
    client = LocalClient(load(config))
    label = {"target": {**TARGET, "masks": [None]}, "video": "v", "frame": 0}
    with serving(client, config, make_app) as url:
        answer = httpx.post(f"{url}/get_reward", json={"query": [GOOD], "labels": [label]}, timeout=60)
    assert answer.status_code == 503 and "no masks from the segmentation service" in answer.json()["error"] and answer.headers["retry-after"] == "5"
    client.close()


@pytest.mark.parametrize(
    "query, prompt, completion",
    [
        ("ab", "", "ab"),
        ("ab<|im_end|>", "a", "b"),
        ("ab</s></s><|endoftext|>", "a", "b"),
        ("<s> ab", "a", "b"),  # a token that begins the text, as some tokenizers decode it
        ("b", "a", None),
        (PROMPT + GOOD + PROMPT + "x", PROMPT, GOOD + PROMPT + "x"),
        (PROMPT + "old" + PROMPT + GOOD, PROMPT + "old" + PROMPT, GOOD),
        ("<|image_pad|>" * 9 + PROMPT + GOOD, "<|image_pad|>" + PROMPT, GOOD),
    ],
)
def test_where_the_completion_begins_and_ends(query, prompt, completion):
    assert completion_of(query, prompt, ENDS) == completion
