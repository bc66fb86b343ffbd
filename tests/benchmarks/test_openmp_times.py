"""The benchmark of how OpenMP's threads wait, for real."""

import json

import pytest

from cluster import cli


@pytest.mark.long
def test_each_way_of_waiting_is_timed_idle_and_beside_a_busy_process(tmp_path):
    out = tmp_path / "record.json"
    assert cli.main(["bench", "openmp_waiting", "--rounds", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    for place in ("idle", "beside_a_busy_process"):
        times = found[place]["times"]
        assert set(times) == {"default", "passive", "ours"} and all(len(t["each"]) == 2 and min(t["each"]) > 0 for t in times.values())
        ratios = [a / b for a, b in zip(times["default"]["each"], times["ours"]["each"])]
        assert found[place]["default_over_ours"]["min"] == pytest.approx(min(ratios), abs=1e-3)
