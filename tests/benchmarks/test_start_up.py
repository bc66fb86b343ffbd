"""The benchmark of a run's start, for real: one start with empty caches."""

import json
import sys

import pytest

from cluster import cli
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import start_up


@pytest.mark.long
def test_a_start_is_told_from_the_command_to_the_first_update(tmp_path):
    out = tmp_path / "record.json"
    assert cli.main(["bench", "start_up", "--rounds", "1", "--starts", "first", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["first"]
    at = [found["at"][event]["median"] for event in start_up.PATH]
    assert at == sorted(at) and at[0] > 0
    assert all(0 < found["at"][event]["median"] <= found["at"]["weights synced"]["median"] for event in start_up.BESIDE)
    kinds = {*start_up.KINDS.values()}
    assert kinds - {"model inspection"} <= {kind for kind, seconds in found["cpu_seconds"].items() if seconds["median"] > 0}
    assert "model inspection" not in found["cpu_seconds"]  # the engine tells vLLM what the model can do
    assert str(tmp_path) not in out.read_text()
