"""The adapters and /get_reward under the real verl, OpenRLHF and TRL (requirements/stacks.txt): what each gets and logs is what `score` gives.

Each stack runs in a process of its own (the scripts in `stacks`), so that nothing of it, or of what it does to other packages, is here.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import httpx
import pyarrow.parquet
import pytest
from scored import COMPLETIONS, GOOD, TARGETS

from reward_service import RewardConfig, Target, maximum, score
from reward_service.client import LocalClient, load
from reward_service.config_values import reward_config
from reward_service.http_api import make_app
from reward_service.serve_config import RewardServeConfig
from tests.conftest import ROOT, TOY
from tests.segmentation_service.http_serving import serving

INSTALLED = Path(sys.prefix) / "stacks"
VISION_REASONER = RewardConfig.preset("vision_reasoner")  # of the example files
POLICY = str(TOY / "policy")
ANSWERS = [(GOOD, TARGETS[1]), *((completion, TARGETS[0]) for completion in COMPLETIONS)]  # all right, half right (one of two objects), ..., malformed
STEPS = 20


@pytest.fixture(scope="module")
def url():
    config = RewardServeConfig(reward=VISION_REASONER)
    client = LocalClient(load(config))
    with serving(client, config, make_app) as url:
        yield url
    client.close()


@pytest.fixture(scope="module")
def stacks(url, tmp_path_factory):
    """What each of the scripts gave, by name; they find the project, then what is installed for them, then the packages of this environment."""
    labelled = [*((completion, json.dumps(target)) for completion, target in ANSWERS), (GOOD, "the cat")]
    items = [{"completion": completion, "label": label, "extra_info": {"index": 3}} for completion, label in labelled]
    functions = {name: str(ROOT / f"examples/rewards/{name}_reward.py") for name in ("verl", "openrlhf")}
    asked = {
        "trl_run": {"url": url, "steps": STEPS, "out": str(tmp_path_factory.mktemp("trl"))},
        "openrlhf_rewards": {"endpoints": [functions["openrlhf"], f"{url}/get_reward"], "policy": POLICY, "question": "Find the cat.", "items": items},
        "verl_rewards": {"reward_file": functions["verl"], "policy": POLICY, "items": items},
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(INSTALLED)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).parent / "stacks/run.py"]
    done = subprocess.run(command, input=json.dumps(asked), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    answers["trl_run"] |= {"out": Path(asked["trl_run"]["out"]), "served": httpx.get(f"{url}/v1/stats").json()["replicas"][0]["items"]}
    return answers


def returned(answer):
    remedy = f"if a package is missing: `make setup` installs requirements/stacks.txt in {INSTALLED}"
    assert "returned" in answer, f"{answer['raised']}\n({remedy})"
    return answer["returned"]


def expected(completion, target, config=VISION_REASONER):
    """Total and terms."""
    found = score(completion, Target(**target), config)
    return found.total, {name: value for name, value in found.terms.items() if not name.startswith("weighted_")}


def test_verl(stacks):
    found = returned(stacks["verl_rewards"])
    assert found["manager"] == "NaiveRewardManager"
    *scored, unscorable = found["items"]
    for answer, item in zip(ANSWERS, scored, strict=True):
        total, terms = expected(*answer)
        assert item == {"reward_score": total, "reward_extra_info": {"score": total, **terms}}, answer
    assert unscorable["failed"].startswith("ScoringFailed: ") and "not the JSON of a target: 'the cat'" in unscorable["failed"]


def test_openrlhf(stacks):
    for found in returned(stacks["openrlhf_rewards"]):  # of the function, of /get_reward
        *scored, unscorable = found
        for answer, item in zip(ANSWERS, scored, strict=True):
            total, terms = expected(*answer)
            assert item["reward"] == pytest.approx(total) and item["score"] == pytest.approx(total / maximum(VISION_REASONER)), answer
            assert item["logs"] == pytest.approx(terms), answer
        assert unscorable == {"reward": None, "score": None, "logs": {}}


@pytest.fixture
def trl(stacks):
    return {**returned(stacks["trl_run"]), **stacks["trl_run"]}


def steps_of(trl, name):
    """Of each step what TRL logged, and the rows of its table of completions with their target."""
    for logged in (entry for entry in trl[name] if "reward" in entry):
        rows = pyarrow.parquet.read_table(trl["out"] / name / f"completions/completions_{logged['step']:05d}.parquet").to_pylist()
        yield logged, [{**row, "target": json.loads(trl["targets"][row["prompt"]])} for row in rows]


def test_trl_trains_on_the_rewards_and_logs_the_terms(trl):
    config = reward_config("videoseg_r1", trl["reward"], RewardConfig())
    steps = list(steps_of(trl, "short"))
    assert len(steps) == STEPS and trl["served"] >= 64 * STEPS
    for logged, rows in steps:
        totals, terms = zip(*(expected(row["completion"], row["target"], config) for row in rows))
        assert len(rows) == 64 and [row["videoseg_reward"] for row in rows] == pytest.approx(totals)
        assert logged["reward"] == logged["rewards/videoseg_reward/mean"] == pytest.approx(mean(totals))
        assert logged["videoseg/invalid"] == 0.0
        assert {name: logged[f"videoseg/{name}"] for name in terms[0]} == pytest.approx({name: mean(t[name] for t in terms) for name in terms[0]})


def test_trl_raises_the_reward(trl):
    rewards = [logged["reward"] for logged, _ in steps_of(trl, "short")]
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.2, rewards


def test_trl_leaves_out_what_could_not_be_scored(trl):
    config = reward_config("videoseg_r1", trl["reward"], RewardConfig())
    ((logged, rows),) = steps_of(trl, "unscorable")
    cars = [row for row in rows if row["prompt"] == "car"]
    assert len(cars) == 16 and all(row["videoseg_reward"] is None and row["advantage"] == 0.0 for row in cars)
    assert logged["videoseg/invalid"] == 0.25
    assert logged["reward"] == pytest.approx(mean(expected(row["completion"], row["target"], config)[0] for row in rows if row["prompt"] != "car"))


def test_the_answers_are_of_all_kinds():
    totals = [expected(*answer)[0] for answer in ANSWERS]
    assert totals[0] == maximum(VISION_REASONER) > totals[1] > min(totals) >= 0.0 and len(set(totals)) > 4, totals


def test_only_what_the_environment_lacks_is_installed_apart():
    def names(file):
        return set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / file).read_text(), re.M))

    assert {"trl", "verl", "openrlhf"} <= names("stacks.txt") and not names("stacks.txt") & (names("cpu.lock") | names("gpu.lock"))
