"""The benchmark of the way of weights from learner to engine, for real with the toy policy."""

import json

import pytest

from cluster import cli
from tests.conftest import TOY


@pytest.mark.long
def test_the_parts_of_a_weight_sync_are_the_whole(tmp_path):
    out = tmp_path / "record.json"
    assert cli.main(["bench", "weight_sync", "--rounds", "1", "--group-size", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    seconds = {name: one["median"] for name, one in found["seconds"].items()}
    parts = [seconds[part] for part in ("pause", "gather and hash", "put", "load", "wake")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(seconds["sync"], abs=1e-4)
    assert seconds["optimizer"] + seconds["sync"] + seconds["first token"] == pytest.approx(seconds["last gradient to first token"], abs=1e-4)
    assert found["bytes"] == pytest.approx((TOY / "policy/model.safetensors").stat().st_size, rel=0.02)
    assert found["megabytes_per_second"]["sync"]["median"] == pytest.approx(found["bytes"] / 1e6 / seconds["sync"], rel=0.05)
    assert str(tmp_path) not in out.read_text()
