"""What the summary of a profile counts; the profile of a real step is tested with the loop."""

import gzip
import json

import pytest

from cluster import cli
from cluster.profiling import events_of, self_seconds


def event(name, begin, duration, thread=1, cat="cpu_op"):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": duration, "pid": 7, "tid": thread}


def test_time_counts_once_however_operators_call_each_other():
    calls = [event("linear", 0, 10e6), event("addmm", 2e6, 5e6), event("copy_", 3e6, 1e6), event("addmm", 10e6, 2e6), event("mul", 1e6, 4e6, thread=2), event("note", 0, 99e6, cat="user_annotation")]
    found = self_seconds(calls[::-1])
    assert found == pytest.approx({"linear": 5.0, "addmm": 6.0, "copy_": 1.0, "mul": 4.0})
    assert found.total() == pytest.approx(12 + 4)  # both threads


def test_events_get_the_name_of_their_part_and_the_wall_clock():
    trace = {"baseTimeNanoseconds": 1_700_000_000_000_000_000, "traceEvents": [event("mm", 5.5, 1.0), {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "python"}}]}
    packed = gzip.compress(json.dumps(trace).encode())
    (mm, name) = events_of("learner 0", [packed])
    assert mm["ts"] == 1_700_000_000_000_005.5 and mm["pid"] == name["pid"] == "learner 0 7" and name["args"] == {"name": "learner 0 python"}
    assert [e["pid"] for e in events_of("engine 0", [packed, packed])][::2] == ["engine 0 worker 0 7", "engine 0 worker 1 7"]


def test_a_replay_has_no_engines_to_profile(tmp_path, capsys):
    assert cli.main(["train", "--profile", "--replay", str(tmp_path), f"run.dir={tmp_path}"]) == 2
    assert "--replay has none" in capsys.readouterr().err
