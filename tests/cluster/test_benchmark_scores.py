"""Evaluators of benchmarks against plain restatements of the official programs, on predictions of every kind, good, missing and broken."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import linear_sum_assignment

from cluster.benchmark_scores import score_predictions
from cluster.errors import UserError
from cluster.expression_scores import BROKEN, MISSING, NO_VIDEO, SCORED, UNREADABLE
from benchmarks.plain_measures import boundary_f, jaccard
from rollout.episodes import IgnoreMask, read_episodes
from rollout.importers.driver import import_data
from segmentation_service.masks import encode_rle
from tests.rollout import miniatures
from tests.rollout.miniatures import HW, NAMES


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def imported(kind, source, out, split):
    import_data(kind, source, out, progress=lambda line: None, splits=[split])
    return list(read_episodes(out / split))


def like(mask, rng):
    """A prediction: the truth shifted, nothing, everything, or something else."""
    kind = rng.integers(5)
    if kind == 0:
        return np.zeros(HW, bool)
    if kind == 1:
        return np.ones(HW, bool)
    if kind == 2:
        return rng.random(HW) < 0.3
    return np.roll(mask, tuple(rng.integers(-2, 3, 2)), (0, 1))


def truth_of(episode, t):
    return episode.masks(t).any(0) if len(episode.masks(t)) else np.zeros(HW, bool)


def predict(folder, episodes, rng, value=255):
    """Of every expression a folder of images; what they say, frame by frame."""
    said = {}
    for e in episodes:
        names = NAMES if e.num_frames > 1 else [e.video_path.stem]
        for t in e.annotated_frames:
            mask = like(truth_of(e, t), rng)
            file = folder / e.video_id / e.expression_id / f"{names[t]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * value).save(file)
            said.setdefault(e.episode_id, {})[t] = mask
    return said


def plain_j_and_f(said, episode):
    frames = [(said[t], truth_of(episode, t)) for t in episode.annotated_frames]
    return np.mean([jaccard(*pair) for pair in frames]), np.mean([boundary_f(*pair) for pair in frames])


@pytest.mark.parametrize("workers", [1, 2])
def test_mevis(tmp_path, rng, workers):
    miniatures.mevis(tmp_path / "mevis")
    episodes = imported("mevis", tmp_path / "mevis", tmp_path / "data", "valid_u")
    said = predict(tmp_path / "p", episodes, rng)
    plain = {e.expression_id + e.video_id: plain_j_and_f(said[e.episode_id], e) for e in episodes}
    j, f = 100 * np.mean(list(plain.values()), axis=0)
    found = score_predictions("mevis", episodes, tmp_path / "p", workers)
    assert found.official == found.strict == pytest.approx({"J&F": (j + f) / 2, "J": j, "F": f}, abs=1e-9) and not found.failures
    assert [e.frames for e in found.expressions] == [6] * 4

    # One expression without images, one video without a folder, one image of another size.
    shutil.rmtree(tmp_path / "p/valid_u_a/1")
    shutil.rmtree(tmp_path / "p/valid_u_b")
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "p/valid_u_a/10/00003.png")
    found = score_predictions("mevis", episodes, tmp_path / "p", workers)
    assert [e.status for e in found.expressions] == [SCORED, MISSING, BROKEN, NO_VIDEO]
    one = plain["0valid_u_a"]
    assert (found.official["J"], found.official["F"]) == pytest.approx((100 * one[0] / 2, 100 * one[1] / 2))
    assert (found.strict["J"], found.strict["F"]) == pytest.approx((100 * one[0] / 4, 100 * one[1] / 4))
    assert "00003.png is (3, 4), the frame (24, 32)" in found.failures[1].detail


def test_void_pixels_of_own_videos_count_for_nothing_and_those_of_benchmarks_as_background(tmp_path, rng):
    miniatures.mevis(tmp_path / "mevis")
    episode = next(e for e in imported("mevis", tmp_path / "mevis", tmp_path / "data", "valid_u") if e.num_frames > 1)
    void = np.zeros(HW, bool)
    void[:, : HW[1] // 2] = True
    frames, place = episode.annotated_frames, tmp_path / "p" / episode.video_id / episode.expression_id
    place.mkdir(parents=True)
    for t in frames:
        said = np.where(void, rng.random(HW) < 0.5, truth_of(episode, t))
        Image.fromarray(said.astype(np.uint8) * np.uint8(255)).save(place / f"{NAMES[t]}.png")
    ignoring = replace(episode, ignore=tuple(IgnoreMask(t, encode_rle(void)["counts"]) for t in frames))
    own, official = (score_predictions(source, [replace(ignoring, source=source)], tmp_path / "p").strict for source in ("own", "mevis"))
    assert own == pytest.approx({"J&F": 100, "J": 100, "F": 100}) and official["J"] < 90


def test_any_value_above_black_is_the_answer(tmp_path, rng):
    miniatures.mevis(tmp_path / "mevis")
    episodes = imported("mevis", tmp_path / "mevis", tmp_path / "data", "valid_u")
    said = predict(tmp_path / "p", episodes, rng)
    before = score_predictions("mevis", episodes, tmp_path / "p").official
    for n, e in enumerate(episodes):
        for t, mask in said[e.episode_id].items():
            file = tmp_path / "p" / e.video_id / e.expression_id / f"{NAMES[t]}.png"
            kinds = (lambda: Image.fromarray(mask), lambda: Image.fromarray(mask.astype(np.uint8)), lambda: Image.fromarray(np.repeat(mask[..., None] * np.uint8(9), 3, 2)))
            image = kinds[n % 3]()
            image.save(file)
    assert score_predictions("mevis", episodes, tmp_path / "p").official == before


def test_revos(tmp_path, rng):
    miniatures.revos(tmp_path / "revos")
    meta = json.loads((tmp_path / "revos/meta_expressions_valid_.json").read_text())
    x = meta["videos"]["MeViS/x"]["expressions"]
    x["1"] = {"exp": "the first", "obj_id": [3], "anno_id": [3], "type_id": 0}
    x["2"] = {"exp": "no such thing", "obj_id": [], "anno_id": [], "type_id": 2}
    x["3"] = {"exp": "why?", "obj_id": [4], "anno_id": [4], "type_id": 1}
    miniatures.write_json(tmp_path / "revos/meta_expressions_valid_.json", meta)
    episodes = imported("revos", tmp_path / "revos", tmp_path / "data", "valid")
    said = predict(tmp_path / "p", episodes, rng)
    file = tmp_path / "p/MeViS/x/3/00005.png"
    file.write_bytes(file.read_bytes()[:40])

    plain = {"referring": [], "reasoning": [], "no_target": []}
    for e in episodes:
        if e.expression_id == "3":
            plain["reasoning"].append((0, 0, 0, 0, 0))
            continue
        of_video = [o for other in episodes if other.video_id == e.video_id for o in other.objects]
        a, r255, r1 = [], [], []
        for t in e.annotated_frames:
            g, p = e.masks(t).sum(0).astype(np.uint8), said[e.episode_id][t]
            fore = np.zeros(HW, bool)
            for o in of_video:
                for annotation in o.annotations:
                    if annotation.frame == t:
                        fore |= e.decoded(annotation)
            for value, out in ((255, r255), (1, r1)):
                wrong = ((np.uint8(1) - g) * (p * np.uint8(value))).astype(np.int64).sum()
                out.append(max(1 - wrong / (fore.sum() + 1e-6), 0))
            a.append((g == p * np.uint8(255)).mean())
        plain[e.query_type].append((*plain_j_and_f(said[e.episode_id], e), np.mean(a), np.mean(r255), np.mean(r1)))
    found = score_predictions("revos", episodes, tmp_path / "p")
    for rounded, column in ((True, found.official), (False, found.strict)):
        means = {kind: np.mean([[round(100 * v, 2) if rounded else 100 * v for v in row] for row in plain[kind]], axis=0) for kind in ("referring", "reasoning")}
        means["overall"] = (means["referring"] + means["reasoning"]) / 2
        for kind, (j, f, a, r255, r1) in means.items():
            expected = {"J&F": (j + f) / 2, "J": j, "F": f, "A": a, "R": r255, "R (0/1)": r1}
            assert {name: column[f"{name} {kind}"] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert [e.status for e in found.failures] == [BROKEN] and 0 < found.strict["R (0/1) referring"]


def test_reasonvos_leaves_out_what_is_missing(tmp_path, rng):
    miniatures.reasonvos(tmp_path / "r")
    episodes = imported("reasonvos", tmp_path / "r", tmp_path / "data", "test")
    said = predict(tmp_path / "p", episodes, rng)
    shutil.rmtree(tmp_path / "p" / episodes[0].video_id / episodes[0].expression_id)
    rows = [plain_j_and_f(said[e.episode_id], e) for e in episodes[1:]]
    found = score_predictions("reasonvos", episodes, tmp_path / "p")
    assert (found.official["J"], found.official["F"]) == pytest.approx(tuple(100 * np.mean(rows, axis=0)))
    assert found.strict["J"] == pytest.approx(found.official["J"] * len(rows) / len(episodes))
    assert [e.frames for e in found.expressions] == [6, 3, 3, 6]


def test_ref_youtube_vos(tmp_path, rng):
    miniatures.ref_youtube_vos(tmp_path / "y")
    episodes = imported("ref_youtube_vos", tmp_path / "y", tmp_path / "data", "valid")
    with pytest.raises(UserError, match="masks are not public") as error:
        (tmp_path / "p").mkdir()
        score_predictions("ref_youtube_vos", episodes, tmp_path / "p")
    assert "--zip" in error.value.remedy

    episodes = imported("ref_youtube_vos", tmp_path / "y", tmp_path / "data", "train")  # the masks of valid have the same layout
    names = [f"{5 * t:05d}" for t in range(6)]
    rows = []
    for e in episodes:
        said = {t: like(truth_of(e, t), rng) for t in e.annotated_frames}
        for t, mask in said.items():
            file = tmp_path / "q" / e.video_id / e.expression_id / f"{names[t]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(file)
        rows.append(plain_j_and_f(said, e))
    found = score_predictions("ref_youtube_vos", episodes, tmp_path / "q")
    assert (found.official["J"], found.official["F"]) == pytest.approx(tuple(100 * np.mean(rows, axis=0))) and found.official == found.strict


@pytest.mark.parametrize("converted", [False, True])
def test_ref_davis17(tmp_path, rng, converted):
    """The merged protocol restated on the palette images themselves; a third object has no text, and the second annotator lacks a prediction."""
    truth, source = miniatures.ref_davis17(tmp_path / "davis"), tmp_path / "davis"
    truth = np.stack(truth["dogs-scale"])
    truth[:, 20:, 25:] = 3
    for name, values in zip(NAMES, truth):
        miniatures.write_png(source / f"DAVIS/Annotations_unsupervised/480p/dogs-scale/{name}.png", values)
    if converted:
        source = tmp_path / "ref-davis"
        miniatures.convert_davis(tmp_path / "davis", source)
    episodes = imported("ref_davis17", source, tmp_path / "data", "valid")
    said = predict(tmp_path / "p", episodes, rng)
    shutil.rmtree(tmp_path / "p/dogs-scale/5")  # object 2 of annotator 1
    by_id = {e.expression_id: np.stack([said[e.episode_id][t] for t in range(6)]) for e in episodes}
    official, strict = [], []
    for a in range(4):
        first, second = by_id[str(a)], by_id[str(4 + a)] & (a != 1)
        predicted = np.stack([first, second & ~first, np.zeros_like(first)])
        true = np.stack([truth == k for k in (1, 2, 3)])  # void is background
        j = np.array([[np.mean([jaccard(x, y) for x, y in zip(p, g)]) for g in true] for p in predicted])
        f = np.array([[np.mean([boundary_f(x, y) for x, y in zip(p, g)]) for g in true] for p in predicted])
        rows, columns = linear_sum_assignment(-(j + f) / 2)
        official.append((j[rows, columns].mean(), f[rows, columns].mean()))
        lost = (rows == 1) & (a == 1)
        strict.append((np.where(lost, 0, j[rows, columns]).mean(), np.where(lost, 0, f[rows, columns]).mean()))
    found = score_predictions("ref_davis17", episodes, tmp_path / "p", workers=2)
    for column, expected in ((found.official, official), (found.strict, strict)):
        assert (column["J"], column["F"]) == pytest.approx(tuple(100 * np.mean(expected, axis=0)), abs=1e-9)
    alone = [plain_j_and_f(said[e.episode_id], e) for e in episodes if e.expression_id != "5"]
    assert found.official["J per expression"] == round(100 * np.mean([j for j, _ in alone]), 2)
    assert found.strict["J per expression"] == pytest.approx(100 * sum(j for j, _ in alone) / 8)


def test_reasonseg(tmp_path, rng):
    miniatures.reasonseg(tmp_path / "s")
    episodes = imported("reasonseg", tmp_path / "s", tmp_path / "data", "val")
    said = predict(tmp_path / "p", episodes, rng)
    assert [e.expression_id for e in episodes] == ["0", "1"]
    e, p = episodes[0], said[episodes[0].episode_id][0]
    keep = ~e.ignored(0)
    shared, either = (p & truth_of(e, 0) & keep).sum(), ((p | truth_of(e, 0)) & keep).sum()
    found = score_predictions("reasonseg", episodes, tmp_path / "p")
    assert found.official == found.strict == pytest.approx({"gIoU": 100 * shared / (either + 1e-5) / (1 + 1e-5), "cIoU": 100 * shared / (either + 1e-10)})
    assert len(found.expressions) == 1 and "1 further texts" in found.notes[0]


def test_refcoco_counts_every_sentence_and_missing_ones_as_nothing(tmp_path, rng):
    miniatures.refcoco(tmp_path / "c", "refcoco", ("val",), "refs(unc).p")
    episodes = imported("refcoco", tmp_path / "c", tmp_path / "data", "val")
    said = predict(tmp_path / "p", episodes, rng)
    shutil.rmtree(tmp_path / "p" / episodes[0].video_id / episodes[0].expression_id)
    said[episodes[0].episode_id] = {0: np.zeros(HW, bool)}
    pairs = [(said[e.episode_id][0], truth_of(e, 0)) for e in episodes]
    shared, either = np.array([(p & g).sum() for p, g in pairs]), np.array([(p | g).sum() for p, g in pairs])
    found = score_predictions("refcoco", episodes, tmp_path / "p")
    expected = {"gIoU": 100 * (shared / (either + 1e-5)).sum() / (4 + 1e-5), "cIoU": 100 * shared.sum() / (either.sum() + 1e-10)}
    assert found.official == found.strict == pytest.approx(expected) and [e.status for e in found.failures] == [NO_VIDEO if len(episodes) == 1 else MISSING]


def test_expressions_that_cannot_be_scored_do_not_keep_others_from_it(tmp_path, rng):
    """Hidden truth is left out with a note; a video that is gone, or has other frames than when it was imported, costs its own expressions."""
    miniatures.mevis(tmp_path / "mevis")
    episodes = imported("mevis", tmp_path / "mevis", tmp_path / "data", "valid_u")
    predict(tmp_path / "p", episodes, rng)
    whole = score_predictions("mevis", episodes, tmp_path / "p")
    hidden = replace(episodes[0], episode_id="hidden", expression_id="hidden", annotated_frames=(), objects=())
    found = score_predictions("mevis", [*episodes, hidden], tmp_path / "p")
    assert found.strict == whole.strict and found.notes == ["1 expressions whose masks are not public are left out, such as hidden"]
    with pytest.raises(UserError, match="hidden: its masks are not public"):
        score_predictions("mevis", [hidden], tmp_path / "p")

    first = episodes[0].video_id
    mine, others = ([e for e in episodes if (e.video_id == first) == which] for which in (True, False))
    moved = [replace(e, video=str(tmp_path / "nowhere"), root="") for e in mine]
    scores = score_predictions("mevis", [*others, *moved], tmp_path / "p")
    assert {e.status for e in scores.failures} == {UNREADABLE} and sorted(e.episode_id for e in scores.failures) == sorted(e.episode_id for e in mine)
    kept = [e for e in whole.expressions if e.video_id != first]
    assert scores.strict["J"] == pytest.approx(100 * sum(e.j for e in kept) / len(episodes))
    next(episodes[0].video_path.iterdir()).unlink()
    scores = score_predictions("mevis", episodes, tmp_path / "p")
    assert all(e.status == UNREADABLE and f"frames, and had {episodes[0].num_frames} when" in e.detail for e in scores.failures) and len(scores.failures) == len(mine)


def test_an_image_that_is_gone_counts_as_nothing_found(tmp_path, rng):
    miniatures.reasonseg(tmp_path / "rs")
    episodes = imported("reasonseg", tmp_path / "rs", tmp_path / "data", "val")
    predict(tmp_path / "p", episodes, rng)
    gone = [replace(e, video=str(tmp_path / "nowhere.jpg"), root="") for e in episodes]
    before, after = (score_predictions("reasonseg", some, tmp_path / ("p" if which else "none")) for which, some in ((1, gone), (0, episodes)) if (tmp_path / "none").mkdir(exist_ok=True) is None)
    assert {e.status for e in before.failures} == {UNREADABLE} and before.strict == after.strict


def test_wrong_use_is_said(tmp_path):
    miniatures.mevis(tmp_path / "mevis")
    episodes = imported("mevis", tmp_path / "mevis", tmp_path / "data", "valid_u")
    with pytest.raises(UserError, match="not of 'mevi' but of 'mevis' .benchmarks: revos, mevis, "):
        score_predictions("mevi", episodes, tmp_path)
    with pytest.raises(UserError, match="not of 'mevis' but of nothing$"):
        score_predictions("mevis", [], tmp_path)
    with pytest.raises(UserError, match="no such folder of predictions"):
        score_predictions("mevis", episodes, tmp_path / "p")
    for wrong, said in (
        ({"video_id": "/data/clip"}, "are to name a folder"),
        ({"video_id": "../clip"}, "are to name a folder"),
        ({"expression_id": ""}, "are to name a folder"),
        ({"expression_id": "1"}, "another episode has video_id"),
        ({"media": "image"}, "images and videos"),
    ):
        with pytest.raises(UserError, match=said):
            score_predictions("mevis", [replace(episodes[0], **wrong), *episodes[1:]], tmp_path)
