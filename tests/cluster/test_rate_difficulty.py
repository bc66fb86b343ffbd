"""Offline rating of difficulty, against a fake of someone else's endpoint on a real port that can be told to misbehave, and in vLLM."""

import base64
import dataclasses
import io
import json
import re
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jsonschema
import numpy as np
import pytest
from PIL import Image

from cluster import cli, rate_difficulty
from cluster.difficulty_ratings import VARIANTS, BadReply, rating_prompt, rating_schema, read_ratings
from cluster.errors import UserError
from cluster.rate_difficulty import RatingConfig, rate_data
from cluster.raters import VllmRater
from rollout.episodes import read_episodes, write_episodes
from segmentation_service.video import open_video

FIVE = {"scene_complexity": 2, "segmentation_challenge": 4, "temporal_ambiguity": 1, "motion_complexity": 3.5, "linguistic_ambiguity": 7}


class Endpoint:
    """A chat-completions server. `misbehave(n, body)` may return (status, raw text) for the n-th request; None: a good reply."""

    def __init__(self):
        self.requests, self.misbehave, lock = [], lambda n, body: None, threading.Lock()
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    n = len(outer.requests)
                status, text = outer.misbehave(n, body) or (200, completion(json.dumps(FIVE)))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def completion(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def data(toy_data):
    return toy_data / "valid"


def config(endpoint, **changes):
    return RatingConfig(**{"endpoint": endpoint.url, "model": "a-vlm", "first_pause_seconds": 0.01, "requests": 2, "max_failures": 0} | changes)


def test_every_episode_is_rated_and_all_else_stays(endpoint, data, tmp_path):
    before, out = list(read_episodes(data)), tmp_path / "rated"
    counts = rate_data(data, out, config(endpoint, api_key="secret", frames=3))
    after = list(read_episodes(out))
    assert counts == {"asked": len(before), "cached": 0, "kept": 0, "unrated": 0} and len(before) > 4
    assert [e.difficulty for e in after] == [3.5] * len(before)  # the mean of the five
    for a, b in zip(before, after, strict=True):
        assert (a.episode_id, a.query, a.objects, a.num_frames) == (b.episode_id, b.query, b.objects, b.num_frames)
        assert b.video_path.resolve() == a.video_path.resolve() and len(open_video(b.video_path)) == b.num_frames
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "a-vlm"
    *images, text = body["messages"][0]["content"]
    assert len(images) == 3 and all(i["image_url"]["url"].startswith("data:image/jpeg;base64,") for i in images)
    assert any(e.query in text["text"] for e in before)


def test_pixelthinks_three_ratings(endpoint, data, tmp_path):
    rate_data(data, tmp_path / "rated", config(endpoint, variant="pixelthink"))
    assert [e.difficulty for e in read_episodes(tmp_path / "rated")] == pytest.approx([(2 + 4 + 7) / 3] * len(list(read_episodes(data))))
    assert "motion" not in endpoint.requests[0][2]["messages"][0]["content"][-1]["text"]


@pytest.mark.parametrize(
    "status, text",
    [
        (500, "oops"),
        (429, "slow down"),
        (200, "<html>a proxy</html>"),
        (200, "{}"),
        (200, json.dumps({"choices": []})),
        (200, completion(None)),
        (200, completion("I would say it is rather hard.")),
        (200, completion(json.dumps(FIVE | {"motion_complexity": 11}))),
        (200, completion(json.dumps({k: v for k, v in FIVE.items() if k != "motion_complexity"}))),
        (200, completion(json.dumps(FIVE)[:40])),
    ],
)
def test_a_failure_or_a_broken_reply_is_asked_again(endpoint, data, tmp_path, status, text):
    seen = set()

    def first_time(n, body):
        question = json.dumps(body["messages"])
        return None if question in seen else seen.add(question) or (status, text)

    endpoint.misbehave = first_time
    counts = rate_data(data, tmp_path / "rated", config(endpoint))
    assert counts["unrated"] == 0 and len(endpoint.requests) == 2 * counts["asked"]
    assert {e.difficulty for e in read_episodes(tmp_path / "rated")} == {3.5}
    assert sorted({body["temperature"] for _, _, body in endpoint.requests}) == ([0.0, 0.7] if status == 200 else [0.0])


def test_stopped_and_run_again_it_asks_only_what_is_left(endpoint, data, tmp_path):
    total, out = len(list(read_episodes(data))), tmp_path / "rated"
    endpoint.misbehave = lambda n, body: (503, "gone") if n > 4 else None
    with pytest.raises(UserError, match="503: gone") as stopped:
        rate_data(data, out, config(endpoint))
    assert "again" in stopped.value.remedy and not list(out.glob("*.parquet"))
    rated = len((out / rate_difficulty.CACHE).read_text().splitlines())
    assert 3 <= rated <= 4
    with open(out / rate_difficulty.CACHE, "a") as file:
        file.write('{"key": "cut sho')  # a crash in the middle of a line

    endpoint.misbehave, endpoint.requests = lambda n, body: None, []
    assert rate_data(data, out, config(endpoint)) == {"asked": total - rated, "cached": rated, "kept": 0, "unrated": 0}
    assert len(endpoint.requests) == total - rated
    endpoint.requests = []
    assert rate_data(data, out, config(endpoint))["cached"] == total and not endpoint.requests
    assert rate_data(data, out, config(endpoint, model="another"))["asked"] == total  # another question


def test_episodes_that_cannot_be_rated_stay_without(endpoint, data, tmp_path, capsys):
    chosen = list(read_episodes(data))[1]
    endpoint.misbehave = lambda n, body: (400, "too large") if chosen.query in body["messages"][0]["content"][-1]["text"] else None
    counts = rate_data(data, tmp_path / "rated", config(endpoint, max_failures=50))
    rated = {e.episode_id: e.difficulty for e in read_episodes(tmp_path / "rated")}
    assert rated[chosen.episode_id] is None and counts["unrated"] == list(rated.values()).count(None) < len(rated)
    assert counts["refused"] == counts["unrated"]
    assert f"unrated: {chosen.episode_id}: status 400: too large" in capsys.readouterr().err


def test_the_schema_lets_only_ratings_through(endpoint, data, tmp_path):
    rate_data(data, tmp_path / "rated", config(endpoint, variant="pixelthink"))
    asked = endpoint.requests[0][2]["response_format"]
    assert asked["type"] == "json_schema" and asked["json_schema"]["strict"] is True
    valid = jsonschema.Draft202012Validator(asked["json_schema"]["schema"]).is_valid
    three = dict.fromkeys(VARIANTS["pixelthink"], 10)
    assert valid(three) and valid(three | {"scene_complexity": 1})
    assert not any(valid(three | {"scene_complexity": bad}) for bad in (0, 11, 2.5, "3", None))
    assert not valid(three | {"more": 1}) and not valid({name: 5 for name in list(three)[1:]})


@pytest.mark.parametrize("status", [400, 422])
def test_an_endpoint_without_schemas_is_asked_without(endpoint, data, tmp_path, status):
    endpoint.misbehave = lambda n, body: (status, "response_format is not supported") if "response_format" in body else None
    total = len(list(read_episodes(data)))
    assert rate_data(data, tmp_path / "rated", config(endpoint, requests=1))["asked"] == total
    assert ["response_format" in body for _, _, body in endpoint.requests] == [True] + [False] * total


def test_ratings_that_are_there_can_be_kept(endpoint, data, tmp_path):
    before = [e.difficulty for e in read_episodes(data)]
    assert rate_data(data, tmp_path / "rated", config(endpoint), only_missing=True)["kept"] == len(before)
    assert [e.difficulty for e in read_episodes(tmp_path / "rated")] == before and not endpoint.requests


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusing_endpoint_stops_the_command_at_once(endpoint, data, tmp_path, status, capsys):
    endpoint.misbehave = lambda n, body: (status, "no such model")
    arguments = ["data", "difficulty", str(data), str(tmp_path / "rated"), "--endpoint", endpoint.url, "--model", "a-vlm", "--requests", "1"]
    assert cli.main(arguments) == 2
    assert f"answers {status}: no such model" in capsys.readouterr().err and len(endpoint.requests) == 1


def test_nobody_listens(endpoint, data, tmp_path):
    endpoint.server.server_close()
    with pytest.raises(UserError, match="ConnectError"):
        rate_data(data, tmp_path / "rated", config(endpoint, tries=2))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"endpoint": "localhost:8000"}, "localhost:8000"),
        ({"frames": 0}, "frames=0"),
        ({"tries": 0}, "tries=0"),
        ({"requests": 0}, "requests=0"),
        ({"vllm": {"max_model_len": 9000}}, "max_model_len with an endpoint"),
    ],
)
def test_settings_that_cannot_be(changes, named):
    with pytest.raises(UserError, match=named):
        RatingConfig(**{"endpoint": "http://localhost:8000/v1", "model": "a-vlm"} | changes)


def test_the_episodes_are_never_overwritten(endpoint, data):
    with pytest.raises(UserError, match="the episodes themselves"):
        rate_data(data, data / ".", config(endpoint))
    assert not endpoint.requests and not (data / rate_difficulty.CACHE).exists()


def test_a_model_that_is_nowhere(data, tmp_path):
    with pytest.raises(UserError, match="--model = 'nowhere': no such file"):
        rate_data(data, tmp_path / "rated", RatingConfig(model="nowhere"))


def test_a_model_in_vllm_here(data, tmp_path, monkeypatch):
    """A random model can only rate because its replies are held to the schema; what it rates is what transformers would choose.
    An episode that is too long and one without frames stay unrated; what is in the cache starts no model."""
    from tests.rollout.parity import load_policy
    from tests.rollout.tiny_policy import build_tiny_policy

    model = build_tiny_policy(tmp_path / "model", tie=False, scale=0.1)
    episodes = [dataclasses.replace(e, video=str(e.video_path.resolve())) for e in read_episodes(data)]
    long = dataclasses.replace(episodes[0], episode_id="long", query="q" * 2048)
    blind = dataclasses.replace(episodes[0], episode_id="blind", query="which?", video=str(tmp_path / "nowhere"))
    write_episodes([*episodes, long, blind], tmp_path / "data" / "episodes.parquet")
    replies, ask = [], VllmRater.reply

    async def recorded(rater, messages, temperature):
        replies.append((messages, await ask(rater, messages, temperature)))
        return replies[-1][1]

    monkeypatch.setattr(VllmRater, "reply", recorded)
    here = RatingConfig(model=model, frames=3, vllm={"dtype": "float32", "max_model_len": 2048}, max_failures=2)
    counts = rate_data(tmp_path / "data", tmp_path / "rated", here)
    assert counts == {"asked": len(episodes), "cached": 0, "kept": 0, "unrated": 2, "over the context length": 1, "unreadable frames": 1}
    rated = {e.episode_id: e.difficulty for e in read_episodes(tmp_path / "rated")}
    assert rated.pop("long") is None and rated.pop("blind") is None and all(1 <= difficulty <= 10 for difficulty in rated.values())
    for _, reply in replies:
        jsonschema.validate(json.loads(reply), rating_schema("videoseg_r1"))
    assert len(replies) == len(episodes) and len({reply for _, reply in replies}) > 2  # else they would tell nothing
    policy = load_policy(model)
    for messages, reply in replies[:4]:
        assert_transformers_would_choose(model, policy, messages, reply)

    again = dataclasses.replace(here, vllm={"no_such_option": 1})
    assert rate_data(data, tmp_path / "rated", again)["cached"] == len(episodes)
    with pytest.raises(UserError, match="vLLM cannot run .*no_such_option"):
        rate_data(data, tmp_path / "rated", dataclasses.replace(again, frames=2))


def assert_transformers_would_choose(folder, policy, messages, reply):
    """The first digit of every rating is the likeliest of 1 to 9 after all that stands before it."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from rollout.prompts import expand_pads
    from tests.rollout.parity import transformers_distribution

    *shown, text = messages[0]["content"]
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i["image_url"]["url"].partition(",")[2])))) for i in shown]
    grid_thw = AutoImageProcessor.from_pretrained(folder)(images=images)["image_grid_thw"].numpy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}] * len(images) + [text]}]
    short_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    token_ids = expand_pads(short_ids, tokenizer.convert_tokens_to_ids("<|image_pad|>"), grid_thw.prod(1) // 4)
    prompt = types.SimpleNamespace(images=images, grid_thw=grid_thw, token_ids=token_ids)
    every = transformers_distribution(policy, folder, prompt, tokenizer(reply)["input_ids"], 1.0, (), resize=True)
    digits = tokenizer.convert_tokens_to_ids(list("123456789"))
    places = [match.end() for match in re.finditer(": ?", reply)]  # in bytes, and so in tokens
    assert [reply[place] for place in places] == [str(1 + every[place][digits].argmax()) for place in places] and len(places) == 5


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps(FIVE),
        f"<think>{{hm}} a {json.dumps(dict.fromkeys(FIVE, 1))}?</think>```json\n{json.dumps(FIVE, indent=2)}\n``` Done.",
        json.dumps(FIVE | {"reasons": {"motion_complexity": "fast"}}),
    ],
)
def test_replies_are_read_past_what_stands_round_them(reply):
    assert read_ratings(reply, "videoseg_r1") == FIVE


@pytest.mark.parametrize("bad", [0, 10.5, True, "7", None, float("nan"), [3]])
def test_what_is_no_rating(bad):
    with pytest.raises(BadReply, match="scene_complexity"):
        read_ratings(json.dumps(FIVE | {"scene_complexity": bad}), "videoseg_r1")


def test_a_flood_of_braces_is_not_read_for_long():
    with pytest.raises(BadReply):
        read_ratings("{" * 100_000, "pixelthink")
    assert all(name in rating_prompt("q", "videoseg_r1") for name in VARIANTS["videoseg_r1"])
