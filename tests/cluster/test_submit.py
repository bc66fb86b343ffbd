"""`videoseg submit`: what is checked and decided before anything is sent, and real jobs on a small cluster that the example script starts."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from cluster import cli, config, config_rules, paths, run_folder, submit
from tests.conftest import ROOT


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of somebody's own, with a recipe, a model and data."""
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "sam2", "toy/train", "toy/valid_u", "more"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\npolicy: {path: policy}\n")
    (tmp_path / "base.yaml").write_text("segmentation: {checkpoint: sam2}\ndata: {train: toy/train, evaluation: toy/valid_u}\nrollout: {max_model_len: 9000}\n")
    return tmp_path


def training_job(recipe, *overrides, working_dir=None, name=None, env={}):
    return submit.training_job(recipe, overrides, working_dir, name, env)


def test_relative_paths_are_made_absolute_and_nothing_else_changes(here):
    job = training_job("mine.yaml", "data.train=toy/train", "learner.lr=3e-5", "loop.grace_seconds=7.5")
    assert job.command[:2] == ["train", str(here / "mine.yaml")]
    sent = config.load(job.command[1], job.command[2:])
    changed = config_rules.differences(config.load("mine.yaml", ["learner.lr=3e-5", "loop.grace_seconds=7.5"]), sent)
    assert {key: new for key, (_, new) in changed.items()} == {
        "run.dir": str(here / "runs"),
        "run.name": job.run.name,
        "policy.path": str(here / "policy"),
        "segmentation.checkpoint": str(here / "sam2"),
        "data.train": str(here / "toy/train"),
        "data.evaluation": str(here / "toy/valid_u"),
    }
    assert job.command.count("data.train=toy/train") == 0 and job.id == job.run.name and job.run.parent == here / "runs" and not job.run.parent.exists()
    assert job.runtime_env == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "608"}}
    assert f"data.train is made absolute: {here}/toy/train" in job.notes


def test_a_list_of_data_sets_and_absolute_paths_of_other_machines(here):
    job = training_job("mine.yaml", "data.train=[{path: toy/train, weight: 2}, {path: /of/the/nodes}, {path: more}]", "policy.path=Qwen/Qwen2.5-VL-7B-Instruct", "segmentation.checkpoint=/models/sam2")
    sent = config.load(job.command[1], job.command[2:])
    assert [(s.path, s.weight) for s in sent.data.train] == [(str(here / "toy/train"), 2), ("/of/the/nodes", 1), (str(here / "more"), 1)]
    assert sent.policy.path == "Qwen/Qwen2.5-VL-7B-Instruct" and sent.segmentation.checkpoint == "/models/sam2"
    assert {n for n in job.notes if "on the nodes" in n} == {
        "segmentation.checkpoint = /models/sam2 is not on this machine: it must be on the nodes",
        "data.train[1].path = /of/the/nodes is not on this machine: it must be on the nodes",
    }


def test_recipes_and_examples_are_those_of_the_nodes(here, monkeypatch):
    """Their own checkout has them; what the debug recipe generates goes where this checkout has, or would have, it."""
    job = training_job("configs/debug.yaml", "run.name=one", name="mine", env={"A": "b"})
    sent = config.load(job.command[1], job.command[2:])
    assert job.command[1] == "debug" and sent.policy.path == "examples/toy/models/policy" and sent.data.train == str(paths.ROOT / "data/toy/train")
    assert (job.id, job.run, job.runtime_env["env_vars"]["A"]) == ("mine", here / "runs/one", "b")


def test_a_recipe_in_the_working_directory_is_read_from_its_copy(here):
    job = training_job("mine.yaml", working_dir=str(here))
    assert job.command[1] == "mine.yaml" and job.runtime_env["working_dir"] == str(here) and "/runs/" in job.runtime_env["excludes"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["mine.yaml", "learner.lrr=3"], "did you mean learner.lr?"),
        (["mine.yaml", "loop.steps=-3"], "out of range"),
        (["mine.yaml", "policy.path=toy/none"], "policy.path = 'toy/none': no such file"),
        (["mine.yaml", "run.name=latest"], "cannot be a run's name"),
        (["mine.yaml", "run.dir=.", "run.name=toy"], "there is already something at"),
        (["mine.yaml", "cluster.address=local"], "cluster.address = 'local', but a job joins the cluster"),
        (["mine.yaml", "--working-dir", "none"], "--working-dir none is not a folder"),
        (["mine.yaml", "--env", "A"], "--env A has no value"),
        (["mine.yaml", "--resume", "runs/x"], "a resumed run has its own"),
        (["--resume", "runs/x"], "'runs/x' is not a run folder"),
        (["mine.yaml", "--address", "ray://head:10001"], "is not the URL of a job server"),
    ],
)
def test_what_can_be_known_here_is_an_error_before_anything_is_sent(here, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(submit, "connect", lambda address: pytest.fail("a cluster was asked"))
    assert cli.main(["submit", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_resumed_run_is_named_by_its_folder(here):
    folder = run_folder.plan(here / "runs", "one", "mine")
    folder.create(config.load("mine.yaml", ["loop.grace_seconds=0"]), {}, [])
    job = submit.resuming_job("one", ["loop.steps=9"], None, None, {})
    assert list(job.command) == ["resume", str(folder.path), "loop.steps=9"] and job.id.startswith("one-resumed-") and job.stop_seconds == 600 and not job.notes
    with pytest.raises(submit.ConfigError, match="cannot become"):
        submit.resuming_job("one", ["learner.lr=1"], None, None, {})
    job = submit.resuming_job("/of/the/nodes/two", [], None, "again", {})
    assert list(job.command) == ["resume", "/of/the/nodes/two"] and job.id == "again" and "the nodes must" in job.notes[0]


def test_where_the_job_server_is(monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert submit.server_address(None) == "http://127.0.0.1:8265" and submit.server_address("10.0.0.7:8265/") == "http://10.0.0.7:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")  # the cluster's, not its job server's
    assert submit.server_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://head")
    assert submit.server_address(None) == "https://head" and submit.server_address("http://b:1") == "http://b:1"


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster():
    """(URL, environment) of a head node of its own, started by `examples/cluster/node.sh` with a token."""
    gcs, *others = free_ports(9)
    names = ("dashboard-port", "ray-client-server-port", "node-manager-port", "object-manager-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port", "dashboard-agent-listen-port")
    url = f"http://127.0.0.1:{others[0]}"
    temporary = tempfile.mkdtemp(prefix="videoseg-", dir="/tmp")  # short: the names of Unix sockets have 107 bytes
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = [f"--port={gcs}", *(f"--{name}={port}" for name, port in zip(names, others)), f"--temp-dir={temporary}", "--num-cpus=1", "--object-store-memory=80000000", "--include-log-monitor=false"]
    head = subprocess.Popen(
        ["bash", str(ROOT / "examples/cluster/node.sh"), "head", "127.0.0.1", *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"})
        while True:
            try:
                urllib.request.urlopen(request, timeout=10).close()
                break
            except OSError:
                assert head.poll() is None, head.stdout.read()
                time.sleep(0.2)
        yield url, environment
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def start(cluster, *arguments, **more):
    url, environment = cluster
    command = [sys.executable, "-m", "cluster.cli", "submit", *arguments, "--address", url]
    return subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_jobs_of_a_real_cluster(cluster, here):
    """One fails by a path that only the nodes can know, one succeeds in the copy of its working directory, one is left by Ctrl-C; all at once."""
    url, environment = cluster
    absent = ["mine.yaml", f"policy.path={here}/none"]
    (here / "hello.py").write_text("import os; print('hello', os.environ['WHO'], open('word.txt').read())")
    (here / "word.txt").write_text("from the copy")
    code = (
        "import sys; from pathlib import Path; from cluster import submit\n"
        "class Hello(submit.Job): entrypoint = 'python hello.py'\n"
        f"sys.exit(submit.submit(Hello('quick', [], Path('runs/x'), env={{'WHO': 'you'}}, working_dir={str(here)!r}), {url!r}))"
    )
    quick = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    failing, left = start(cluster, *absent, "--name", "failing"), start(cluster, *absent, "run.name=left")
    said = "".join(iter(left.stdout.readline, f"job left is submitted to {url}\n"))
    left.send_signal(signal.SIGINT)
    rest = left.communicate(timeout=120)[0]
    assert left.returncode == 130 and "detached; the job goes on" in rest, said + rest
    assert f"ray job stop --address {url} left" in rest and f"videoseg submit --address {url} --resume {here}/runs/left" in rest

    said = failing.communicate(timeout=240)[0]
    assert failing.returncode == 2, said
    assert f"note: policy.path = {here}/none is not on this machine" in said
    assert f"error: policy.path = '{here}/none': no such file" in said and said.endswith("job failing failed with exit status 2\n")

    said = quick.communicate(timeout=240)[0]
    assert quick.returncode == 0 and "hello you from the copy" in said and "job quick succeeded" in said, said

    again = start(cluster, *absent, "--name", "failing", "--no-wait")
    assert "had, a job named failing" in again.communicate(timeout=120)[0] and again.returncode == 2


def test_a_cluster_wants_its_token(cluster, here):
    asked = [(start(cluster, "mine.yaml", RAY_AUTH_MODE="disabled"), "asks for a token"), (start(cluster, "mine.yaml", RAY_AUTH_TOKEN="0" * 64), "asks for another token than RAY_AUTH_TOKEN")]
    for process, message in asked:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 2 and "error: " in said and message in said and "remedy: " in said, said


def test_no_cluster(here, capsys):
    (port,) = free_ports(1)
    assert cli.main(["submit", "mine.yaml", "--address", f"127.0.0.1:{port}"]) == 2
    assert f"no Ray cluster answers at http://127.0.0.1:{port}: " in capsys.readouterr().err
