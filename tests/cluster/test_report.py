"""`videoseg report`: the page's numbers are those of the run's files; in a real Chromium it shows, can be used by keyboard, and axe finds nothing."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from cluster import cli, config, report, rollout_log, run_folder
from cluster.metrics import MetricsWriter
from cluster.report_rollouts import groups_of, masks_png, token_texts
from cluster.rollout_log import RolloutRow
from cluster.timeline import Timeline
from rollout.episodes import read_episodes
from segmentation_service.masks import encode_rle
from tests.conftest import TOY

HOSTILE = "</script><img src=x onerror=alert(1)> {{DATA}} \u2028"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
STEPS, GROUPS, G = 3, 4, 2


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY / "policy")


@pytest.fixture(scope="module")
def episodes(toy_data):
    return list(read_episodes(toy_data / "train"))


def rows_of(step, episodes, tokenizer, groups=GROUPS, text="<think>the red circle</think><answer>[]</answer>"):
    rng, rows = np.random.default_rng(step), []
    for number in range(groups):
        group = (step - 1) * groups + number
        e = episodes[group % len(episodes)]
        t = e.objects[0].annotations[0].frame
        for index in range(G):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            objects = [{"box": [4.0, 5.0, 40.5, 30.0], "points": [[20.0, 15.0]], "negative_points": [[60.0, 50.0]]}]
            iou = float(rng.random())
            rows.append(
                RolloutRow(
                    step=step, group=group, index=index, episode_id=e.episode_id, query=HOSTILE if not number else e.query, difficulty=2.0, difficulty_class=("easy", "hard")[number % 2],
                    video=str(e.video_path.resolve()), frame_ids=[0, 3], target_frame=t, frame_hw=[e.height, e.width], policy_hw=[112, 112], grid_thw=[[1, 8, 8]], units="pixels",
                    prompt_text="prompt", prompt_token_ids=[1, 2], prompt_fingerprint="p", processor_fingerprint="q", response_text=text, response_token_ids=ids,
                    rollout_logprobs=(-rng.exponential(0.5, len(ids))).tolist(), weight_versions=[(str(step - 1), len(ids))], seed=1, finish_reason="stop", valid=True, failure=None,
                    answer_json=json.dumps(objects), reward=1.0 + iou, reward_terms={"iou": iou, "weighted_iou": 2 * iou, "think_format": 1.0}, length_factor=1.0, box_iou=iou,
                    mask_iou=iou, advantage=0.0, masks=[{"size": [e.height, e.width], "counts": encode_rle(e.masks(t)[0])["counts"]}] if index else None,
                )
            )  # fmt: skip
    return rows


def made(place, name, episodes, tokenizer, steps=STEPS, **options):
    """A run folder as a run leaves it, by the run's own writers."""
    folder = run_folder.plan(place, name, "debug")
    folder.create(config.load("debug", [f"policy.path={TOY / 'policy'}", f"loop.steps={steps}"]), {"cores": 2, "ram_gib": 24.0, "cuda_devices": 0}, ["videoseg", "train"])
    line = Timeline(folder.path / "trace.json")
    with MetricsWriter(folder.path) as metrics:
        metrics.write(0, {"eval/reward/mean": 4.0, "eval/iou/box/hard": 0.25})
        for step in range(1, steps + 1):
            with line.span("loop", "rollout", version=step - 1), line.span("engine 0", "generate", group=step):
                pass
            with line.span("loop", "train", version=step - 1):
                pass
            metrics.write(step, {"reward/mean": 4.0 + step, "iou/box": 0.1 * step, "seconds/train": 1.0, "seconds/step": 2.0, "learner/loss": float("nan"), "sync/bytes": 9.0})
            rollout_log.write_rollouts(folder.rollouts, step, rows_of(step, episodes, tokenizer, **options))
    line.write()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, episodes, tokenizer):
    return made(tmp_path_factory.mktemp("runs"), "one", episodes, tokenizer)


@pytest.fixture(scope="module")
def page(run):
    out = run.path / report.FILE
    assert cli.main(["report", str(run.path)]) == 0
    return out


def data_of(page):
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_the_page_has_the_numbers_of_the_run(run, page, tokenizer, episodes):
    data, charts = data_of(page), {}
    for chart in data["charts"]:
        charts[chart["title"]] = {s["name"]: (s["x"], s["y"]) for s in chart["series"]}
    assert charts["Reward"] == {"eval/reward/mean": ([0], [4.0]), "reward/mean": ([1, 2, 3], [5.0, 6.0, 7.0])}
    assert charts["Held-out box IoU by difficulty"] == {"eval/iou/box/hard": ([0], [0.25])} and charts["Stages of a step"].keys() == {"seconds/train"}
    assert "Loss" not in charts, "a number that is never finite has no curve"
    assert [c["title"] for c in data["charts"] if c["other"]] == ["nonfinite_values", "seconds/step", "sync/bytes"]
    assert [(g["step"], g["group"]) for g in data["groups"]] == [(s, (s - 1) * GROUPS + n) for s in (1, 2, 3) for n in range(GROUPS)]
    for group in data["groups"]:
        rows = [r for r in rollout_log.read_rollouts(dict(rollout_log.rollout_files(run.rollouts))[group["step"]]) if r.group == group["group"]]
        episode = next(e for e in episodes if e.episode_id == group["episode"])
        assert group["query"] == rows[0].query and [t for t, _ in group["shown"]] == [0, 3] and picture(group["image"]).size == (episode.width, episode.height)
        for row, shown in zip(rows, group["rollouts"], strict=True):
            assert shown["reward"] == pytest.approx(row.reward, rel=1e-5) and shown["terms"] == pytest.approx(row.reward_terms, rel=1e-5)
            assert "".join(text for text, _ in shown["tokens"]) == row.response_text and sum(p for _, p in shown["tokens"]) == pytest.approx(sum(row.rollout_logprobs), abs=0.05)
            assert shown["objects"] == [{"box": [4.0, 5.0, 40.5, 30.0], "points": [[20.0, 15.0]], "negative": [[60.0, 50.0]]}]
            assert (shown["masks"] is None) == (row.masks is None)
            if row.masks:
                alpha_HW = np.asarray(picture(shown["masks"]).convert("RGBA"))[..., 3]
                assert np.array_equal(alpha_HW > 0, episode.masks(row.target_frame)[0])
    assert [(s["step"], sorted({(track, name) for track, name, *_ in s["spans"]})) for s in data["timeline"]] == [
        (step, [("engine 0", "generate"), ("loop", "rollout"), ("loop", "train")]) for step in (1, 2, 3)
    ]
    assert not list(run.path.glob(".*"))


def test_tokens_that_share_a_character_are_one_entry(tokenizer):
    text = "a – ü 円 b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, [-0.5] * len(ids), tokenizer)
    assert "".join(t for t, _ in texts) == text and sum(p for _, p in texts) == -0.5 * len(ids) and len(texts) < len(ids)


def test_masks_over_one_another_and_wider_than_the_page():
    masks = np.zeros((2, 300, 1280), bool)
    masks[0, 100:200, :640], masks[1, 150:250, 400:] = True, True
    image = picture(masks_png(masks, (300, 1280)))
    assert image.size == (640, 150)
    colours = np.asarray(image.convert("RGBA"))
    assert [tuple(colours[y, x]) for y, x in ((10, 10), (60, 10), (90, 300), (120, 600))] == [(0, 0, 0, 0), (128, 0, 0, 120), (0, 128, 0, 120), (0, 128, 0, 120)]


def test_any_beginning_of_the_groups_is_even_over_the_steps(tmp_path, episodes, tokenizer):
    folder = made(tmp_path, "long", episodes, tokenizer, steps=9, groups=2)
    steps = [g["step"] for g in groups_of(folder.rollouts, None)]
    assert sorted(steps[:9]) == list(range(1, 10)) and len(steps) == 18 and set(steps[:2]) == {1, 9}
    assert max(np.diff(sorted(steps[:5]))) <= 3


def test_a_page_has_its_limit_and_says_what_went_in(run, page, tmp_path, capsys):
    whole, out = page.stat().st_size / 1e6, tmp_path / "small.html"
    assert cli.main(["report", str(run.path), "--out", str(out), "--megabytes", f"{whole - 0.02:.3f}"]) == 0
    assert out.stat().st_size <= 1e6 * (whole - 0.02) and 0 < len(data_of(out)["groups"]) < STEPS * GROUPS
    assert cli.main(["report", str(run.path), "--out", str(out), "--groups", "2"]) == 0
    assert len(data_of(out)["groups"]) == 2 and "3 steps, 2 groups of rollouts" in capsys.readouterr().out
    assert cli.main(["report", str(run.path), "--out", str(out), "--megabytes", "1"]) == 2
    assert "give --megabytes of at least" in capsys.readouterr().err


def test_200_steps_fit_with_every_group_asked_for(tmp_path, episodes, tokenizer):
    """Long answers, eight megabytes of them; the page stays below its limit."""
    folder = made(tmp_path, "long", episodes, tokenizer, steps=200, groups=2, text="<think>" + "the red circle is left of it. " * 60 + "</think><answer>[]</answer>")
    out = tmp_path / "page.html"
    said = report.write_report(folder, out, note=lambda line: None)
    assert "200 steps, 300 groups" in said and out.stat().st_size < 20e6


def test_what_is_gone_costs_its_part_alone(tmp_path, episodes, tokenizer):
    """The videos, the policy's tokenizer, the trace, the rollouts."""
    gone = [replace(e, video=str(tmp_path / "gone"), root="") for e in episodes]
    folder, notes, out = made(tmp_path, "one", gone, tokenizer), [], tmp_path / "page.html"
    folder.config.write_text(folder.config.read_text().replace(str(TOY / "policy"), str(tmp_path / "no-policy")))
    (folder.path / "trace.json").unlink()
    report.write_report(folder, out, note=notes.append)
    data = data_of(out)
    assert "the tokenizer of" in notes[0] and not data["tokens"] and data["timeline"] == []
    assert all(g["image"] is None and "gone" in g["unread"] for g in data["groups"]) and data["groups"][0]["rollouts"][0]["tokens"][0][1] is None
    shutil.rmtree(folder.rollouts)
    assert "0 groups of rollouts" in report.write_report(folder, out, note=notes.append)
    folder.metrics.unlink()
    assert cli.main(["report", str(folder.path)]) == 2


def test_two_runs(run, tmp_path, episodes, tokenizer):
    other = made(tmp_path, "two", episodes, tokenizer, steps=2, groups=1)
    out = tmp_path / "both.html"
    assert cli.main(["report", str(run.path), "--against", str(other.path), "--out", str(out)]) == 0
    data = data_of(out)
    assert [r["name"] for r in data["runs"]] == ["one", "two"] and ["loop.steps", "3", "2"] in data["differences"] and all(a != b for _, a, b in data["differences"])
    (reward,) = [c["series"] for c in data["charts"] if c["title"] == "Reward"]
    assert [(s["name"], s["run"], len(s["x"])) for s in reward if s["name"] == "reward/mean"] == [("reward/mean", 0, 3), ("reward/mean", 1, 2)]


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def opened(browser, page, width=1400, height=900, scheme="light"):
    """The page in a window of its own, and what it asked or complained of."""
    tab, complaints = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    tab.goto(page.as_uri())
    return tab, complaints


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make browser, or apt install chromium")
@pytest.mark.parametrize("width, scheme", [(1400, "light"), (1400, "dark"), (360, "light"), (360, "dark")])
def test_it_shows_and_axe_finds_nothing(browser, page, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    tab, complaints = opened(browser, page, width, scheme=scheme)
    for section in ("curves", "rollouts", "timeline", "settings"):
        tab.locator(f"#{section}").scroll_into_view_if_needed()
    tab.locator("#settings summary", has_text="Configuration").click()
    tab.locator("#charts summary").first.click()
    tab.locator("#charts table").wait_for()
    assert tab.locator(".js-plotly-plot").count() >= 2
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
    assert complaints == []
    tab.close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make browser, or apt install chromium")
def test_rollouts_are_found_and_gone_through_by_keyboard(browser, page):
    tab, complaints = opened(browser, page)
    data = data_of(page)
    found, items = tab.locator("#found"), tab.locator("#list button")
    assert found.text_content() == f"{STEPS * GROUPS * G} of {STEPS * GROUPS * G} rollouts"
    assert tab.locator("#detail h3").first.text_content() == HOSTILE
    tab.locator("#step").select_option("2")
    tab.locator("#class").select_option("hard")
    tab.locator("#order").select_option("falling")
    mine = [r["reward"] for g in data["groups"] if g["step"] == 2 and g["class"] == "hard" for r in g["rollouts"]]
    assert found.text_content() == f"{len(mine)} of {STEPS * GROUPS * G} rollouts"
    assert [float(text.rsplit(" ", 1)[1]) for text in items.all_text_contents()] == pytest.approx(sorted(mine, reverse=True), rel=1e-4)
    tab.locator("#number").select_option("iou")
    tab.locator("#least").fill("0.5")
    above = [r for g in data["groups"] if g["step"] == 2 and g["class"] == "hard" for r in g["rollouts"] if r["terms"]["iou"] >= 0.5]
    assert found.text_content() == f"{len(above)} of {STEPS * GROUPS * G} rollouts"
    tab.locator("#least").fill("")
    items.first.focus()
    tab.keyboard.press("ArrowDown")
    assert tab.locator("#list button[aria-current=true]").count() == 1 and tab.evaluate("document.activeElement === document.querySelectorAll('#list button')[1]")
    chosen = tab.locator("#detail tbody tr", has_text="advantage").count()
    assert chosen == 1 and tab.locator("#detail .frame svg rect").count() == 2 and tab.locator("#detail .frame svg circle").count() == 1
    assert tab.locator("#detail .said span").count() > 0 and tab.locator("#detail .said").text_content() == "<think>the red circle</think><answer>[]</answer>"
    tab.locator("#text").fill("no such words")
    assert found.text_content().startswith("0 of")
    tab.locator("#theme").press("Enter")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark" and complaints == []
    tab.close()
