"""The toy world: deterministic, exact masks, unambiguous queries, splits that share nothing, a readable MeViS layout."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rollout.episodes import read_episodes
from rollout.toy_data import SPLITS, ToyDataConfig, video_of, write_toy_data
from rollout.toy_world import COLOURS, make_video
from segmentation_service.masks import decode_rle
from segmentation_service.video import open_video


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "toy"
    write_toy_data(out, ToyDataConfig(train=6, valid_u=3, valid=3), progress=lambda line: None)
    return out


def test_a_video_is_a_function_of_its_seed():
    a, b = make_video(5), make_video(5)
    assert a.queries == b.queries and a.num_frames == b.num_frames
    assert np.array_equal(a.frame(3), b.frame(3))
    assert not np.array_equal(a.frame(3), make_video(6).frame(3))


def test_masks_are_disjoint_and_show_the_shape_s_colour():
    for seed in range(20):
        video = make_video(seed)
        for t in (0, video.num_frames - 1):
            masks, frame = video.masks(t), video.frame(t).astype(int)
            assert masks.sum(0).max() <= 1
            for shape, mask in zip(video.shapes, masks):
                if mask.any():
                    assert np.abs(frame[mask] - COLOURS[shape.colour]).max() <= 0.15 * 255 + 1
            assert frame[~masks.any(0)].max() < 120  # the wall is dim


def test_all_levels_and_motions_occur_and_queries_hold_in_every_frame():
    texts = {}
    for seed in range(150):
        video = make_video(seed)
        assert 8 <= video.num_frames <= 48 and video.queries
        assert len({shape.name for shape in video.shapes}) == len(video.shapes)
        seen = np.stack([video.masks(t).any((1, 2)) for t in range(video.num_frames)])
        for query in video.queries:
            texts.setdefault(query.level, set()).add(query.text)
            (first, *_) = query.targets
            if query.text == "the shape that enters last":
                entry = [int(column.argmax()) for column in seen.T if column.any()]
                assert max(entry) == int(seen[:, first].argmax()) and entry.count(max(entry)) == 1
            if query.text == "the leftmost shape":
                x = np.stack([shape.centre_T2[:, 0] for shape in video.shapes])
                assert (x.argmin(0) == first).all()
            if query.text == "the shape that turns back":
                step = np.diff(video.shapes[first].centre_T2[:, 0])
                assert step.min() < 0 < step.max()
            if query.text == "both shapes that touch":
                assert len(query.targets) == 2
    assert texts["hard"] == {"the shape that turns back", "the shape that enters last", "the shape that leaves first", "both shapes that touch"}
    assert {"the largest square", "the leftmost shape"} <= texts["mid"] and "the red circle" in texts["easy"]


def test_written_episodes_hold_the_truth(toy):
    for folder, split in SPLITS.items():
        for episode in read_episodes(toy / folder):
            video, query = video_of(episode)
            assert episode.split == split and episode.num_frames == video.num_frames
            t = episode.target_frames()[0]
            truth = [mask for i, mask in enumerate(video.masks(t)) if i in query.targets and mask.any()]
            assert np.array_equal(episode.masks(t), np.stack(truth))
            frame = open_video(episode.video_path).frame(t)
            assert np.abs(frame.astype(int) - video.frame(t)).mean() < 4  # JPEG
            for annotation, mask in zip(episode.visible(t), truth):
                ys, xs = np.nonzero(mask)
                assert annotation.box == (xs.min(), ys.min(), xs.max(), ys.max())
                assert mask[annotation.point[1], annotation.point[0]]


def test_splits_share_no_video(toy):
    videos = [{e.video_id for e in read_episodes(toy / folder)} for folder in SPLITS]
    assert all(videos) and not (videos[0] & videos[1] or videos[0] & videos[2] or videos[1] & videos[2])


def test_mevis_layout(toy):
    meta = json.loads((toy / "train/meta_expressions.json").read_text())["videos"]
    masks = json.loads((toy / "train/mask_dict.json").read_text())
    episodes = {(e.video_id, e.query): e for e in read_episodes(toy / "train")}
    for vid, entry in meta.items():
        for name in entry["frames"]:
            assert (toy / "train/JPEGImages" / vid / f"{name}.jpg").exists()
        for expression in entry["expressions"].values():
            episode = episodes.pop((vid, expression["exp"]))
            t = episode.target_frames()[0]
            ours = episode.masks(t).any(0)
            theirs = [decode_rle(masks[str(a)][t]) for a in expression["anno_id"] if masks[str(a)][t]]
            assert np.array_equal(ours, np.any(theirs, 0))
    assert not episodes
    hidden = json.loads((toy / "valid/meta_expressions.json").read_text())["videos"]
    assert not (toy / "valid/mask_dict.json").exists()
    assert all("obj_id" not in e for entry in hidden.values() for e in entry["expressions"].values())


def test_an_existing_data_set_is_never_overwritten(toy):
    with pytest.raises(FileExistsError, match="exists already"):
        write_toy_data(toy)


def test_shuffled_queries_make_sense_and_tell_nothing(tmp_path):
    """A text names one shape of its video, each shape as often; what is meant, the frames and the masks stay."""
    config = ToyDataConfig(train=40, valid_u=1, valid=1)
    for name, shuffled in (("plain", False), ("shuffled", True)):
        write_toy_data(tmp_path / name, replace(config, shuffled=shuffled), progress=lambda line: None)
    right, chance = 0, 0.0
    for a, b in zip(*(read_episodes(tmp_path / name / "train") for name in ("plain", "shuffled"))):
        assert replace(b, query=a.query, root=a.root) == a
        video = make_video(int(b.video_id.removeprefix("toy_")))
        (asked,) = {q.targets for q in video.queries if q.text == b.query}
        assert len(asked) == 1
        if len(a.objects) == 1:
            right += str(asked[0]) == a.objects[0].object_id
            chance += 1 / len(video.shapes)
    assert abs(right - chance) < 0.25 * chance
