"""videoseg data inspect --oracle: real SAM2 is shown the truth of toy episodes, and what it does not find is left out of a copy."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cluster import cli, oracle
from cluster.draws import target_of
from cluster.oracle import Found, Oracle
from cluster.scoring import object_prompts
from reward_service import LengthConfig, RewardConfig, TermWeights, parse_answer, score
from rollout.decoding import Decoders
from rollout.episodes import Annotation, IgnoreMask, TargetObject, annotate, read_episodes, write_episodes
from segmentation_service.masks import encode_rle, mask_iou
from segmentation_service.segmenter import ObjectPrompt, Segmenter
from segmentation_service.video import open_video, read_frame
from tests.conftest import TOY

SAM2 = ["--segmenter", str(TOY / "sam2"), "--workers", "1"]


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter(str(TOY / "sam2"), device="cpu")


@pytest.fixture(scope="module")
def ask(segmenter):
    decoders = Decoders(1)
    yield lambda episodes, frames=2: Oracle(segmenter, decoders, frames).look(episodes)
    decoders.close()


@pytest.fixture(scope="module")
def episodes(toy_data):
    """Of the toy world's test split, with absolute paths: those whose targets the toy SAM2 finds, of two videos."""
    found = [replace(e, video=str(e.video_path), root=".") for e in read_episodes(toy_data / "valid")]
    names = list(dict.fromkeys(e.video_id for e in found))
    return [e for e in found if e.video_id in names[:2]]


def speckled(target, size):
    """The target with a truth that no segmenter can find: every other pixel of a corner, in every frame."""
    mask_HW = np.zeros(size, bool)
    mask_HW[:20:2, :20:2] = True
    return TargetObject(target.object_id, tuple(annotate(a.frame, mask_HW) for a in target.annotations))


def test_a_target_has_the_iou_that_a_right_answer_earns_and_a_frame_is_encoded_once(segmenter, ask, episodes):
    before = segmenter.stats()["image_encodings"]
    found = ask(episodes)
    frames = {(e.video, t) for e, f in zip(episodes, found) for by_frame in f.ious.values() for t in by_frame}
    assert segmenter.stats()["image_encodings"] - before == len(frames) < sum(len(o) for f in found for o in f.ious.values())
    graded = RewardConfig(weights=TermWeights(mask_iou=1.0), mask_iou_grading="graded", length=LengthConfig(penalty=False))
    for episode, f in zip(episodes, found):
        for target in episode.objects:
            alone = replace(episode, objects=(target,))
            assert len(f.ious[target.object_id]) == min(2, len(target.annotations))
            for t, iou in f.ious[target.object_id].items():
                truth = target_of(alone, t)
                item = {"bbox_2d": truth.boxes[0], "point_2d": truth.points[0][0]}
                answer = parse_answer(f"<think>so</think><answer>{json.dumps([item])}</answer>")
                (masks,) = segmenter.segment_group(read_frame(open_video(episode.video), t), [object_prompts(answer)])
                assert score(answer, truth, graded, predicted_masks=masks).terms["mask_iou"] == pytest.approx(iou, abs=1e-6)


def test_all_frames_are_looked_at_unless_told_otherwise_and_ignored_pixels_do_not_count(segmenter, ask, episodes):
    target = episodes[0].objects[0]
    episode = replace(episodes[0], objects=(replace(target, annotations=target.annotations[:4]),))
    target = episode.objects[0]
    (everywhere,) = ask([episode], None)
    assert list(everywhere.ious[target.object_id]) == [x.frame for x in target.annotations]
    first = target.annotations[0]
    frame_HW3, truth_HW = read_frame(open_video(episode.video), first.frame), episode.decoded(first)
    ((found_HW,),) = segmenter.segment_frame(frame_HW3, [[ObjectPrompt(first.box, (first.point,), (1,))]])
    assert everywhere.ious[target.object_id][first.frame] == pytest.approx(mask_iou(found_HW, truth_HW), abs=1e-6) != 1
    ignoring = replace(episode, ignore=(IgnoreMask(first.frame, encode_rle(found_HW ^ truth_HW)["counts"]),))
    (ignored,) = ask([ignoring], None)
    assert ignored.ious[target.object_id] == everywhere.ious[target.object_id] | {first.frame: 1.0}


def test_broken_videos_and_what_has_no_truth(ask, episodes, tmp_path):
    good = episodes[0]
    (target,) = good.objects[:1]
    box_only = TargetObject("b", (Annotation(target.annotations[0].frame, None, 1, (0, 0, 0, 0), (0, 0)),))
    missing, larger = replace(good, video=str(tmp_path / "nowhere")), replace(good, height=good.height + 1)
    hidden, nothing, boxes = replace(missing, objects=(), annotated_frames=()), replace(missing, objects=()), replace(missing, objects=(box_only,))
    found = ask([missing, hidden, good, larger, nothing, boxes])
    assert "nowhere" in found[0].broken and "(frames, height, width)" in found[3].broken
    assert found[1] == found[4] == found[5] == Found() and found[2].ious and found[2].broken is None


@pytest.fixture(scope="module")
def mixed(episodes, tmp_path_factory):
    """A data set of two shards: found, hardly, half found, no target, a video that is not there, found again."""
    root, good = tmp_path_factory.mktemp("mixed") / "set", episodes[0]
    (target,) = good.objects[:1]
    wrong = replace(speckled(target, (good.height, good.width)), object_id="wrong")
    named = lambda name, **changes: replace(good, episode_id=name, **changes)
    write_episodes([named("found"), named("missed", objects=(wrong,), difficulty=9.0), named("half", objects=(target, wrong))], root / "a.parquet")
    write_episodes([named("nothing", objects=()), named("broken", video="nowhere"), named("again", difficulty=None)], root / "b.parquet")
    return root


def test_a_copy_leaves_out_what_is_not_found(mixed, tmp_path, capsys):
    out = tmp_path / "copies/set"
    assert cli.main(["data", "inspect", str(mixed), "--oracle", "--out", str(out), "--frames", "2", *SAM2]) == 0
    printed = capsys.readouterr().out
    assert "IoU of 5 targets that the segmenter was shown, on 10 frames" in printed and "difficulty hard: mean 0." in printed
    assert "3 of 6 episodes stay, 1 of them without a mask" in printed and "1 go: unreadable video (such as broken)" in printed
    assert printed.count("worst: ") == 2 and "under 0.6: 40.0% (5 targets)" in printed  # queries share their targets
    kept = list(read_episodes(out))
    assert [e.episode_id for e in kept] == ["found", "nothing", "again"] and sorted(f.name for f in out.glob("*.parquet")) == ["a.parquet", "b.parquet"]
    assert all(not e.video.startswith("/") and e.video_path.is_dir() for e in kept)
    original = {e.episode_id: e for e in read_episodes(mixed)}
    assert [replace(e, video="", root="") for e in kept] == [replace(original[e.episode_id], video="", root="") for e in kept]
    report = json.loads((out / "report.json").read_text())
    assert (report["queries"], report["episodes"], report["skipped"], report["schema_version"]) == (6, 3, 3, "2")
    assert {reason: d["examples"] for reason, d in report["skipped_by_reason"].items()} == {
        "every target under IoU 0.6": ["missed"],
        "one of several targets under IoU 0.6": ["half"],
        "unreadable video": ["broken"],
    }
    assert report["worst"][0]["iou"] < 0.6 < report["worst"][1]["iou"] == report["iou"]["all"]["quartiles"][2]
    assert [json.loads(line)["episode_id"] for line in open(out / "oracle.jsonl")] == list(original)
    assert [f.name for f in out.parent.iterdir()] == ["set"]


def test_an_interrupted_command_goes_on_and_gives_the_same(mixed, tmp_path, capsys, monkeypatch):
    command = ["data", "inspect", str(mixed), "--oracle", "--frames", "1", *SAM2, "--out"]
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    printed, looked = capsys.readouterr().out, []
    look = Oracle.look

    def stopping(self, episodes):
        looked.extend(e.episode_id for e in episodes)
        if "again" in looked:
            raise KeyboardInterrupt
        return look(self, episodes)

    monkeypatch.setattr(oracle, "EPISODES_AT_ONCE", 2)
    monkeypatch.setattr(Oracle, "look", stopping)
    assert cli.main([*command, str(tmp_path / "out")]) == 130
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists() and (partial / "oracle.jsonl").read_text().count("\n") == 4
    with open(partial / "oracle.jsonl", "a") as record:
        record.write('{"episode_id": "bro')
    looked.clear()
    monkeypatch.setattr(Oracle, "look", lambda self, episodes: looked.extend(e.episode_id for e in episodes) or look(self, episodes))
    for _ in range(2):  # the second time nothing is looked at
        capsys.readouterr()
        assert cli.main([*command, str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out.replace(str(tmp_path / "out"), str(tmp_path / "whole")) == printed
    assert looked == ["broken", "again"] and not partial.exists()
    for name in ("a.parquet", "b.parquet", "oracle.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert cli.main([*command, str(tmp_path / "out"), "--drop-below", "0.5"]) == 2
    assert "of another inspection with --oracle (drop_below was 0.6, is 0.5); remove it or give another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--drop-below", "0.5"], "--drop-below is for --oracle, which is not given"),
        (["--oracle", "--drop-below", "60"], "--drop-below 60 is not an IoU"),
        (["--oracle", "--frames", "0"], "--frames 0 must be at least 1"),
        (["--oracle", "--segmenter", "no/such/folder"], "--segmenter = 'no/such/folder': no such file or folder"),
        (["--oracle", *SAM2, "--out", "{data}"], "holds the episodes themselves"),
        (["--oracle", *SAM2, "--out", "{data}/.."], "was not made by an inspection with --oracle; give another folder"),
    ],
)
def test_bad_options_are_one_error(mixed, options, message, capsys):
    assert cli.main(["data", "inspect", str(mixed), *(o.format(data=mixed) for o in options)]) == 2
    assert message in capsys.readouterr().err
