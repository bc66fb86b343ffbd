"""`videoseg eval` on toy episodes: the real policy, SAM2 and XMem; the scores against masks made by the same parts one by one."""

import json
import shutil
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import cli, eval_results, evaluate, inference, segment
from cluster.benchmark_scores import BenchmarkScores, score_predictions
from cluster.errors import UserError
from cluster.eval_replicas import shares
from cluster.eval_results import compare, table_lines, write_scores
from cluster.evaluate import Evaluation, predict
from cluster.expression_scores import MISSING, SCORED, ExpressionScore
from cluster.inference import default_sampler
from cluster.segment import Sampling
from reward_service.measures import jaccard
from rollout.episodes import read_episodes, write_episodes
from rollout.frame_samples import read_samples
from rollout.htfs import HTFS
from rollout.prompts import PromptError
from segmentation_service.video import open_video
from tests.cluster.conftest import TOY_MODELS
from tests.conftest import TOY


@pytest.fixture(scope="module")
def data(toy_data, tmp_path_factory):
    """Some episodes of the toy data, and where they are."""
    folder = tmp_path_factory.mktemp("eval") / "data"
    episodes = [e for e in read_episodes(toy_data / "valid")][:6]
    moved = [replace(e, video=str(e.video_path.resolve()), root="") for e in episodes]
    write_episodes(moved, folder / "part.parquet")
    return folder


@pytest.fixture
def evaluation(data, policy, tmp_path):
    return Evaluation("toy", data, tmp_path / "out", policy)


def nothing_starts(policy):
    raise AssertionError("a policy was started")


def lines(evaluation):
    return [json.loads(line) for line in (evaluation.out / "answers.jsonl").read_text().splitlines() if line]


def image(evaluation, episode, t):
    return np.asarray(Image.open(evaluation.predictions / episode.video_id / episode.expression_id / f"{t:05d}.png"))


def test_predictions_are_the_parts_put_together(evaluation, start, model, data):
    episodes, notes = list(read_episodes(data)), []
    predict(evaluation, episodes, notes.append, start)
    assert [line["episode_id"] for line in lines(evaluation)] and notes[-1].startswith(f"{len(episodes)}/{len(episodes)} expressions")
    assert sorted(line["episode_id"] for line in lines(evaluation)) == sorted(e.episode_id for e in episodes)
    asked = list(zip(episodes, default_sampler(evaluation.policy.settings).sample(episodes)))
    j = []
    for answered in model.answers(asked):
        episode, target = answered.episode, answered.sample.target_frame
        assert answered.status == "ok"
        masks = model.masks(open_video(episode.video_path), target, [answered.answer])
        tracked = {t: found.any(0) for t, _, found in model.track(open_video(episode.video_path), target, masks)}
        expected = [tracked[t] for t in episode.annotated_frames]
        predicted = [image(evaluation, episode, t) for t in episode.annotated_frames]
        assert all(p.dtype == np.uint8 and set(np.unique(p)) <= {0, 255} for p in predicted)
        # Hypotheses that go through a video together share its passes: a pixel on an edge may fall on the other side.
        assert np.mean([jaccard(p > 0, e) for p, e in zip(predicted, expected)]) > 0.99
        truth = [episode.masks(t).any(0) for t in episode.annotated_frames]
        j.append(np.mean([jaccard(p > 0, g) for p, g in zip(predicted, truth)]))
    scores = score_predictions("toy", episodes, evaluation.predictions)
    assert scores.official == scores.strict and scores.strict["J"] == pytest.approx(100 * np.mean(j))
    assert not list(evaluation.out.rglob(".*"))


def test_replicas_share_the_videos(evaluation, start, data, tmp_path, ray_session):
    """Two copies say what one says, and their masks are its masks; a cluster that has no room for so many says so before anything starts."""
    episodes, alone = list(read_episodes(data)), replace(evaluation, out=tmp_path / "alone")
    predict(alone, episodes, print, start)
    with pytest.raises(UserError, match="99 replicas of .* CPUs and 0 GPUs each, and the cluster has room for"):
        predict(evaluation, episodes, print, replicas=99)
    notes = []
    predict(evaluation, episodes[:4], notes.append, replicas=2)
    predict(evaluation, episodes, notes.append, start)  # goes on where the copies ended
    assert any("2 times" in note for note in notes) and any("4 of 6 expressions were answered before" in note for note in notes)
    said = [{line["episode_id"]: (line["status"], line["completion"], line["target_frame"]) for line in lines(e)} for e in (evaluation, alone)]
    assert said[0] == said[1] and len(said[0]) == len(episodes)
    for e in episodes:
        pairs = [(image(evaluation, e, t) > 0, image(alone, e, t) > 0) for t in e.annotated_frames]
        assert np.mean([jaccard(a, b) for a, b in pairs]) > 0.99


def test_shares_are_whole_videos():
    asked = [(SimpleNamespace(video_id=video), number) for video, count in (("a", 20), ("b", 20), ("c", 50), ("d", 1)) for number in range(count)]
    found = [[e.video_id for e, _ in share] for share in shares(asked)]
    assert found == [["a"] * 20 + ["b"] * 20, ["c"] * 50, ["d"]]


def test_an_oracle_that_answers_loads_no_policy(evaluation, data, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the policy was loaded")

    monkeypatch.setattr(inference, "RolloutEngine", loaded)
    episodes, notes = list(read_episodes(data))[:2], []
    predict(replace(evaluation, oracle="box"), episodes, notes.append)
    assert {line["status"] for line in lines(evaluation)} == {"ok"} and "starting the segmenter on cpu" in notes


def test_what_is_answered_is_not_asked_again(evaluation, start, data):
    episodes = list(read_episodes(data))
    predict(evaluation, episodes[:3], lambda text: None, start)
    before = {e.episode_id: image(evaluation, e, 0) for e in episodes[:3]}
    file = evaluation.out / "answers.jsonl"
    file.write_text(file.read_text()[:-30])  # the power went while the last line was written
    notes = []
    predict(evaluation, episodes, notes.append, start)
    assert "\n\n" not in file.read_text()
    assert notes[0] == f"2 of {len(episodes)} expressions were answered before and are skipped" and set(evaluation.answered()) == {e.episode_id for e in episodes}
    assert all(np.array_equal(image(evaluation, e, 0), before[e.episode_id]) for e in episodes[:3])
    predict(evaluation, episodes, notes.append, nothing_starts)


def test_a_broken_video_costs_its_expressions_alone_and_is_tried_again(evaluation, start, data, tmp_path):
    episodes = list(read_episodes(data))
    gone = replace(episodes[0], video=str(tmp_path / "gone"), video_id="gone", episode_id="gone/0")
    write_episodes([gone, episodes[1]], tmp_path / "broken/part.parquet")
    evaluation = replace(evaluation, data=tmp_path / "broken")
    for _ in range(2):
        predict(evaluation, list(read_episodes(evaluation.data)), lambda text: None, start)
    assert [(line["episode_id"], line["status"]) for line in lines(evaluation)] == [("gone/0", "unreadable"), (episodes[1].episode_id, "ok"), ("gone/0", "unreadable")]
    assert evaluation.answered().keys() == {episodes[1].episode_id}


def test_what_htfs_chose_is_kept_whatever_stops_the_evaluation(evaluation, start, data, tmp_path, monkeypatch):
    """Also beside a video that cannot be read, which costs its own expressions alone."""
    looks = []

    def ask(asked):
        looks.extend(look.episode_id for look in asked)
        return [['{"start": 10, "end": 30, "percent": 50}'] * len(look.seeds) for look in asked]

    @contextmanager
    def scripted(config):
        yield lambda episodes: HTFS(config.htfs, ask, "a script", config.key_frames, config.reference_frames)

    @contextmanager
    def fails(policy):
        raise RuntimeError("no memory")
        yield

    monkeypatch.setattr(segment, "sampler_for", scripted)
    episodes = list(read_episodes(data))
    gone = replace(episodes[0], video=str(tmp_path / "gone"), video_id="gone", episode_id="gone/0")
    write_episodes([*episodes[:2], gone, *episodes[2:]], tmp_path / "htfs/part.parquet")
    sampling = Sampling.of("htfs", ["htfs.unit=percent", "htfs.rounds=0", "key_frames=2", "reference_frames=2", "batch=2"])
    evaluation = replace(evaluation, data=tmp_path / "htfs", sampling=sampling)
    asked = list(read_episodes(evaluation.data))
    with pytest.raises(RuntimeError, match="no memory"):
        predict(evaluation, asked, lambda text: None, fails)
    assert set(looks) == {e.episode_id for e in episodes}
    looks.clear()
    predict(evaluation, asked, lambda text: None, start)
    assert not looks and {line["episode_id"]: line["status"] for line in lines(evaluation)}["gone/0"] == "unreadable"
    kept = {row.episode_id: row.sample for file in (evaluation.out / "frames").iterdir() for row in read_samples(file)}
    assert {name: kept[name].target_frame for name in kept} == {line["episode_id"]: line["target_frame"] for line in lines(evaluation) if line["status"] != "unreadable"}


@pytest.mark.parametrize("oracle", ["frame", "box", "mask"])
def test_oracles(evaluation, start, data, oracle):
    evaluation, episodes = replace(evaluation, oracle=oracle), list(read_episodes(data))
    predict(evaluation, episodes, lambda text: None, start)
    of = {line["episode_id"]: line for line in lines(evaluation)}
    for e in episodes:
        areas = {t: sum(a.area for a in e.visible(t)) for t in e.annotated_frames}
        target = of[e.episode_id]["target_frame"]
        assert areas[target] == max(areas.values())
        overlap = jaccard(image(evaluation, e, target) > 0, e.masks(target).any(0))
        assert overlap == 1 if oracle == "mask" else overlap > 0.7 if oracle == "box" else 0 <= overlap <= 1
        assert (of[e.episode_id]["completion"] is None) == (oracle != "frame")


def test_hidden_expressions_beside_public_ones_are_predicted_whole(evaluation, start, data, tmp_path):
    """Both in one group, which goes through the video once."""
    public = next(e for e in read_episodes(data) if e.num_frames > 2)
    t = max(public.annotated_frames, key=lambda t: len(public.visible(t)))
    public = replace(public, annotated_frames=(t,), objects=tuple(replace(o, annotations=tuple(a for a in o.annotations if a.frame == t)) for o in public.objects))
    hidden = replace(public, episode_id="hidden", expression_id="hidden", annotated_frames=(), objects=())
    write_episodes([public, hidden], tmp_path / "both/part.parquet")
    evaluation = replace(evaluation, data=tmp_path / "both")
    episodes = list(read_episodes(evaluation.data))
    with pytest.raises(UserError, match="--oracle mask needs the truth, and the masks of 1 expressions are not public, such as hidden"):
        predict(replace(evaluation, oracle="mask", out=tmp_path / "oracle"), episodes, print, nothing_starts)
    predict(evaluation, episodes, lambda text: None, start)
    assert len(list((evaluation.predictions / hidden.video_id / "hidden").iterdir())) == hidden.num_frames
    assert image(evaluation, public, t).shape == (public.height, public.width)


def test_a_query_that_no_prompt_can_hold_is_said_before_anything_starts(evaluation, data):
    episodes = [replace(e, query="what is <|image_pad|>?") for e in read_episodes(data)]
    with pytest.raises(PromptError, match="holds a media token"):
        predict(evaluation, episodes, print, nothing_starts)
    assert not evaluation.out.exists()


def test_a_folder_belongs_to_one_evaluation(evaluation, start, data):
    episodes = list(read_episodes(data))
    evaluation.begin(episodes)
    with pytest.raises(UserError, match="evaluation with oracle None, not 'box'"):
        predict(replace(evaluation, oracle="box"), episodes, print, start)
    with pytest.raises(UserError, match="evaluation with policy"):
        predict(replace(evaluation, policy=replace(evaluation.policy, name="another")), episodes, print, start)
    with pytest.raises(UserError, match="--oracle box chooses the target frame, and --sampler first"):
        predict(replace(evaluation, oracle="box", sampling=Sampling("first")), episodes, print, start)
    with pytest.raises(UserError, match="not of 'mevis' but of 'toy'"):
        predict(replace(evaluation, benchmark="mevis"), episodes, print, start)


def test_the_command(evaluation, start, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "predict", lambda evaluation, episodes, note, replicas: predict(evaluation, episodes, note, start, replicas))
    out = str(tmp_path / "a")
    command = ["eval", "toy", str(TOY / "policy"), "--config", "debug", "--data", str(data), *TOY_MODELS[1:]]
    assert cli.main([*command, "--out", out, "--zip", str(tmp_path / "a.zip")]) == 0
    printed = capsys.readouterr().out
    assert "official  strict" in printed and "6 expressions, 0 of them without a usable prediction" in printed
    scores, rows = json.loads((tmp_path / "a/scores.json").read_text()), pq.read_table(tmp_path / "a/expressions.parquet").to_pylist()
    assert scores["strict"]["J"] == pytest.approx(100 * np.mean([r["j"] for r in rows])) and scores["mean_reasoning_words"] > 1
    assert all(r["status"] == SCORED and r["answer_status"] == "ok" and r["answer_response_tokens"] > 10 for r in rows)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert sorted(archive.namelist()) == sorted(str(p.relative_to(tmp_path / "a/predictions")) for p in (tmp_path / "a/predictions").rglob("*.png"))

    # Another program's predictions, here the same ones, against the first.
    assert cli.main(["eval", "toy", "--predictions", f"{out}/predictions", "--data", str(data), "--out", str(tmp_path / "b"), "--against", out]) == 0
    assert "+0.00 (95% interval +0.00 to +0.00, bootstrap over" in capsys.readouterr().out
    assert json.loads((tmp_path / "b/scores.json").read_text())["strict"] == scores["strict"]

    # A zip says what it lacks.
    shutil.rmtree(next((tmp_path / "a/predictions").glob("*/*")))
    assert cli.main(["eval", "toy", "--predictions", f"{out}/predictions", "--data", str(data), "--out", str(tmp_path / "b"), "--zip", str(tmp_path / "b.zip")]) == 0
    assert "images; 1 expressions have none, such as toy_" in capsys.readouterr().out
    scored = (["--data", str(data), "--predictions", f"{out}/predictions"])
    for wrong, said in (
        ([*scored, "--out", out], "holds a policy's evaluation"),
        ([*scored, "--out", str(tmp_path / "b"), "--against", str(tmp_path / "b")], "--against and --out are both"),
        ([*scored, "--out", str(tmp_path / "c"), "--against", str(tmp_path / "none")], "expressions.parquet is missing"),
        ([*scored, "--out", str(tmp_path / "c"), "--sampler", "first", "--oracle", "box"], "--oracle, --sampler: --predictions are scored as they are"),
        ([*command[2:], "--out", str(tmp_path / "b")], "holds the scores of another program's predictions"),
    ):
        assert cli.main(["eval", "toy", *wrong]) == 2
        assert said in capsys.readouterr().err
    for wrong, said in (
        (["--data", str(data)], "neither a CHECKPOINT nor --predictions"),
        ([str(TOY / "policy"), "--data", str(data), "--predictions", out], "both a CHECKPOINT and --predictions"),
        (["--data", str(data), "--predictions", str(tmp_path / "none")], "no such folder of predictions"),
        (["runs/no-such-run", "--data", str(data)], "there is no run runs/no-such-run"),  # and not a hub id, which it looks like
    ):
        assert cli.main(["eval", "toy", *wrong, "--out", str(tmp_path / "c")]) == 2
        assert said in capsys.readouterr().err


def test_a_split_without_public_masks_is_predicted_whole_and_not_scored(evaluation, start, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "predict", lambda evaluation, episodes, note, replicas: predict(evaluation, episodes, note, start, replicas))
    hidden = [replace(e, annotated_frames=(), objects=()) for e in read_episodes(data)][:1]
    write_episodes(hidden, tmp_path / "hidden/part.parquet")
    arguments = ["eval", "toy", str(TOY / "policy"), "--config", "debug", "--data", str(tmp_path / "hidden"), "--out", str(tmp_path / "o"), *TOY_MODELS[1:]]
    assert cli.main(arguments) == 0
    assert "are not public: nothing is scored here" in capsys.readouterr().out
    assert len(list((tmp_path / "o/predictions").rglob("*.png"))) == hidden[0].num_frames and not (tmp_path / "o/scores.json").exists()


# ---- the difference of two evaluations ----


def written(folder, values, source="toy", kinds=("referring",), images=False):
    """An evaluation with these J (and F) of the expressions of each video."""
    rows = []
    for v, of_video in enumerate(values):
        for n, x in enumerate(of_video):
            numbers = {"intersection": int(1000 * x), "union": 1000} if images else {"j": x, "f": x}
            rows.append(ExpressionScore(f"{source}/s/{v}/{n}", str(v), str(n), kinds[n % len(kinds)], None, SCORED, **numbers))
    folder.mkdir()
    write_scores(BenchmarkScores(source, {}, {}, rows), folder)
    return folder


def test_the_interval_is_that_of_resampled_videos(tmp_path):
    rng = np.random.default_rng(0)
    base = [rng.random(3) * 0.5 for _ in range(60)]
    shift = rng.normal(0.1, 0.1, 60)  # of a video as a whole
    first, second = written(tmp_path / "a", base), written(tmp_path / "b", [b + s for b, s in zip(base, shift)])
    found = compare(first, second)
    assert found.second - found.first == pytest.approx(100 * shift.mean()) and found.measure == "J&F" and found.videos == 60
    half = 1.96 * 100 * shift.std() / np.sqrt(60)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1) and found.low < 100 * shift.mean() < found.high
    assert compare(first, first).low == compare(first, first).high == 0
    images = compare(written(tmp_path / "c", base, images=True), written(tmp_path / "d", [b + 0.2 for b in base], images=True))
    assert images.measure == "gIoU" and images.second - images.first == pytest.approx(20, abs=0.2)


def test_revos_is_the_mean_of_its_two_types(tmp_path):
    kinds = ("referring", "referring", "reasoning", "no_target")
    first, second = (written(tmp_path / name, [[0.2, 0.4, x, 1.0]] * 3, "revos", kinds) for name, x in (("a", 0.6), ("b", 0.8)))
    found = compare(first, second)
    assert (found.first, found.second) == (pytest.approx(45), pytest.approx(55))


def test_evaluations_of_other_expressions_are_not_compared(tmp_path):
    first, second = written(tmp_path / "a", [[0.1], [0.2]]), written(tmp_path / "b", [[0.1]])
    with pytest.raises(UserError, match="different expressions, toy/s/1/0 among 1"):
        compare(first, second)
    with pytest.raises(UserError, match="expressions.parquet is missing"):
        compare(first, tmp_path)


def test_the_table_shows_what_is_missing():
    rows = [ExpressionScore("a", "v", "0", None, None, SCORED, j=0.5, f=0.7), ExpressionScore("b", "v", "1", None, None, MISSING, "v/1")]
    said = table_lines(BenchmarkScores("x", {"J&F": None}, {"J&F": 30.0}, rows, ["a note"]))
    assert said == ["     official  strict", "J&F         -   30.00", "2 expressions, 1 of them without a usable prediction", "  1 no prediction", "note: a note"]


def test_an_empty_zip_is_not_written(tmp_path):
    with pytest.raises(UserError, match="holds no predictions"):
        eval_results.write_zip(tmp_path, tmp_path / "x.zip", "", [])
    assert not list(tmp_path.iterdir())
