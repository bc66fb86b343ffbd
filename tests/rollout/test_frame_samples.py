"""Frames that are shown, samplers that ask no model, and samples on disk: against brute force and hand-computed values."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rollout.episodes import DataError, Episode, TargetObject, annotate
from rollout.frame_samplers import Baseline
from rollout.frame_samples import FrameSample, FrameSamples, SampleRow, frames_to_show, nearest, read_samples, sample_key, video_fingerprint, write_samples
from segmentation_service.video import VideoError


def episode(name="e", video="v", num_frames=10, objects=(), **changes):
    values = dict(source="test", split="test", video_id=video, height=20, width=30, fps=8.0, query="the dog", difficulty=None)
    return Episode(episode_id=name, video=video, num_frames=num_frames, annotated_frames=tuple(range(0, num_frames, 2)), objects=objects, **values | changes)


def target(name, areas):
    """An object whose mask on frame t is a column of areas[t] pixels."""

    def mask(area):
        mask_HW = np.zeros((20, 30), bool)
        mask_HW[:area, 3] = True
        return mask_HW

    return TargetObject(name, tuple(a for t, area in areas.items() if (a := annotate(t, mask(area)))))


# ---- frames that are shown ----


def test_references_are_spread_over_what_the_key_segment_leaves():
    assert frames_to_show((30, 50), 100, 4, 4) == ((30, 36, 43, 49), (0, 26, 73, 99))
    assert frames_to_show((0, 5), 8, 2, 4) == ((0, 4), (5, 6, 7))  # three frames are left
    assert frames_to_show((0, 8), 8, 4, 4) == ((0, 2, 5, 7), ())  # none is left
    assert frames_to_show((7, 8), 8, 4, 0) == ((7,), ())


@settings(deadline=None)
@given(st.integers(1, 200), st.data(), st.integers(0, 12), st.integers(0, 12))
def test_frames_shown_are_where_they_should_be(num_frames, data, key_frames, reference_frames):
    start = data.draw(st.integers(0, num_frames - 1))
    end = data.draw(st.integers(start + 1, num_frames))
    inside, outside = frames_to_show((start, end), num_frames, key_frames, reference_frames)
    assert set(inside) <= set(range(start, end)) and set(outside) <= set(range(num_frames)) - set(range(start, end))
    assert len(inside) == min(key_frames, end - start) and len(outside) == min(reference_frames, num_frames - (end - start))
    assert list(inside) == sorted(inside) and list(outside) == sorted(outside)


@settings(deadline=None)
@given(st.integers(-5, 60), st.sets(st.integers(0, 50), min_size=1))
def test_nearest(t, frames):
    best = min(abs(f - t) for f in frames)
    assert nearest(t, sorted(frames)) == min(f for f in frames if abs(f - t) == best)


# ---- samplers that ask no model ----


def sampled(name, episodes, **options):
    return [(s.target_frame, dict(s.fallbacks)) for s in Baseline(name, episodes, **options).sample(episodes)]


def test_first_and_middle():
    episodes = [episode("a", num_frames=10), episode("b", num_frames=7), episode("c", num_frames=1)]
    assert sampled("first", episodes) == [(0, {})] * 3 and sampled("middle", episodes) == [(5, {}), (3, {}), (0, {})]
    (sample, *_) = Baseline("middle", episodes, shown=4).sample(episodes)
    assert sample.segment == (0, 10) and sample.shown == [0, 3, 6, 9]


def test_uniform_spreads_the_queries_of_a_video_over_it():
    episodes = [episode("a", "v", 10), episode("x", "w", 9), episode("b", "v", 10), episode("c", "v", 10), episode("d", "v", 10)]
    assert [t for t, _ in sampled("uniform", episodes)] == [1, 4, 3, 6, 8]  # 10/8, 9/2, 30/8, 50/8, 70/8


def test_random_is_even_and_depends_on_seed_and_episode_alone():
    episodes = [episode(f"e{i}", num_frames=5) for i in range(2000)]
    drawn = [t for t, _ in sampled("random", episodes)]
    assert drawn[::-1] == [t for t, _ in sampled("random", episodes[::-1])] and drawn != [t for t, _ in sampled("random", episodes, seed=1)]
    counts = Counter(drawn)
    assert set(counts) == set(range(5)) and all(abs(n - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5 for n in counts.values())


def test_the_oracle_sees_where_the_targets_are_largest_together():
    both = episode("both", objects=(target("1", {0: 5, 2: 9, 4: 6}), target("2", {4: 4, 6: 10, 8: 3})))
    absent, hidden = episode("absent"), episode("hidden", objects=(target("1", {}),))
    assert sampled("oracle", [both, absent, hidden]) == [(4, {}), (5, {"nothing_visible": 1}), (5, {"nothing_visible": 1})]  # 10 at 4 and 6


# ---- samples on disk ----


def write_video(root, shades):
    (root / "v").mkdir(parents=True)
    for t, shade in enumerate(shades):
        Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(root / "v" / f"{t}.png")
    return episode(num_frames=5, root=str(root))


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path, range(5))


def row(video, **changes):
    sample = FrameSample(3, (1, 4), (1, 3), (0, 4), {"not_shrunk": 2}, (("a", "b"), ('{"percent": 40}',)))
    about = '["htfs"]'
    values = dict(key=sample_key(video, about), episode_id=video.episode_id, query=video.query, video_fingerprint=video_fingerprint(video.video_path))
    return SampleRow(**values | changes, sampler=about, sample=sample)


def test_samples_come_back_as_they_were(video, tmp_path):
    file = tmp_path / "out" / "samples.parquet"
    rows = [row(video), replace(row(video), episode_id="other", sample=FrameSample(0, (0, 5), (), (), {}))]
    write_samples(rows, file)
    assert read_samples(file) == rows and [f.name for f in file.parent.iterdir()] == ["samples.parquet"]
    assert FrameSamples(file).of(video) == rows[0].sample and rows[0].sample.shown == [0, 1, 3, 4] and FrameSamples(file).most_shown == 4


def test_samples_of_something_else_are_refused(video, tmp_path):
    file = tmp_path / "samples.parquet"
    for changes, message in (
        (dict(episode_id="other"), "episode e has no sample"),
        (dict(query="the cat"), "asks 'the dog', its sample was made for 'the cat'"),
        (dict(video_fingerprint="0"), "not the video that its sample was made for"),
    ):
        write_samples([row(video, **changes)], file)
        with pytest.raises(DataError, match=message):
            FrameSamples(file).of(video)
    pq.write_table(pq.read_table(file).drop_columns(["replies"]), file)
    with pytest.raises(DataError, match="no frame samples of this version"):
        FrameSamples(file)
    file.write_text("nothing")
    with pytest.raises(DataError, match="not a readable file of frame samples"):
        FrameSamples(file)


def test_the_key_sees_all_that_a_sample_depends_on(video, tmp_path):
    keys = [sample_key(video, "a"), sample_key(video, "b")]
    keys += [sample_key(replace(video, **change), "a") for change in (dict(query="the cat"), dict(episode_id="f"), dict(num_frames=4), dict(fps=4.0))]
    keys += [sample_key(write_video(tmp_path / str(i), shades), "a") for i, shades in enumerate(([0, 1, 2, 3, 7], [9, 1, 2, 3, 4], range(6)))]
    assert len(set(keys)) == len(keys)
    assert sample_key(write_video(tmp_path / "elsewhere", range(5)), "a") == keys[0]


def test_the_fingerprint_of_a_file(tmp_path):
    content, seen = bytearray(np.random.default_rng(0).bytes(5 * 2**20)), set()
    for change in (None, 0, len(content) // 2 + 5, len(content) - 1):
        changed = bytearray(content)
        if change is not None:
            changed[change] ^= 1
        (tmp_path / f"{change}.mp4").write_bytes(changed)
        seen.add(video_fingerprint(tmp_path / f"{change}.mp4"))
    assert len(seen) == 4
    with pytest.raises(VideoError, match="no such video file or folder"):
        video_fingerprint(Path("nowhere"))
