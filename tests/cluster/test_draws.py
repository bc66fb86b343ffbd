"""Which episodes a run draws: from one data set or several, the same after a resume, and not from a changed data set."""

from pathlib import Path

import numpy as np
import pytest

from cluster import config, config_files
from cluster.checkpoints import Checkpoint
from cluster.draws import Draws
from cluster.errors import CheckpointError, ConfigError, DataError, MissingFileError
from cluster.trainer import check_resumable
from rollout.episodes import read_episodes, write_episodes
from tests.conftest import TOY


def located(*overrides):
    models = [f"policy.path={TOY / 'policy'}", f"segmentation.checkpoint={TOY / 'sam2'}", "data.generate=null"]
    return config_files.locate(config.load("debug", [*models, *overrides]))


def mixed(toy_data, *more):
    train = f"data.train=[{{path: {toy_data / 'train'}, weight: 3}}, {{path: {toy_data / 'valid_u'}}}]"
    return located(train, f"data.evaluation={toy_data / 'valid'}", *more)


def test_one_data_set_is_drawn_as_in_the_recorded_runs(toy_data):
    draws, held_out = Draws.of_run(located(f"data.train={toy_data / 'train'}", f"data.evaluation={toy_data / 'valid_u'}", "run.seed=2"))
    usable = [e for e in read_episodes(toy_data / "train") if e.target_frames(0.001)]
    n = len(usable)
    for position in (0, 1, n - 1, n, 5 * n + 3):
        draw = draws.train(position)
        assert draw.episode == usable[np.random.default_rng([2, position // n]).permutation(n)[position % n]]
        frames = draw.episode.target_frames(0.001)
        t = frames[np.random.default_rng([2, position, 1]).integers(len(frames))]
        assert draw.target.masks.tolist() == draw.episode.masks(t).tolist()
    kept = [e for e in read_episodes(toy_data / "valid_u") if e.target_frames(0.001)]
    assert [d.episode for d in held_out.held_out(3)[0]] == [kept[int(i)] for i in np.linspace(0, len(kept) - 1, 3).round()]


def test_shuffled_queries_ask_for_each_target_of_the_video_as_often(toy_data):
    """The prompt shows the text of an episode of the same video, which asks for the episode's own target as often as for each other."""
    draws, _ = Draws.of_run(mixed(toy_data, "data.control=shuffled_queries"))
    videos = {}
    for folder in ("train", "valid_u"):
        for e in read_episodes(toy_data / folder):
            if e.target_frames(0.001):
                videos.setdefault((e.root, e.video_id), {}).setdefault(e.query, tuple(o.object_id for o in e.objects))
    own, chance = 0, 0.0
    for position in range(200):
        episode = draws.episodes[draws.episodes.at(position)]
        asked = videos[episode.root, episode.video_id]
        own += asked[draws._random_query(position, episode)] == asked[episode.query]
        chance += 1 / len(set(asked.values()))
    assert abs(own - chance) < 0.15 * chance
    draw = draws.train(3)
    text = draws._random_query(3, draw.episode)
    assert text in str(draw.prompt.text) and text == draws._random_query(3, draw.episode)


def test_a_mixture_draws_by_weight_and_resumes_exactly(toy_data):
    draws, _ = Draws.of_run(mixed(toy_data))
    roots = [draws.episodes.row(draws.episodes.at(p))["root"] for p in range(400)]
    assert 295 <= roots.count(str(toy_data / "train")) <= 305 and set(roots) == {str(toy_data / "train"), str(toy_data / "valid_u")}
    draws.check_videos(seconds=60)
    again = Draws.of_run(mixed(toy_data))[0]
    for position in (333, 7):
        one, other = draws.train(position), again.train(position)
        assert one.episode == other.episode and one.prompt.fingerprint == other.prompt.fingerprint


def test_a_changed_shard_or_weight_under_a_checkpoint_is_refused(toy_data, tmp_path):
    sets = [tmp_path / name for name in ("one", "two")]
    for path, folder in zip(sets, ("train", "valid_u")):
        write_episodes(read_episodes(toy_data / folder), path / "x.parquet")
    text = "data.train=[{{path: {}, weight: {}}}, {{path: {}}}]"
    made = lambda weight: Draws.of_run(located(text.format(sets[0], weight, sets[1]), f"data.evaluation={toy_data / 'valid'}"))[0]
    checkpoint = Checkpoint(2, Path("runs/x/checkpoints/step_000002"), {"data": made(3).fingerprint})
    check_resumable(checkpoint, made(3))
    check_resumable(None, made(1))
    with pytest.raises(CheckpointError, match=f"{sets[0]}, {sets[1]}: not the episodes, or not in the shares, of .*step_000002"):
        check_resumable(checkpoint, made(1))
    write_episodes(list(read_episodes(sets[1]))[:-1], sets[1] / "x.parquet")
    with pytest.raises(CheckpointError, match=f"^{sets[1]}: not the episodes.* was 18900\\*") as caught:
        check_resumable(checkpoint, made(3))
    assert "restore the data set" in caught.value.remedy


def test_a_broken_video_of_any_set_is_found_before_the_start(toy_data, tmp_path):
    video = toy_data / "valid_u" / next(iter(read_episodes(toy_data / "valid_u"))).video
    victim = sorted(video.iterdir())[1]
    whole = victim.read_bytes()
    try:
        victim.write_bytes(whole[:-30])
        draws = Draws.of_run(mixed(toy_data))[0]
        draws.data.max_broken_share = 0.0
        with pytest.raises(DataError, match=str(victim)):
            draws.check_videos(seconds=60)
        draws.close()
    finally:
        victim.write_bytes(whole)


def test_what_is_wrong_with_a_mixture_is_said_early(toy_data):
    wrong = {
        "[{pth: a}]": "pth: unknown key; did you mean path?",
        "[{path: a, weight: 0}]": "weight: 0 is out of range, allowed is above 0",
        "[{path: a, weight: .inf}]": "weight: inf is out of range",
        "[{weight: 2}]": "path: must be set",
        "[]": "names no data set",
        "[a, b]": "is not text or a list",
    }
    for text, message in wrong.items():
        with pytest.raises(ConfigError) as caught:
            config.load("debug", ["data.generate=null", f"data.train={text}"])
        assert "data.train: " in str(caught.value) and message in str(caught.value)
    with pytest.raises(ConfigError, match="data.generate: is toy, which makes one data set"):
        config.load("debug", ["data.train=[{path: a}]"])
    with pytest.raises(MissingFileError, match=r"data.train\[1\].path = 'nowhere': no such file"):
        located(f"data.train=[{{path: {toy_data}/train}}, {{path: nowhere}}]", f"data.evaluation={toy_data / 'valid'}")


def test_a_mixture_survives_being_written(toy_data, tmp_path):
    from cluster import config_dump

    settings = config.load("debug", ["data.generate=null", "data.train=[{path: a, weight: 2}, {path: b}]"])
    (tmp_path / "config.yaml").write_text(config_dump.dump_yaml(settings))
    assert config.load(tmp_path / "config.yaml").data == settings.data
    assert [(s.path, s.weight) for s in settings.data.train] == [("a", 2.0), ("b", 1.0)]
