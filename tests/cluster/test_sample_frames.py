"""`videoseg sample-frames`, and draws that follow its files: nothing is asked twice, and without a file nothing changes."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cluster import cli, config, config_files, sample_frames
from cluster.draws import Draws
from cluster.errors import ConfigError, DataError, UserError
from cluster.sample_frames import load_settings, sample_with
from rollout.episodes import DataError as EpisodesError
from rollout.episodes import read_episodes, write_episodes
from rollout.frame_samples import read_samples, write_samples
from rollout.htfs import HTFS, HTFSConfig
from rollout.order import target_frame_at, uniform_frames
from tests.cluster.test_loop import settings
from tests.rollout.tiny_policy import build_tiny_policy


@pytest.fixture
def data(toy_data):
    return toy_data / "valid"


class Asked:
    """A scripted model that counts its looks by episode; it fails for an episode named in `broken`."""

    def __init__(self):
        self.looks, self.broken = Counter(), None

    def __call__(self, looks):
        if self.broken in {look.episode_id for look in looks}:
            raise RuntimeError("the model is gone")
        self.looks.update(look.episode_id for look in looks)
        return [['{"start": 20, "end": 60, "percent": 25}'] * len(look.seeds) for look in looks]

    def new(self):
        asked, self.looks = self.looks, Counter()
        return asked


def run(asked, data, out, config=HTFSConfig(unit="percent", rounds=0), model="a model", batch=4, **options):
    return sample_with(lambda episodes: HTFS(config, asked, model, **options), data, out, batch)


def test_nothing_is_asked_twice_and_what_changed_is_asked_again(data, tmp_path):
    asked, out, episodes = Asked(), tmp_path / "samples.parquet", list(read_episodes(data))
    report = run(asked, data, out)
    assert (report.sampled, report.cached) == (len(episodes), 0) and asked.new() == {e.episode_id: 2 for e in episodes}
    assert report.fallbacks == {"rounds_used_up": len(episodes)}
    first = read_samples(out)
    assert [r.episode_id for r in first] == [e.episode_id for e in episodes] and list(tmp_path.iterdir()) == [out]
    for r, e in zip(first, episodes, strict=True):
        start, end = r.sample.segment
        assert (start, end) == (int(0.2 * e.num_frames + 0.5), int(0.6 * e.num_frames + 0.5) + 1) and r.sample.target_frame == start + (end - start) // 4
        assert json.loads(r.sampler)[1]["delta"] == 0.3
    assert (run(asked, data, out).sampled, asked.new(), read_samples(out)) == (0, {}, first)

    for changes in (dict(config=HTFSConfig(unit="percent", rounds=0, delta=0.2)), dict(model="another"), dict(seed=1), dict(key_frames=2)):
        assert run(asked, data, out, **changes).sampled == len(episodes) == len(asked.new()), changes
    run(asked, data, out), asked.new()
    (tmp_path / "changed").mkdir()
    moved = [replace(e, video=str(e.video_path)) for e in episodes]
    write_episodes([replace(moved[0], query="something else"), *moved[1:]], tmp_path / "changed" / "episodes.parquet")
    report = run(asked, tmp_path / "changed", out)
    assert (report.sampled, report.cached) == (1, len(episodes) - 1) and set(asked.new()) == {episodes[0].episode_id}


def test_a_command_that_was_stopped_goes_on(data, tmp_path, capsys):
    asked, out, names = Asked(), tmp_path / "samples.parquet", [e.episode_id for e in read_episodes(data)]
    asked.broken = names[5]
    with pytest.raises(RuntimeError, match="gone"):
        run(asked, data, out, batch=2)
    assert set(asked.new()) == set(names[:4]) and not out.exists()
    asked.broken = None
    report = run(asked, data, out)
    assert (report.sampled, report.cached) == (len(names) - 4, 4) and set(asked.new()) == set(names[4:])
    assert [r.episode_id for r in read_samples(out)] == names and list(tmp_path.iterdir()) == [out]
    assert f"{len(names) - 4}/{len(names) - 4} episodes sampled; fall-backs: " in capsys.readouterr().err


def test_the_command_with_a_sampler_that_asks_no_model(data, tmp_path, capsys):
    out = tmp_path / "first.parquet"
    assert cli.main(["sample-frames", str(data), str(out), "key_frames=1", "reference_frames=2", "--sampler", "first"]) == 0
    assert "episodes sampled, 0 kept; fall-backs: none" in capsys.readouterr().out
    rows = read_samples(out)
    assert {r.sample.target_frame for r in rows} == {0} and all(len(r.sample.shown) == 3 for r in rows)
    assert cli.main(["sample-frames", str(data), str(out), "--sampler", "oracle", "--show"]) == 0
    assert "sampler: oracle" in capsys.readouterr().out and read_samples(out) == rows


def test_bad_settings_and_places(data, tmp_path):
    with pytest.raises(ConfigError, match="did you mean htfs.delta"):
        load_settings(None, ["htfs.delt=0.2"])
    with pytest.raises(ConfigError, match="did you mean oracle"):
        load_settings(None, ["sampler=oracl"])
    with pytest.raises(ConfigError, match="htfs.interval_question: not a template"):
        load_settings(None, ["htfs.interval_question='{when}'"])
    with pytest.raises(UserError, match="beside the episodes"):
        run(Asked(), data, data / "samples.parquet")
    with pytest.raises(UserError, match="model = .*no such file or folder"):
        sample_frames.sample_data(data, tmp_path / "out.parquet", load_settings(None, ["model=./nowhere"]))


# ---- draws ----


def draws_of(toy_data, *more):
    return Draws.of_run(config_files.locate(config.load("debug", settings(toy_data, *more))))


def test_without_a_file_draws_are_as_ever(toy_data):
    train, held_out = draws_of(toy_data)
    for draw in [*(train.train(i) for i in range(6)), *held_out.held_out(3)[0]]:
        seed = train.seed if draw.episode in train.episodes else 0
        assert draw.prompt.target_frame == target_frame_at(draw.position, draw.episode.target_frames(0.001), seed)
        assert draw.prompt.frame_ids == tuple(uniform_frames(draw.episode.num_frames, 4))


def test_draws_follow_a_file(toy_data, tmp_path):
    run(Asked(), toy_data / "train", tmp_path / "train.parquet", key_frames=2, reference_frames=2)
    run(Asked(), toy_data / "valid_u", tmp_path / "valid.parquet", key_frames=2, reference_frames=2)
    files = f"data.train_frames={tmp_path}/train.parquet", f"data.evaluation_frames={tmp_path}/valid.parquet"
    plain, (train, held_out) = draws_of(toy_data), draws_of(toy_data, *files, "data.min_target_share=0.015")
    assert train.fingerprint.startswith(plain[0].fingerprint + "+") and train.fingerprint != held_out.fingerprint
    samples = {r.episode_id: r.sample for name in ("train", "valid") for r in read_samples(tmp_path / f"{name}.parquet")}
    snapped = 0
    for draw in [*(train.train(i) for i in range(20)), *held_out.held_out(6)[0]]:
        sample, t, visible = samples[draw.episode.episode_id], draw.prompt.target_frame, draw.episode.target_frames(0.015)
        assert draw.prompt.frame_ids == tuple(sample.shown) and t in visible
        assert abs(t - sample.target_frame) == min(abs(v - sample.target_frame) for v in visible)
        assert draw.target.masks.any() and np.array_equal(draw.target.masks, draw.episode.masks(t))
        snapped += t != sample.target_frame
    assert snapped
    train, _ = draws_of(toy_data, *files, "data.snap_target_frame=false")
    assert all(d.prompt.target_frame == samples[d.episode.episode_id].target_frame for d in map(train.train, range(20)))


def test_samples_that_cannot_be_used_are_refused(toy_data, tmp_path):
    file = tmp_path / "train.parquet"
    run(Asked(), toy_data / "train", file, key_frames=3, reference_frames=3)
    with pytest.raises(DataError, match="up to 6 frames besides the target frame, rollout.max_images leaves 4") as error:
        draws_of(toy_data, f"data.train_frames={file}")
    assert "rollout.max_images=7" in error.value.remedy
    with pytest.raises(UserError, match="data.train_frames = .*no such file"):
        draws_of(toy_data, "data.train_frames=./nowhere.parquet")
    train, _ = draws_of(toy_data, f"data.train_frames={file}", "rollout.max_images=7", "data.snap_target_frame=false")
    episode, rows = train.train(0).episode, read_samples(file)
    t = next(r.sample.target_frame for r in rows if r.episode_id == episode.episode_id)
    objects = tuple(replace(o, annotations=tuple(a for a in o.annotations if a.frame != t)) for o in episode.objects)
    changed = replace(episode, annotated_frames=tuple(f for f in episode.annotated_frames if f != t), objects=objects)
    with pytest.raises(DataError, match=f"its sampled target frame {t} is not annotated"):
        train._frames(0, changed)
    write_samples([r for r in rows if r.episode_id != episode.episode_id], file)
    with pytest.raises(EpisodesError, match=f"episode {episode.episode_id} has no sample; run `videoseg sample-frames`"):
        draws_of(toy_data, f"data.train_frames={file}", "rollout.max_images=7")


# ---- with vLLM ----


def test_a_real_model_is_asked_once(data, tmp_path, monkeypatch):
    """A tiny random model in vLLM: it babbles, so every fall-back of unread replies is taken and the middle of the video comes out."""
    from rollout.engine import RolloutEngine

    episodes = [replace(e, video=str(e.video_path)) for e in read_episodes(data)][:3]
    few = tmp_path / "few" / "episodes.parquet"
    write_episodes(episodes, few)
    changes = ["htfs.look_frames=4", "htfs.max_pixels=3136", "htfs.intervals=2", "htfs.positions=2", "htfs.rounds=0", "htfs.max_response_tokens=8"]
    engine = ["rollout.max_model_len=2048", "rollout.max_batched_tokens=2048", "rollout.max_sequences=8", "rollout.kv_cache_gb=0.25", "rollout.log_level=ERROR"]
    settings_ = load_settings(None, [f"model={build_tiny_policy(tmp_path / 'vlm')}", "device=cpu", *changes, *engine])
    out = tmp_path / "out" / "samples.parquet"
    report = sample_frames.sample_data(few, out, settings_)
    rows = read_samples(out)
    assert report.sampled == len(rows) == 3 and report.fallbacks == sum((Counter(r.sample.fallbacks) for r in rows), Counter())
    for r in rows:
        assert [len(replies) for replies in r.sample.replies] == [2, 2] and all(isinstance(t, str) for replies in r.sample.replies for t in replies)
        assert r.sample.replies[0][0] != r.sample.replies[0][1]  # drawn with seeds of their own
    assert report.fallbacks["interval_unread"] == 6 and [r.sample.target_frame for r in rows] == [e.num_frames // 2 for e in episodes]

    async def never(self):
        raise AssertionError("the model was started again")

    monkeypatch.setattr(RolloutEngine, "ready", never)
    assert sample_frames.sample_data(few, out, settings_).cached == 3
    build_tiny_policy(tmp_path / "vlm", seed=1)
    with pytest.raises(AssertionError, match="started again"):  # other weights, other samples
        sample_frames.sample_data(few, out, settings_)
