"""The benchmark of our engine against vLLM alone, for real at its smallest."""

import json

import pytest

from cluster import cli


@pytest.mark.long
def test_the_engine_gives_the_tokens_of_vllm_alone(tmp_path):
    out = tmp_path / "record.json"
    assert cli.main(["bench", "generation", "--rounds", "1", "--prompts", "2", "--group-size", "4", "--against", "AsyncLLM", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["equal_completions"] == {"AsyncLLM": 1.0} and found["tokens"]["ours"] == found["tokens"]["AsyncLLM"] and found["tokens"]["ours"][0] > 8
    overhead, rates = found["seconds_of_ours_over"]["AsyncLLM"]["median"], found["tokens_per_second"]
    assert overhead == pytest.approx(rates["AsyncLLM"]["median"] / rates["ours"]["median"], rel=0.02)
    assert str(tmp_path) not in out.read_text()
