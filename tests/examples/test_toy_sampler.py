"""The frame sampler's evidence in the toy world: what its teacher says is right, training sees HTFS's own prompts, the sums are right."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.sample_frames import load_settings
from examples.toy.sampler_evidence import chosen, summarise, wilson
from examples.toy.sampler_teacher import Teacher, areas_of, partly_visible
from examples.toy.train_sampler import SETTINGS, WORLD, examples_of
from rollout.episodes import TargetObject, annotate, read_episodes
from rollout.frame_samples import FrameSample
from rollout.htfs import HTFS, Look, key_segment
from rollout.htfs_vllm import look_prompt, read_images
from rollout.prompts import ImageChat
from rollout.toy_data import FPS, ToyDataConfig, toy_episode, video_of, write_toy_data
from rollout.toy_world import make_video
from tests.conftest import TOY

CONFIG = load_settings(str(SETTINGS), []).htfs


def search(episode, ask):
    """HTFS's sample for an episode, and the looks that it took."""
    looks = []
    sample = HTFS(CONFIG, lambda batch: looks.extend(batch) or ask(batch), "teacher").sample([episode])[0]
    return sample, looks


def test_the_teacher_leads_htfs_to_the_target():
    questions, found = set(), 0
    for seed in range(30):
        video = make_video(seed, WORLD)
        teacher, areas_TN = Teacher(video, CONFIG), areas_of(video)
        for number, query in enumerate(q for q in video.queries if partly_visible(teacher.visible(q))):
            sample, looks = search(toy_episode(video, number, query, "train"), teacher)
            area_T = areas_TN[:, query.targets].sum(1)
            assert area_T[sample.target_frame] >= 0.5 * area_T.max()
            assert set(sample.fallbacks) <= {"not_shrunk", "rounds_used_up"}  # every reply was read, and none was cut
            first = list(looks[0].frame_ids)
            start, end = key_segment([teacher.reply(looks[0])], (0, video.num_frames), FPS, "percent", Counter())
            named = [t for t in first if start <= t < end]
            assert (named[0], named[-1]) == (start, end - 1)  # V_key begins and ends with frames that were shown
            assert (area_T[named] >= 0.7 * area_T[first].max()).all()
            questions |= {look.question.rpartition("? ")[2] for look in looks}
            found += 1
    assert found > 40 and questions == {"when", "target"}


def test_the_teacher_names_nothing_where_nothing_is_to_be_seen():
    video = next(v for v in (make_video(seed, WORLD) for seed in range(100)) if (areas_of(v)[0] == 0).any())
    absent = int((areas_of(video)[0] == 0).argmax())
    query = next(q for q in video.queries if q.targets == (absent,))
    teacher, look = Teacher(video, CONFIG), Look("an episode", Path(), (0,), ("0.0%",), query.text, f"{query.text}? when", (1, 2))
    assert teacher.reply(look) is None
    fallbacks = Counter()
    assert key_segment(teacher([look])[0], (0, 8), FPS, "percent", fallbacks) == (0, 8)
    assert +fallbacks == {"interval_unread": 2, "no_interval": 1}


def test_training_sees_the_prompts_that_htfs_builds(tmp_path):
    """The same tokens as the sampler's model is given, and but for JPEG's loss the same pixels."""
    write_toy_data(tmp_path / "toy", ToyDataConfig(train=0, valid_u=6, valid=0, queries=1000, world=replace(WORLD, frames=(8, 12))), progress=lambda line: None)
    chat, compared = ImageChat(str(TOY / "policy")), 0
    for episode in (pair.target for pair in chosen(read_episodes(tmp_path / "toy/valid_u"))):
        video, _ = video_of(episode, replace(WORLD, frames=(8, 12)))
        examples = examples_of(video, chat, CONFIG, np.random.default_rng(0), partly=True)
        look = search(episode, Teacher(video, CONFIG))[1][0]
        shown = look_prompt(chat, look, read_images(look, CONFIG.max_pixels, chat.step))
        same = [e for e in examples if np.array_equal(e.prompt_ids, shown.token_ids)]
        assert same, look.question
        assert np.abs(np.stack(same[0].images).astype(int) - np.stack(shown.images)).mean() < 2
        compared += 1
    assert compared >= 2


def test_targets_are_in_view_in_part_and_have_another_shape_beside_them(toy_data):
    pairs = list(chosen(read_episodes(toy_data / "train")))
    assert len({pair.target.video_id for pair in pairs}) == len(pairs) > 0
    for pair in pairs:
        assert 0 < len(pair.target.target_frames()) / pair.target.num_frames <= 0.75
        assert pair.another.video_id == pair.target.video_id and pair.another.objects != pair.target.objects


def test_the_sums_of_the_evidence():
    video = make_video(3)
    empty = toy_episode(video, 0, video.queries[0], "validation")
    masks = np.zeros((3, empty.height, empty.width), bool)
    masks[1, :10, :20], masks[2, :10, :10] = True, True
    seen = tuple(filter(None, (annotate(t, mask) for t, mask in enumerate(masks))))
    episode = replace(empty, num_frames=3, annotated_frames=(0, 1, 2), objects=(TargetObject("0", seen),))
    samples = [FrameSample(t, segment, (), (), {"not_shrunk": t}) for t, segment in enumerate([(0, 3), (1, 2), (1, 3)])]
    result = summarise([episode] * 3, samples)
    assert result["shows_target"] == pytest.approx(2 / 3, abs=1e-4)
    assert result["area"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert result["key_segment"] == pytest.approx((3 + 1 + 2) / 9, abs=1e-4)
    assert result["fallbacks"] == {"not_shrunk": 3}
    assert result["interval"] == pytest.approx(wilson(2, 3), abs=1e-4)


def test_wilsons_interval():
    """Its ends are the shares p at which the observed one lies 1.96 standard errors of p away."""
    for hits, count in ((0, 20), (7, 20), (190, 200), (20, 20)):
        low, high = wilson(hits, count)
        assert low <= hits / count + 1e-12 and high >= hits / count - 1e-12 and high - low > 0.05
        for end in (low, high):
            assert (hits / count - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / count, abs=1e-12)
