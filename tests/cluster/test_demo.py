"""`videoseg demo`: the command with the real parts at toy size, asked through Gradio's client and in a Chromium, then stopped by Ctrl-C."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from cluster import cli, demo
from cluster.demo import EXAMPLES, Question, reply, write_examples
from cluster.segment import Sampling, segment_videos
from reward_service.measures import jaccard
from rollout.toy_world import make_video
from segmentation_service.video import open_video
from tests.cluster.test_report import CHROMIUM, FLAGS
from tests.cluster.test_segment import answer, numbers, saying
from tests.conftest import ROOT

STACKS = Path(sys.prefix) / "stacks"  # requirements/stacks.txt
OTHERS = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """[video, query] of each."""
    return write_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The command without options but a free port: its process, the page's URL, and the folder for its temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join([str(ROOT), *OTHERS, str(STACKS)])}
    process = subprocess.Popen([sys.executable, "-m", "cluster.cli", "demo", "--port", "0"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process, next(m[1] for line in process.stdout if (m := re.search(r"demo at (http://\S+);", line))), temporary
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def gradio_client():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(STACKS)])
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        import gradio_client

        yield gradio_client


@pytest.fixture(scope="module")
def client(app, gradio_client, tmp_path_factory):
    return gradio_client.Client(app[1], verbose=False, analytics_enabled=False, httpx_kwargs={"trust_env": False, "timeout": 60}, download_files=tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def ask(client, gradio_client):
    """Status as (kind, message), masked video, target frame, reasoning, other frames, answer.json."""

    def ask(video, query):
        status, *rest = client.predict(video and gradio_client.handle_file(video), query, api_name="/segment")
        return re.fullmatch(r'<div class="status (\w+)" role="status">(.*)</div>', status).groups(), *rest

    return ask


def test_an_answer_is_that_of_videoseg_segment(ask, policy, start, examples, tmp_path):
    for video, query in (examples[0], examples[-1]):
        (kind, message), overlay, target, reasoning, shown, record = ask(video, query)
        (place,) = segment_videos(policy, [Path(video)], [query], tmp_path / "out", start=start)
        expected, source = answer(place), open_video(video)
        assert {**record, "seconds": 0, "video": 0, "policy": 0, "settings": 0} == {**expected, "seconds": 0, "video": 0, "policy": 0, "settings": 0}
        assert kind == "ok" and f"in {len(source)} frames" in message and reasoning == expected["reasoning"] and record["video"] == Path(video).name
        mine, theirs = open_video(Path(overlay["video"] if isinstance(overlay, dict) else overlay)), open_video(place / "overlay.mp4")
        assert len(mine) == len(theirs) == len(source) and mine.fps == source.fps
        assert all((mine.frame(t) == theirs.frame(t)).all() for t in range(len(source)))
        assert [one["caption"] for one in shown] == [f"frame {t}" for t in expected["shown_frames"]]
        assert all(Path(file).stat().st_size > 1000 for file in (target, *(one["image"] for one in shown)))


def test_the_examples_are_answered(policy, start, examples, tmp_path):
    for (video, query), (seed, _) in zip(examples, EXAMPLES, strict=True):
        toy = make_video(seed)
        (targets,) = [list(q.targets) for q in toy.queries if q.text == query]
        (place,) = segment_videos(policy, [Path(video)], [query], tmp_path, start=start)
        assert np.mean([jaccard(m > 0, toy.masks(t)[targets].any(0)) for t, m in enumerate(numbers(place))]) > 0.8, query


def test_bad_input_gets_a_message_and_the_next_question_its_answer(ask, examples, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (video, query), *_ = examples
    for given, asked, said in (
        (None, query, "there is no video"),
        (video, " ", "the query is empty"),
        (video, "the <|image_pad|>", "holds a media token"),
        (tmp_path / "text.mp4", query, "text.mp4: not a readable video"),
        (video, "the " + "largest " * 200 + "shape", "more than prompt.max_tokens"),
    ):
        (kind, message), overlay, target, reasoning, shown, _ = ask(given, asked)
        assert kind == "error" and said in message and (overlay, target, reasoning, shown) == (None, None, "", []), message
    (kind, message), _, _, _, _, record = ask(video, "</div><img src=x onerror=alert(1)>")
    assert kind != "error" and record["query"] == "</div><img src=x onerror=alert(1)>" and "<" not in message
    assert ask(video, query)[0][0] == "ok"


def test_a_question_that_is_given_up_does_not_keep_others_waiting(client, ask, gradio_client, examples):
    video, query = examples[-1]
    job = client.submit(gradio_client.handle_file(video), query, api_name="/segment")
    next(iter(job))
    job.cancel()
    assert ask(video, query)[0][0] == "ok"


def test_no_file_of_this_machine_and_no_address_is_taken_for_a_video(app, examples):
    with httpx.Client(base_url=app[1], trust_env=False, timeout=60) as http:
        for path in (examples[0][0], "/etc/hostname", "http://127.0.0.1:9/clip.mp4"):
            video = {"path": path, "meta": {"_type": "gradio.FileData"}}
            event = http.post("/gradio_api/call/segment", json={"data": [video, "the red circle"]}).json()["event_id"]
            said = http.get(f"/gradio_api/call/segment/{event}").text
            assert said.startswith("event: error") and ("not linked to" if path.startswith("http") else "was not uploaded by a user") in said, said
        for path in (ROOT / "setup.cfg", "setup.cfg", examples[0][0]):
            assert http.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_answers_without_a_mask(model, examples, tmp_path):
    """What a policy may say and the toy does not."""
    (video, _), *_ = examples
    box = '<think>It left.</think><answer>[{"bbox_2d": [500, 500, 600, 600], "point_2d": [550, 550]}]</answer>'
    for query, text, said, masked in (
        ("nothing fits", "<think>None is.</think><answer>[]</answer>", "nothing in the video fits", True),
        ("outside", box, "none of them covers a pixel", True),
        ("words", "I do not know.", "No object can be read", False),
    ):
        with saying(model, text):
            found = reply(model, Sampling(), Question(video, query, tmp_path))
        assert found.kind == "none" and said in found.message and found.reasoning in text and found.reasoning
        assert (found.overlay is not None) == (found.target is not None) == bool(found.shown) == masked


# ---- in a browser ----


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make browser, or apt install chromium")
def test_in_a_browser_wide_and_on_a_phone(app, examples):
    from playwright.sync_api import expect, sync_playwright

    url, query = app[1], examples[0][1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for width in (1400, 390):
            tab, complaints = browser.new_page(viewport={"width": width, "height": 844}), []
            tab.set_default_timeout(60_000)
            tab.on("console", lambda message: complaints.append(message.text))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("request", lambda request: request.url.startswith((url, "data:", "blob:")) or complaints.append(request.url))
            tab.goto(url)
            button = tab.get_by_role("button", name="Segment")
            button.click()
            tab.locator(".status.error", has_text="there is no video").wait_for()
            tab.get_by_role("gridcell", name=query).click()
            expect(tab.get_by_role("textbox", name="Query")).to_have_value(query, timeout=60_000)
            button.click()
            tab.locator(".status.ok", has_text="1 object in").wait_for()
            tab.locator("video[src*='overlay.mp4']").wait_for()
            assert tab.get_by_label("Trim video to selection").is_hidden(), "it would fetch a program from the internet"
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
            assert complaints == []
            tab.close()
        browser.close()


# ---- beginning and end ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["runs/latest"], "'runs/latest' is not a setting"),
        (["promt.max_tokens=3"], "did you mean prompt"),
        (["--sampler", "midle"], "there is no sampler 'midle'"),
        (["--sampler", "htfs"], "prompts would show 9 frames"),
        (["segmentation.propagation.checkpoint=null"], "nothing carries masks"),
        (["--port", "{taken}"], "another program listens there"),
        (["--port", "0"], "pip install 'videoseg-r1[demo]'"),
    ],
)
def test_what_a_person_can_mend_is_said_before_anything_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    monkeypatch.setattr(demo, "Inference", lambda policy: pytest.fail("something was started"))
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # set back afterwards
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["demo", *(a.format(taken=taken.getsockname()[1]) for a in arguments)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "remedy: " in printed and "Traceback" not in printed


def test_ctrl_c_ends_it_with_all_that_it_started(app, client, gradio_client, examples):
    process, _, temporary = app
    started = psutil.Process(process.pid).children(recursive=True)
    video, query = examples[-1]
    job = client.submit(gradio_client.handle_file(video), query, api_name="/segment")
    next(iter(job))
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all in the foreground
    assert process.wait(60) == 130
    assert started and not psutil.wait_procs(started, timeout=10)[1]
    assert not list(temporary.glob("videoseg-*"))
