"""`videoseg bench all`: resumed, with one that fails, one that hangs, and ones that cannot be run; and its list against the scripts that there are."""

import json
import subprocess
import sys
import time

import psutil
import pytest

from cluster import cli
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from benchmarks import all as every

WORKS = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--json", type=pathlib.Path)
parser.add_argument("--size", type=int)
args = parser.parse_args()
with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
    calls.write("x")
print("at work", file=sys.stderr)
args.json.write_text(json.dumps({"size": args.size}))
"""
FAILS = """
import pathlib, sys
if not pathlib.Path(__file__).with_name("mended").exists():
    sys.exit("out of luck")
print('some words, {and a brace')
print('{"luck": 7}')
print("and more")
"""
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two tiny benchmarks, which are all that there are."""
    for name, text in (("works", WORKS), ("fails", FAILS), ("hangs", HANGS)):
        (tmp_path / f"{name}.py").write_text(text)
    both = [every.Benchmark("fails", f"{tmp_path / 'fails.py'}", 0.1, prints=True), every.Benchmark("works", f"{tmp_path / 'works.py'} --size 3", 0.1)]
    monkeypatch.setattr(every, "BENCHMARKS", both)
    return tmp_path


def result(place):
    return json.loads((place / "out.json").read_text())


def run(place, *arguments):
    return every.main(["--json", str(place / "out.json"), *arguments])


def is_there(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def calls(place):
    return len((place / "calls").read_text())


def test_one_that_fails_is_recorded_and_the_rest_is_run(place, capfd):
    assert run(place) == 1
    found = result(place)["benchmarks"]
    assert found["works"]["record"] == {"size": 3} and found["works"]["command"].endswith("works.py --size 3") and found["works"]["seconds"] > 0
    assert "status 1" in found["fails"]["failed"] and "out of luck" in found["fails"]["failed"] and "record" not in found["fails"]
    assert result(place)["machine"]["cores"] and result(place)["commit"] == every.commit()
    said = capfd.readouterr().err
    assert "at work" in said and "2 of 2: works" in said and "minutes so far" in said and said.splitlines()[-1].endswith("failed: fails")


def test_what_is_missing_is_run_again(place):
    assert run(place) == 1
    (place / "mended").touch()
    assert run(place) == 0
    found = result(place)["benchmarks"]
    assert found["fails"]["record"] == {"luck": 7} and found["works"]["record"] == {"size": 3} and calls(place) == 1


def test_fresh_and_other_code_start_over(place, monkeypatch):
    run(place)
    run(place, "--fresh")
    assert calls(place) == 2
    monkeypatch.setattr(every, "commit", lambda: "another")
    run(place)
    assert calls(place) == 3 and result(place)["commit"] == "another"


def test_what_was_done_is_there_when_it_is_interrupted(place, monkeypatch):
    monkeypatch.setattr(every, "BENCHMARKS", every.BENCHMARKS[::-1])
    real = every.run

    def interrupted(command, *rest):
        if "fails" in command[1]:
            raise KeyboardInterrupt
        return real(command, *rest)

    monkeypatch.setattr(every, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    assert list(result(place)["benchmarks"]) == ["works"]


def test_one_that_hangs_is_ended_with_its_children(place, monkeypatch):
    monkeypatch.setattr(every, "LEAST", 0.05)
    monkeypatch.setattr(every, "BENCHMARKS", [every.Benchmark("hangs", f"{place / 'hangs.py'}", 0.0)])
    assert run(place) == 1
    reason = result(place)["benchmarks"]["hangs"]["failed"]
    child = int(reason.split("child")[1].split()[0])
    assert reason.startswith("it was not done after")
    until = time.monotonic() + 60
    while is_there(child):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_what_cannot_be_run_is_left_out_with_its_reason(place, monkeypatch, capfd):
    monkeypatch.setattr(every, "BENCHMARKS", [every.Benchmark("reader", "nowhere.py --peer-python PEER", 1)])
    assert run(place) == 0
    assert "--peer-python" in result(place)["benchmarks"]["reader"]["left_out"] and "reader is left out" in capfd.readouterr().err
    assert run(place, "--peer-python", "a/python") == 1  # it is tried then
    assert "nowhere.py" in result(place)["benchmarks"]["reader"]["failed"] and "a/python" not in result(place)["benchmarks"]["reader"]["command"]


def test_all_scripts_are_listed_and_take_their_arguments():
    scripts = {str(file.relative_to(every.HERE)) for file in (*every.HERE.glob("*.py"), every.HERE / "gpu/one_gpu.py") if '__name__ == "__main__"' in file.read_text()}
    assert {b.command.split()[0] for b in every.BENCHMARKS} == scripts - {"all.py"}
    assert len({b.name for b in every.BENCHMARKS}) == len(every.BENCHMARKS)
    asked = [b for b in every.BENCHMARKS if not every.left_out(b, "PEER")]
    assert sum(b.minutes for b in every.BENCHMARKS) <= 60
    arguments = [[str(every.HERE / words[0]), words[1:] + ([] if b.prints else ["--json", "out.json"])] for b in asked if (words := b.command.split())]
    done = subprocess.run([sys.executable, "-m", "tests.parse_only"], cwd=ROOT, input=json.dumps(arguments), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_it_is_a_benchmark_of_the_command_line(capfd):
    assert cli.main(["bench", "all", "--help"]) == 0
    assert "--fresh" in capfd.readouterr().out
