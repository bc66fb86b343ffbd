"""The benchmark of how stages grow, for real at its smallest: two sizes of each, one engine."""

import json
import math
import sys

import pytest

from cluster import cli
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import scaling


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling") / "record.json"
    assert cli.main(["bench", "scaling", "--rounds", "1", "--doublings", "1", "--engines", "1", "--json", str(out)]) == 0
    assert str(out.parent) not in out.read_text()
    return json.loads(out.read_text())


@pytest.mark.long
def test_every_stage_that_a_size_touches_is_measured_at_each_size(record):
    assert set(record["sizes"]) == set(scaling.TOUCHES) == set(record["first"])
    for name, stages in record["sizes"].items():
        assert set(stages) == {*scaling.TOUCHES[name], "step"}
        for stage, found in stages.items():
            assert list(found["times"]) == [str(record["first"][name] * n) for n in (1, 2)]
            exponents = [value for key, value in found.items() if key.startswith("exponent")]
            assert len(exponents) == 2 + (stage in scaling.HERE) and all(map(math.isfinite, exponents)), (name, stage)
            for time in found["times"].values():
                assert 0 < time["seconds"] and (stage == "step" or 0 < time["min"] <= time["seconds"] <= time["max"])


@pytest.mark.long
def test_a_step_is_the_sum_of_its_stages(record):
    stages = record["sizes"]["completions"]
    for n, time in stages["step"]["times"].items():
        assert time["seconds"] > sum(stages[stage]["times"][n]["seconds"] for stage in scaling.TOUCHES["completions"])


@pytest.mark.long
@pytest.mark.parametrize("key", ["exponent", "exponent_of_cpu_seconds"])
def test_the_largest_exponent_is_named(record, key):
    stage, name = record["largest"][key]["stage"].split(" over ")
    every = [found[key] for stages in record["sizes"].values() for found in stages.values() if key in found]
    assert record["largest"][key]["value"] == record["sizes"][name][stage][key] == max(every)


@pytest.mark.long
def test_engines_beyond_the_real_ones_are_simulated_with_what_was_measured(record):
    found = record["engines"]
    assert list(found["real"]) == ["1"] and set(found["stages"]) == {"generate, simulated", "step, simulated"}
    assert found["costs"]["score_seconds"] > 0 and all(cost >= 0 for cost in found["costs"].values())
    generate, step = (found["stages"][f"{what}, simulated"]["times"] for what in ("generate", "step"))
    assert 0.45 < generate["2"]["seconds"] / generate["1"]["seconds"] < 0.75  # two engines share the prompts
    assert all(step[n]["seconds"] > generate[n]["seconds"] for n in ("1", "2"))


def test_exponents():
    found = scaling.grown({str(n): {"seconds": max(4, n**2), "cpu_seconds": 0.1 * n} for n in (1, 2, 4)}, cpu=True)
    assert (found["exponent"], found["exponent_of_the_last_doubling"], found["exponent_of_cpu_seconds"]) == (1.0, 2.0, 1.0)
