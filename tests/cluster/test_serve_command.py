"""`videoseg serve`: what it refuses before anything starts, and real runs from start to Ctrl-C."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli, serve_command
from cluster.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SAM2 = ROOT / "examples/toy/models/sam2"


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch, request):
    monkeypatch.delenv("VIDEOSEG_TOKEN", raising=False)
    if "tmp_path" in request.fixturenames:
        monkeypatch.setattr("cluster.ray_cluster.join_cluster", None)


@pytest.mark.parametrize(
    "settings, said",
    [
        ([], "neither roots nor uploads"),
        (["roots=[/nowhere]"], "/nowhere is no folder"),
        (["root=[/tmp]"], "did you mean roots?"),
        (["port=70000", "max_framess=3"], "2 problems"),
        (["segmentation.chekpoint=x"], "did you mean segmentation.checkpoint?"),
        (["roots={here}", "host=0.0.0.0"], "set VIDEOSEG_TOKEN"),
        (["roots={here}", "token=short"], "at least 8"),
        (["roots={here}", "host=no.such.host.invalid", "token=long-enough"], "cannot listen at no.such.host.invalid"),
        (["roots={here}", "port=0", "segmentation.checkpoint=/nowhere/sam2"], "/nowhere/sam2"),
        (["roots={here}", "missing.yaml"], "'missing.yaml' is not a setting"),
        (["missing.yaml"], "no configuration file"),
    ],
)
def test_what_cannot_work_is_one_message_before_anything_starts(settings, said, tmp_path, capsys):
    assert cli.main(["serve", "segmentation", *(s.format(here=f"[{tmp_path}]") for s in settings)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    "settings, said",
    [
        (["reward.preset=vision_reasonor"], "did you mean 'vision_reasoner'?"),
        (["reward.weights.iuo=1"], "did you mean reward.weights.iou?"),
        (["replica=2"], "did you mean replicas?"),
        (["segmentation=localhost:8000"], "segmentation=http://127.0.0.1:8000"),
        (["host=0.0.0.0"], "set VIDEOSEG_TOKEN"),
        (["max_items=5000"], "max_items"),
    ],
)
def test_the_same_of_the_reward_service(settings, said, tmp_path, capsys):
    assert cli.main(["serve", "reward", *settings]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_port_in_use(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "segmentation", f"roots=[{tmp_path}]", f"segmentation.checkpoint={SAM2}", f"port={taken.getsockname()[1]}"]) == 2
    error = capsys.readouterr().err
    assert "another program listens there" in error and "port=N" in error


def test_replicas_that_do_not_fit_are_refused():
    each = {"CPU": ("segmentation.cpus_per_replica", 2)}
    with pytest.raises(UserError, match="3 replicas of 2 CPUs need 6, the Ray cluster has 4") as refused:
        serve_command.check_resources("segmentation.replicas", 3, each, {"CPU": 4.0})
    assert refused.value.remedy.startswith("lower segmentation.replicas or segmentation.cpus_per_replica")
    serve_command.check_resources("segmentation.replicas", 3, each, {"CPU": 6.0})


def test_replicas_get_paths_that_do_not_depend_on_where_they_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("videos", "up", "model"):
        (tmp_path / folder).mkdir()
    config = serve_command.load_settings(None, ["roots=[videos]", "uploads=up", "segmentation.checkpoint=model"])
    assert (config.roots, config.uploads, config.segmentation.checkpoint) == ([f"{tmp_path}/videos"], f"{tmp_path}/up", f"{tmp_path}/model")
    assert serve_command.load_settings(None, ["roots=[videos]"]).segmentation.checkpoint == "facebook/sam2.1-hiera-large"


def test_settings_are_shown_and_read_back(tmp_path, capsys):
    assert cli.main(["serve", "segmentation", "--show", "batch_size=3", "roots=[a, b]"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    config = serve_command.load_settings(str(tmp_path / "mine.yaml"), ["port=9"], paths=False)
    assert (config.batch_size, config.roots, config.port) == (3, ["a", "b"], 9)


@contextlib.contextmanager
def running(kind, settings):
    """The URL of `videoseg serve`, until the block ends; then Ctrl-C, after which nothing may be left."""
    import psutil

    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "serve", kind, *settings], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    started = []
    try:
        url = next(m[1] for line in server.stdout if (m := re.search(r"service at (http://\S+)", line)))
        started = psutil.Process(server.pid).children(recursive=True)
        yield url
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does: to all in the foreground
        assert server.wait(60) == 130
        _, left = psutil.wait_procs(started, timeout=10)
        assert not left and started
    finally:
        for process in [*started, *([psutil.Process(server.pid)] if server.poll() is None else [])]:
            if process.is_running():
                process.kill()
        server.stdout.close()


def test_segmentation_from_start_to_ctrl_c(tmp_path_factory):
    from segmentation_service.client import LocalClient
    from segmentation_service.http_client import HttpClient
    from segmentation_service.service import SegmentationService
    from segmentation_service.service_request import SegmentRequest

    sys.path.append(str(ROOT / "tests/segmentation_service"))
    from http_serving import write_video

    root = tmp_path_factory.mktemp("served")
    box = write_video(root / "disc")
    settings = [f"roots=[{root}]", f"segmentation.checkpoint={SAM2}", "segmentation.device=cpu", "port=0"]
    with running("segmentation", settings) as url:
        request = SegmentRequest(video="disc", frame=0, hypotheses=[[{"box": box}]])
        expected = LocalClient(SegmentationService.load(serve_command.load_settings(None, settings))).segment(request)
        assert HttpClient(url).segment(request) == expected


def test_rewards_from_start_to_ctrl_c():
    from reward_service.client import HttpClient
    from reward_service.score_request import ScoreRequest

    item = {"completion": "<think>x</think><answer>[]</answer>", "target": {"image_size": [9, 9], "boxes": [[0, 0, 3, 3]], "points": [[[1, 1]]]}}
    with running("reward", ["reward.preset=vision_reasoner", "replicas=2", "cpus_per_replica=0.5", "port=0"]) as url:
        response = HttpClient(url).score(ScoreRequest(items=[item]))
        assert response.scores[0].total == 2.0 and response.maximum == 7.0 and len(HttpClient(url).stats()) == 2
