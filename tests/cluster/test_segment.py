"""`videoseg segment` on toy videos: vLLM, SAM2 and XMem are the real ones at toy size, started once for all tests."""

import json
import weakref
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from PIL import Image

from cluster import cli, config_resolve, segment, segment_output
from cluster.errors import SomeWithoutMask, UserError
from cluster.inference import read_answer
from cluster.policies import find_policy
from cluster.segment import Sampling, find_videos, segment_videos
from cluster.segment_output import Outputs, QueryFolder, folder_name
from reward_service.measures import jaccard
from rollout.completion import Completion
from rollout.htfs import HTFS
from rollout.prompts import PromptError
from rollout.toy_world import WorldConfig, make_video
from segmentation_service.masks import decode_rle
from segmentation_service.overlay import draw_overlay
from segmentation_service.video import FramesInMemory, VideoError, open_video
from segmentation_service.video_writer import write_video
from tests.cluster.conftest import TOY_MODELS
from tests.conftest import TOY

EASY = {502: "the green square", 516: "the blue square", 518: "the yellow triangle"}  # seeds of videos with one shape, and its name


def frame_folder(folder, seed, world=WorldConfig()):
    folder.mkdir(parents=True)
    video = make_video(seed, world)
    for t in range(video.num_frames):
        Image.fromarray(video.frame(t)).save(folder / f"{t:05d}.png")
    return folder


def mp4(file, seed, world=WorldConfig(), fps=12.5):
    file.parent.mkdir(parents=True, exist_ok=True)
    video = make_video(seed, world)
    return write_video(file, map(video.frame, range(video.num_frames)), fps)


def answer(place):
    return json.loads((place / "answer.json").read_text())


def numbers(place):
    """The palette images of a folder, by frame: each pixel's object number."""
    files = sorted((place / "masks").iterdir())
    assert [f.name for f in files] == [f"{t:05d}.png" for t in range(len(files))]
    return [np.asarray(Image.open(f)) for f in files]


def left_over(out):
    return [p for p in out.rglob(".*")]


@contextmanager
def saying(model, *texts):
    """The model with these completions, one a query, in place of the policy's own: what a policy may say and the toy does not."""
    said = iter(texts)

    def answers(asked):
        for episode, sample in asked:
            completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), next(said), "stop", (), None)
            yield read_answer(episode, sample, model._prompt(episode, sample), completion, {"policy": 0.0})

    model.answers = answers
    try:
        yield lambda policy: nullcontext(model)
    finally:
        del model.answers


# ---- what is found, and the files ----


def test_toy_targets_are_found_and_every_file_says_so(policy, start, tmp_path):
    folders = {seed: frame_folder(tmp_path / f"toy{seed}", seed) for seed in EASY}
    for seed, query in EASY.items():
        video, out, notes = make_video(seed), tmp_path / "out", []
        (place,) = segment_videos(policy, [folders[seed]], [query], out, start=start, fps=8, note=notes.append)
        assert place == out / f"toy{seed}" / query.replace(" ", "-") and sorted(p.name for p in place.iterdir()) == ["answer.json", "masks", "overlay.mp4"]
        masks = [m > 0 for m in numbers(place)]
        ious = [jaccard(m, video.masks(t).any(0)) for t, m in enumerate(masks)]
        assert len(ious) == video.num_frames and np.mean(ious) > 0.8
        found = answer(place)
        assert found["status"] == "ok" and found["query"] == query and found["video"] == str(folders[seed]) and found["strict"]
        assert (found["height"], found["width"], found["num_frames"], found["fps"]) == (96, 128, video.num_frames, 8)
        assert found["target_frame"] == video.num_frames // 2 and len(found["shown_frames"]) == 4 and found["policy"] == str(TOY / "policy")
        assert found["completion"] == f"<think>{found['reasoning']}</think>" + found["completion"].split("</think>")[1] and found["finish_reason"] == "stop"
        (one,) = found["objects"]
        (raw,) = json.loads(found["completion"].split("<answer>")[1].removesuffix("</answer>"))  # in pixels of the policy's 112x112
        to_frame = np.array([128 / 112, 96 / 112])
        assert np.allclose(one["box"], raw["bbox_2d"] * np.tile(to_frame, 2), atol=0.01) and np.allclose(one["points"], [raw["point_2d"] * to_frame], atol=0.01)
        assert np.allclose(one["negative_points"], [raw["negative_point_2d"] * to_frame], atol=0.01)
        assert one["object"] == 1 and one["pixels_on_target_frame"] == masks[found["target_frame"]].sum()
        assert set(found["seconds"]) == {"read", "policy", "segment", "track", "write"} and min(found["seconds"].values()) >= 0
        assert any(f"toy{seed}: '{query}': ok: 1 object" in n for n in notes) and not left_over(out)


def test_an_mp4_of_odd_size_and_several_queries_in_both_forms_of_masks(policy, start, tmp_path):
    world = WorldConfig(height=97, width=129)
    clip, video = mp4(tmp_path / "clip.mp4", 510, world), make_video(510, world)
    queries = [q.text for q in video.queries][:3]
    outs = {form: tmp_path / form for form in ("png", "rle")}
    for form, out in outs.items():
        assert set(segment_videos(policy, [clip], queries, out, outputs=Outputs(png=form == "png", rle=form == "rle"), start=start).values()) <= {"ok"}
    source = open_video(clip)
    for query in queries:
        png, rle = (out / "clip" / folder_name(query) for out in outs.values())
        assert sorted(p.name for p in rle.iterdir()) == ["answer.json", "masks.json", "overlay.mp4"]
        masks = json.loads((rle / "masks.json").read_text())
        assert masks["size"] == [98, 130] and len(masks["frames"]) == video.num_frames == len(source)  # the clip was padded when it was written
        found, overlay, images = answer(png), open_video(png / "overlay.mp4"), numbers(png)
        assert found["fps"] == 12.5 == overlay.fps and len(overlay) == len(images) == video.num_frames
        for t, (rles, image_HW) in enumerate(zip(masks["frames"], images, strict=True)):
            assert len(rles) == len(found["objects"])
            expected = np.zeros((98, 130), int)
            for k, one in enumerate(rles, 1):
                expected[decode_rle(one)] = k
            assert (expected == image_HW).all()
            assert np.abs(overlay.frame(t).astype(int) - draw_overlay(source.frame(t), rles)).mean() < 4


def test_one_image_is_a_video_of_one_frame_and_odd_sides_are_padded_in_the_overlay_alone(policy, start, tmp_path):
    video = make_video(502, WorldConfig(height=97, width=129))
    Image.fromarray(video.frame(3)).save(tmp_path / "still.png")
    (place,) = segment_videos(policy, [tmp_path / "still.png"], ["the green square"], tmp_path / "out", start=start)
    assert place == tmp_path / "out/still/the-green-square" and [m.shape for m in numbers(place)] == [(97, 129)]
    assert len(open_video(place / "overlay.mp4")) == 1 and open_video(place / "overlay.mp4").frame(0).shape == (98, 130, 3)


def test_frame_i_of_the_overlay_carries_mask_i(tmp_path):
    """An object that jumps, masks that come in the tracker's order: each frame of the overlay differs from the video where its own mask is."""
    rng, hw, count, target = np.random.default_rng(0), (90, 121), 40, 17
    masks = np.zeros((count, *hw), bool)
    for t, (y, x) in enumerate(rng.integers((0, 0), (70, 100), (count, 2))):
        masks[t, y : y + 18, x : x + 18] = True
    frames = [np.full((*hw, 3), 60 + t, np.uint8) for t in range(count)]
    folder = QueryFolder(tmp_path / "out", hw, count, Outputs(rle=True))
    for t in [target, *range(target + 1, count), *range(target - 1, -1, -1)]:
        folder.add(t, masks[[t]])
    folder.finish(FramesInMemory(frames), 25.0, {"status": "ok", "seconds": {}})
    overlay, images, rles = open_video(tmp_path / "out/overlay.mp4"), numbers(tmp_path / "out"), json.loads((tmp_path / "out/masks.json").read_text())["frames"]
    assert len(overlay) == len(images) == len(rles) == count
    for t in range(count):
        drawn = np.abs(overlay.frame(t)[: hw[0], : hw[1]].astype(int) - frames[t]).max(-1) > 40
        ious = [jaccard(drawn, m) for m in masks]
        assert np.argmax(ious) == t and ious[t] > 0.6, t
        assert (images[t] == masks[t]).all() and (decode_rle(rles[t][0]) == masks[t]).all()


def test_neither_frames_nor_masks_are_kept(model, tmp_path):
    """At most the target frame, the current one and the one before it exist at any time, while masks go through a video and while the overlay is drawn."""
    toy, alive, most = make_video(511), [], 0

    class Watched:
        def __len__(self):
            return toy.num_frames

        def frame(self, i):
            nonlocal most
            frame = toy.frame(i)
            alive[:] = [r for r in alive if r() is not None] + [weakref.ref(frame)]
            most = max(most, len(alive))
            return frame

    target = toy.num_frames // 2
    folder = QueryFolder(tmp_path / "out", (96, 128), toy.num_frames, Outputs())
    for t, _, masks in model.track(Watched(), target, [toy.masks(target)]):
        folder.add(t, masks)
    folder.finish(Watched(), 8.0, {"seconds": {}})
    assert len(numbers(tmp_path / "out")) == toy.num_frames == 39 and most <= 3


def test_in_python(policy, model, tmp_path):
    clip, video = mp4(tmp_path / "clip.mp4", 516), make_video(516)
    found = model.segment(clip, "the blue square")
    assert found.answered.status == "ok" and "blue square" in found.answered.reasoning and found.on_target.shape == (1, 96, 128)
    masks = dict(found.masks())
    assert sorted(masks) == list(range(video.num_frames)) and (masks[found.answered.sample.target_frame] == found.on_target).all()
    assert np.mean([jaccard(masks[t].any(0), video.masks(t).any(0)) for t in masks]) > 0.8
    with pytest.raises(PromptError, match="media token"):
        model.segment(clip, "the <|image_pad|>")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="text.mp4"):
        model.segment(tmp_path / "text.mp4", "the blue square")


# ---- answers that give no mask ----


def test_answers_that_give_no_mask(policy, model, tmp_path):
    folder = frame_folder(tmp_path / "toy", 502)
    box = '<think>a</think><answer>[{"bbox_2d": [%s], "point_2d": [50, 50]}]</answer>'
    said = {
        "nothing fits": ("<think>None is.</think><answer>[]</answer>", "empty", 0),
        "outside": (box % "500, 500, 600, 600", "no_mask", 1),
        "words": ("I do not know.", "unparsable", 0),
        "items that are none": ('<think>a</think><answer>[{"bbox_2d": "left"}]</answer>', "unparsable", 0),
        "cut short, yet an object": ('<think>a</think><answer>{"bbox_2d": [40, 40, 60, 60]}', "ok", 1),
    }
    with saying(model, *(text for text, *_ in said.values())) as start:
        statuses = segment_videos(policy, [folder], list(said), tmp_path / "out", start=start)
    assert list(statuses.values()) == [status for _, status, _ in said.values()] and not left_over(tmp_path / "out")
    for (text, status, objects), place in zip(said.values(), statuses):
        found = answer(place)
        assert (found["status"], found["completion"], len(found["objects"])) == (status, text, objects)
        if status == "unparsable":
            assert [p.name for p in place.iterdir()] == ["answer.json"]
        else:
            assert any(m.any() for m in numbers(place)) == (status == "ok") and len(numbers(place)) == len(open_video(place / "overlay.mp4")) == 16
    with pytest.raises(SomeWithoutMask, match="5 queries: 2 unparsable, 1 empty, 1 no_mask, 1 ok"):
        segment.summary(tmp_path / "out", statuses)


def test_a_prompt_that_is_too_long(policy, start, tmp_path):
    folder = frame_folder(tmp_path / "toy", 502)
    statuses = segment_videos(policy, [folder], ["the " + "largest " * 200 + "shape", "the green square"], tmp_path / "out", start=start)
    assert sorted(statuses.values()) == ["ok", "too_long"]
    assert "prompt.max_tokens" in answer(next(p for p, s in statuses.items() if s == "too_long"))["error"]


# ---- videos that cannot be read ----


@pytest.fixture
def batch(tmp_path):
    """Two sound videos of one name, one that is none, and one of whose images, which no prompt shows, one is broken."""
    batch = tmp_path / "videos"
    frame_folder(batch / "toy", 502), mp4(batch / "toy.mp4", 516)
    frame_folder(batch / "damaged", 518)
    (batch / "damaged/00015.png").write_bytes(b"\x89PNG")
    (batch / "text.mp4").write_text("no video")
    (batch / "notes.txt").write_text("no video either")
    (batch / "empty").mkdir()
    return batch


def test_a_batch_does_what_can_be_done_then_resumes(policy, start, batch, tmp_path, monkeypatch):
    out, notes = tmp_path / "out", []
    again = lambda: segment_videos(policy, find_videos(batch), ["the green square", "the blue square"], out, start=start, note=notes.append)
    statuses = {str(p.relative_to(out)): s for p, s in again().items()}
    assert {k: v for k, v in statuses.items() if k.startswith("toy")} == dict.fromkeys(
        [f"{name}/the-{colour}-square" for name in ("toy", "toy.mp4") for colour in ("green", "blue")], "ok"
    )
    assert {v for k, v in statuses.items() if not k.startswith("toy")} == {"unreadable"} and len(statuses) == 8 and not left_over(out)
    damaged, text = answer(out / "damaged/the-blue-square"), answer(out / "text/the-blue-square")
    assert "00015.png is not a readable image" in damaged["error"] and damaged["completion"] and damaged["num_frames"] == 19
    assert "not a readable video" in text["error"] and text["completion"] is None and [p.name for p in (out / "text/the-blue-square").iterdir()] == ["answer.json"]

    done = {p: p.stat().st_mtime_ns for p in out.glob("toy*/*/answer.json")}
    mp4(batch / "text.mp4", 516)
    Image.fromarray(make_video(518).frame(15)).save(batch / "damaged/00015.png")
    assert set(again().values()) == {"ok"} and any(n.startswith("4 of 8 queries were finished before") for n in notes) and len(numbers(out / "damaged/the-blue-square")) == 19
    assert {p: p.stat().st_mtime_ns for p in done} == done and not left_over(out)

    never = lambda policy: pytest.fail("something was started")
    assert set(segment_videos(policy, find_videos(batch), ["the blue square"], out, start=never).values()) == {"ok"}
    with pytest.raises(UserError, match="answer with settings"):
        segment_videos(find_policy(overrides=[*TOY_MODELS, "prompt.reference_frames=2"]), find_videos(batch), ["the blue square"], out, start=never)
    with pytest.raises(UserError, match="answer with video"):
        segment_videos(policy, [frame_folder(tmp_path / "toy", 518)], ["the blue square"], out, start=never)


def test_a_fault_leaves_nothing_half_made(policy, start, batch, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(segment_output, "write_video", full)
        with pytest.raises(OSError, match="no space"):
            segment_videos(policy, [batch / "toy"], ["the green square"], tmp_path / "out", start=start)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert set(segment_videos(policy, [batch / "toy"], ["the green square"], tmp_path / "out", start=start).values()) == {"ok"}


# ---- frames ----


def test_htfs_gives_each_query_its_frames_and_frames_are_tracked_from_there(policy, start, tmp_path, monkeypatch):
    clip = mp4(tmp_path / "clip.mp4", 509)  # 48 frames

    def ask(looks):
        replies = {"the yellow circle": '{"start": 10, "end": 30, "percent": 50}', "the green square": '{"start": 60, "end": 80, "percent": 150}'}
        return [[replies[look.query]] * len(look.seeds) for look in looks]

    @contextmanager
    def scripted(config):
        yield lambda episodes: HTFS(config.htfs, ask, "a script", config.key_frames, config.reference_frames)

    monkeypatch.setattr(segment, "sampler_for", scripted)
    sampling = Sampling.of("htfs", ["htfs.unit=percent", "htfs.rounds=0", "key_frames=2", "reference_frames=2"])
    notes = []
    statuses = segment_videos(policy, [clip], ["the yellow circle", "the green square"], tmp_path / "out", sampling, start=start, note=notes.append)
    first, second = map(answer, statuses)
    assert "fall-backs: 5 position_clipped" in notes and (first["fallbacks"], second["fallbacks"]) == ({}, {"position_clipped": 5})
    assert (first["target_frame"], second["target_frame"]) == (10, 38) and first["key_segment"] == [5, 15] and first["shown_frames"] == [0, 5, 14, 47]
    for place in statuses:
        assert len(numbers(place)) == 48
    with pytest.raises(UserError, match="prompts would show 9 frames") as error:
        segment_videos(policy, [clip], ["the yellow circle"], tmp_path / "out", Sampling.of("htfs"), start=start)
    assert "rollout.max_images=9" in error.value.remedy


def test_the_first_frame_can_be_the_target(policy, start, tmp_path):
    (place,) = segment_videos(policy, [frame_folder(tmp_path / "toy", 516)], ["the blue square"], tmp_path / "out", Sampling.of("first"), start=start)
    assert answer(place)["target_frame"] == 0 and np.mean([m.any() for m in numbers(place)]) == 1


# ---- names ----


def test_every_query_has_a_folder_name_of_its_own():
    assert folder_name("the red circle") == "the-red-circle"
    names = {q: folder_name(q) for q in ("The red circle", "the red circle?", "the  red circle", "the-red-circle", "../x", "?", "the " * 40, "der größte Kreis", "a/b", "a b/")}
    assert len(set(names.values())) == len(names) and "the-red-circle" not in names.values()
    assert all("/" not in n and n[0] not in ".-" and len(n.encode()) < 200 for n in names.values()) and names["der größte Kreis"].startswith("der-größte-kreis-")


# ---- the command ----


def test_the_command_and_its_exit_status(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(segment.segment_videos, "__defaults__", (*segment.segment_videos.__defaults__[:-1], lambda policy: nullcontext(model)))
    toy, out = frame_folder(tmp_path / "toy", 502), tmp_path / "out"
    assert cli.main(["segment", str(toy), "the green square", "--out", str(out), *TOY_MODELS, "--rle", "--no-overlay"]) == 0
    assert sorted(p.name for p in (out / "toy/the-green-square").iterdir()) == ["answer.json", "masks.json"] and "1 queries: 1 ok" in capsys.readouterr().out
    # a query may stand behind options and hold an equals sign
    assert cli.main(["segment", "--batch", str(tmp_path), *TOY_MODELS, "--out", str(out), "the green square", "x = 3.5"]) in (0, 3)
    assert answer(out / "toy" / folder_name("x = 3.5"))["query"] == "x = 3.5" and "1 of 2 queries were finished before" in capsys.readouterr().err
    (tmp_path / "text.mp4").write_text("no video")
    assert cli.main(["segment", str(tmp_path / "text.mp4"), "the green square", *TOY_MODELS, "--out", str(out)]) == 3
    printed = capsys.readouterr()
    assert "unreadable: " in printed.err and "error: " in printed.err and "1 queries: 1 unreadable" in printed.err and "remedy: answer.json" in printed.err
    with saying(model, "Hm."):
        assert cli.main(["segment", str(toy), "what?", *TOY_MODELS, "--out", str(out)]) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no video is given"),
        (["{toy}"], "a video and a query are needed"),
        (["{toy}", "  "], "a query is empty"),
        (["{toy}", "<|image_pad|>"], "media token"),
        (["nowhere.mp4", "q"], "nowhere.mp4: no such video"),
        (["q", "--batch", "{toy}"], "it holds images, so it is one video"),
        (["q", "--batch", "{toy}/../none"], "no such folder"),
        (["{toy}", "q", "--policy", "./none"], "--policy = './none': no such file"),
        (["{toy}", "q", "--policy", "{toy}"], "holds no config.json"),
        (["{toy}", "q", "--config", "debgu"], "did you mean debug?"),
        (["{toy}", "q", "promt.max_tokens=3"], "did you mean prompt"),
        (["{toy}", "q", "--sampler", "midle"], "there is no sampler 'midle'"),
        (["{toy}", "q", "sampler.seed=3"], "the sampler middle has no settings"),
        (["{toy}", "q", "--sampler", "htfs", "sampler.htfs.delt=3"], "did you mean htfs.delta"),
        (["{toy}", "q", "--fps", "0"], "frames a second are a number above 0"),
        (["{toy}", "q", "segmentation.propagation.checkpoint=null"], "nothing carries masks"),
        (["{toy}", "q", "cluster.device=cuda"], "there is no CUDA GPU here"),
    ],
)
def test_what_a_person_can_mend_is_said_before_anything_starts(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(config_resolve, "detect_hardware", lambda: config_resolve.Hardware(cores=2))
    toy = frame_folder(tmp_path / "toy", 502)
    given = [a.format(toy=toy) for a in arguments]
    assert cli.main(["segment", *given, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed and not (tmp_path / "out").exists()
