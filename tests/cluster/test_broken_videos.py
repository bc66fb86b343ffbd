"""Draws of episodes whose videos are files or broken, or whose prompts are too long: who takes whose place follows from the data alone, and is counted."""

import os
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from cluster.draws import SUBSTITUTES, Draws
from cluster.errors import DataError
from cluster.sections import DataConfig
from rollout.episodes import read_episodes, write_episodes
from rollout.order import substitute_at
from rollout.prompts import PromptBuilder, PromptConfig
from segmentation_service.video import open_video
from tests.conftest import TOY

COUNT = 24


@pytest.fixture(scope="module")
def builder():
    return PromptBuilder(str(TOY / "policy"), PromptConfig(reference_frames=3, reference_size=[56, 56], target_size=[112, 112]))


@pytest.fixture
def drawing(builder):
    """Makes draws; their decoders end with the test."""
    made = []

    def make(folder, **changes):
        made.append(Draws(str(folder), builder, DataConfig(**{"decoders": 2, "frame_cache_gb": 0.05} | changes), seed=3))
        return made[-1]

    yield make
    for draws in made:
        draws.close()


@pytest.fixture(scope="module")
def whole(toy_data, builder):
    """The draws of the sound data set."""
    draws = Draws(str(toy_data / "train"), builder, DataConfig(), seed=3)
    yield draws.batch(range(COUNT))
    draws.close()


@pytest.fixture
def copy(toy_data, tmp_path):
    return shutil.copytree(toy_data / "train", tmp_path / "data")


def identity(draw):
    return draw.episode.episode_id, draw.prompt.fingerprint, draw.prompt.target_frame


def test_draws_do_not_depend_on_who_decodes_nor_on_when(whole, toy_data, drawing):
    one = drawing(toy_data / "train", decoders=1, frame_cache_gb=0.0)
    assert [identity(one.train(p)) for p in reversed(range(COUNT))] == [identity(d) for d in reversed(whole)]
    assert not any(d.replaced for d in whole)


def test_video_files_are_as_good_as_folders(whole, copy, drawing):
    """The same episodes with losslessly encoded files: the same prompts, to the last bit."""
    episodes = list(read_episodes(copy))
    for path in {e.video_path for e in episodes}:
        video = open_video(path)
        with av.open(str(path.with_suffix(".mkv")), "w") as out:
            stream = out.add_stream("ffv1", rate=8)
            (stream.height, stream.width), stream.pix_fmt = video.frame(0).shape[:2], "bgr0"
            for i in range(len(video)):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(video.frame(i), format="rgb24")))
            out.mux(stream.encode())
        shutil.rmtree(path)
    write_episodes((replace(e, video=f"{e.video}.mkv") for e in episodes), copy / "episodes.parquet")
    draws = drawing(copy).batch(range(COUNT))
    assert [identity(d) for d in draws] == [identity(d) for d in whole]
    np.testing.assert_array_equal(draws[0].video.frame(2), whole[0].video.frame(2))


def damage(episode, how):
    frames = sorted(episode.video_path.iterdir())
    if how == "missing frame":
        frames[1].unlink()
    elif how == "broken frames":
        for frame in frames:
            frame.write_bytes(frame.read_bytes()[:900])
    elif how == "other size":
        for frame in frames:
            Image.open(frame).resize((60, 40)).save(frame)
    elif how == "no frames":
        for frame in frames:
            frame.unlink()
    elif how == "gone":
        shutil.rmtree(episode.video_path)
    elif how == "hangs":  # a pipe into which nobody writes
        for frame in frames:
            frame.unlink()
            os.mkfifo(frame)


def hurry(draws, hanging):
    """A short time limit, which the sound videos need not fear on a busy machine: their frames are in the cache."""
    for path, count in {e.video_path: e.num_frames for e in draws.episodes}.items():
        if path != hanging.video_path:
            draws.decoders.frames(path, range(count)).result()
    draws.decoders.seconds = 0.5


def expected(position, episodes, broken):
    """The rule, written once more: the episode of the permutation, else the first substitute whose video is sound; and who was passed over."""
    passed = []
    for attempt in range(SUBSTITUTES + 1):
        at = substitute_at(position, attempt, len(episodes), 3) if attempt else np.random.default_rng([3, position // len(episodes)]).permutation(len(episodes))[position % len(episodes)]
        if episodes[at].video not in broken:
            return episodes[at].episode_id, passed
        passed.append(episodes[at].episode_id)


@pytest.mark.parametrize("how", ["missing frame", "broken frames", "other size", "no frames", "gone", "hangs"])
def test_a_broken_video_moves_nobody_else(whole, copy, drawing, how):
    data = drawing(copy)
    victim = replace(whole[0].episode, root=str(copy))
    damage(victim, how)
    if how == "hangs":
        hurry(data, victim)
    draws = data.batch(range(COUNT))
    lost = 0
    for sound, draw in zip(whole, draws, strict=True):
        name, passed = expected(draw.position, data.episodes, {victim.video})
        assert draw.episode.episode_id == name and [e.episode_id for e in draw.replaced] == passed
        assert {e.kind for e in draw.replaced} <= {"slow" if how == "hangs" else "unreadable"}
        if sound.episode.video != victim.video:
            assert identity(draw) == identity(sound) and not passed
        lost += len(passed)
    assert lost
    again = drawing(copy)
    again.slow = dict(data.slow)  # as a checkpoint keeps it
    assert [identity(again.train(p)) for p in (7, 0)] == [identity(draws[p]) for p in (7, 0)]


def test_a_slow_video_is_waited_for_once_and_again_where_more_time_is_allowed(whole, copy, drawing):
    victim = replace(whole[0].episode, root=str(copy))
    sound = shutil.copytree(victim.video_path, copy / "sound")
    damage(victim, "hangs")
    data = drawing(copy)
    hurry(data, victim)
    data.train(0)
    assert data.slow == {str(victim.video_path): 60.0}
    shutil.rmtree(victim.video_path)
    sound.rename(victim.video_path)
    assert data.train(0).replaced[0].reason.endswith("was not decoded within 60 s before")
    patient = drawing(copy, decode_seconds=90.0)
    patient.slow = dict(data.slow)
    assert identity(patient.train(0)) == identity(whole[0])


def test_held_out_episodes_with_broken_videos_are_left_out(copy, drawing):
    data = drawing(copy)
    sound, none = data.held_out(6)
    assert len(sound) == 6 and not none
    damage(sound[2].episode, "gone")
    rest, broken = drawing(copy).held_out(6)
    gone = [d for d in sound if d.episode.video == sound[2].episode.video]
    assert [identity(d) for d in rest] == [identity(d) for d in sound if d not in gone]
    assert [(b.episode_id, b.kind) for b in broken] == [(d.episode.episode_id, "unreadable") for d in gone]


def test_episodes_whose_prompts_are_too_long_are_left_out(whole, copy, drawing):
    """In training another one stands in, as for a broken video; in evaluations nobody does."""
    victim = whole[0].episode.episode_id
    episodes = [replace(e, query=e.query * 9000) if e.episode_id == victim else e for e in read_episodes(copy)]
    write_episodes(episodes, copy / "episodes.parquet")
    draws = drawing(copy)
    first, rest = draws.train(0), draws.batch(range(1, 6))
    assert [(e.episode_id, e.kind) for e in first.replaced] == [(victim, "too_long")] and first.episode.episode_id != victim
    assert "more than prompt.max_tokens = 8192" in first.replaced[0].reason
    assert [identity(d) for d in rest if not d.replaced] == [identity(d) for d, now in zip(whole[1:6], rest) if not now.replaced]
    sound, left_out = draws.held_out(len(episodes))
    assert [e.episode_id for e in left_out] == [victim] and len(sound) == len(draws.episodes) - 1


def test_a_few_broken_videos_are_named_before_the_start_and_many_refuse_it(copy, drawing, capsys):
    data = drawing(copy)
    videos = sorted({e.video_path for e in data.episodes})
    (videos[3] / sorted(os.listdir(videos[3]))[2]).write_bytes(b"hello")
    data.check_videos(60)
    assert f"warning: {videos[3]}" in capsys.readouterr().err
    for video in videos[4:8]:
        shutil.rmtree(video)
    with pytest.raises(DataError, match="5 of 16 videos cannot be read") as error:
        data.check_videos(60)
    assert "data.max_broken_share" in error.value.remedy


def test_a_data_set_that_is_gone_is_an_error(copy, drawing):
    data = drawing(copy)
    for video in {e.video_path for e in data.episodes}:
        shutil.rmtree(video)
    with pytest.raises(DataError, match=f"{SUBSTITUTES + 1} episodes one after another cannot be used, last: .*no such video file, and no folder"):
        data.train(0)
