"""Episodes read piecewise, in random order, from several data sets: compared with plain lists and restated rules."""

import gc
import os
import tracemalloc
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import file_hashes as hashing
from rollout.dataset import EpisodeDataset, has_target_frame
from rollout.episodes import SCHEMA, Annotation, DataError, Episode, TargetObject, read_episodes, write_episodes
from rollout.file_hashes import file_hashes
from rollout.mixture import BLOCK, Mixture, block_shares
from rollout.order import ShuffledOrder


def episode(name, areas=(60,), frames=(0, 1), size=(20, 30), query="the thing"):
    """An episode whose objects each have an annotation of the given area in frame 0, or (frame, area) pairs."""
    annotations = [[(0, a)] if isinstance(a, int) else a for a in areas]
    objects = tuple(TargetObject(str(n), tuple(Annotation(t, "x" * 8, a, (0, 0, 1, 1), (0, 0)) for t, a in own)) for n, own in enumerate(annotations))
    return Episode(name, "test", "train", f"video of {name}", "frames/v", *size, 4, 8.0, query, None, frames, objects)


@pytest.fixture
def folder(tmp_path):
    """Two shards of 25 and 10 episodes in row groups of 4; every third one shows too little of its target."""
    names = iter(range(35))
    for shard, count in (("a", 25), ("b", 10)):
        episodes = [episode(f"e{i}", (0 if i % 3 == 0 else 60,)) for i in (next(names) for _ in range(count))]
        write_episodes(episodes, tmp_path / f"{shard}.parquet", rows_per_group=4)
    return tmp_path


def test_any_episode_by_its_number_equals_reading_all(folder):
    for path, read in ((folder, [folder]), (folder / "b.parquet", [folder / "b.parquet"]), ([folder / "b.parquet", folder, folder / "b.parquet"],) * 2):
        everything = [e for p in read for e in read_episodes(p)]
        assert list(EpisodeDataset(path)) == everything == [EpisodeDataset(path)[i] for i in range(len(everything))]
        usable = [e for e in everything if e.target_frames(0.01)]
        dataset = EpisodeDataset(path, min_share=0.01, cache_bytes=1)
        assert 0 < len(dataset) == len(usable) < len(everything) and list(dataset) == usable
        assert [dataset[i] for i in reversed(range(len(usable)))] == usable[::-1]
        assert dataset.group_rows.sum() == len(usable)
        ids = {"e5", "e7", "e30", "e33", "e999"}
        assert list(EpisodeDataset(path, min_share=0.01, only=ids)) == [e for e in usable if e.episode_id in ids]
        assert list(EpisodeDataset(path, only=ids)) == [e for e in everything if e.episode_id in ids]
    with pytest.raises(IndexError, match="episode 23 of 23"):
        EpisodeDataset(folder, min_share=0.01)[23]


def test_projection_reads_only_what_is_asked_for(folder):
    dataset = EpisodeDataset(folder, min_share=0.01)
    rows = list(dataset.project("episode_id", "objects.annotations.area").rows())
    assert [r["episode_id"] for r in rows] == [e.episode_id for e in dataset]
    assert rows[3] == {"episode_id": "e5", "objects": [{"annotations": [{"area": 60}]}], "root": str(folder)}
    assert dataset.project("query").row(2) == {"query": "the thing", "root": str(folder)}
    with pytest.raises(DataError, match="no column qery; the columns are episode_id, "):
        dataset.project("qery")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 9)), max_size=3, unique_by=lambda a: a[0]), max_size=3), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.05, 0.1]),
)
def test_usable_rows_are_those_with_a_target_frame(objects, min_share):
    episodes = [episode(str(n), areas, frames=(0, 1, 2) if n % 2 or areas else (), size=(10, 10)) for n, areas in enumerate(objects)]
    rows = [{name: getattr(e, name) for name in ("height", "width", "annotated_frames")} for e in episodes]
    rows = [r | {"objects": [{"annotations": [{"frame": a.frame, "area": a.area} for a in o.annotations]} for o in e.objects]} for r, e in zip(rows, episodes)]
    pairs = pa.list_(pa.struct([("frame", pa.int32()), ("area", pa.int32())]))
    schema = pa.schema([*(SCHEMA.field(n) for n in ("height", "width", "annotated_frames")), ("objects", pa.list_(pa.struct([("annotations", pairs)])))])
    assert has_target_frame(pa.Table.from_pylist(rows, schema), min_share).tolist() == [bool(e.target_frames(min_share)) for e in episodes]


def test_small_data_sets_keep_the_order_of_recorded_runs(folder):
    """The rule of the runs that docs/toy-run.md records: a permutation of the usable rows from (seed, epoch)."""
    mixture = Mixture([EpisodeDataset(folder, min_share=0.01)], [1.0], seed=5)
    usable = [e for e in read_episodes(folder) if e.target_frames(0.01)]
    for position in [*range(60), 10**6, BLOCK - 1, BLOCK]:
        old = usable[np.random.default_rng([5, position // 23]).permutation(23)[position % 23]]
        assert mixture[mixture.at(position)] == old


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any), st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(0, 10**9))
def test_every_epoch_is_a_permutation_window_by_window(group_rows, seed, window, epoch):
    order, count = ShuffledOrder(group_rows, seed, window), sum(group_rows)
    drawn = [order[epoch * count + i] for i in range(count)]
    assert sorted(drawn) == list(range(count))
    asked_backwards = ShuffledOrder(group_rows, seed, window)
    assert [asked_backwards[epoch * count + i] for i in reversed(range(count))] == drawn[::-1]
    groups = np.searchsorted(np.cumsum(group_rows), drawn, side="right").tolist()
    visits = {g: (groups.index(g), len(groups) - groups[::-1].index(g)) for g in set(groups)}
    for place in range(count):  # a reader that holds `window` row groups reads each of them once an epoch
        assert sum(first <= place < last for first, last in visits.values()) <= window


def test_windows_mix_and_epochs_and_seeds_differ():
    orders = [[order[p] for p in range(start, start + 1000)] for order in (ShuffledOrder([10] * 100, 0, 8), ShuffledOrder([10] * 100, 1, 8)) for start in (0, 1000)]
    assert len({tuple(o) for o in orders}) == 4
    groups = np.array(orders[0]) // 10
    assert (np.diff(groups) == 0).mean() < 0.25  # rows of a group are not neighbours: 9/79 by chance
    starts = [groups[i : i + 80] for i in range(0, 960, 80)]
    assert all(len(set(s)) == 8 for s in starts) and not any(set(a) & set(b) for a, b in pairwise(starts))
    assert len({min(s) for s in starts}) > 6 and max(np.ptp(s) for s in starts) > 20  # a window's groups come from everywhere


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8))
def test_shares_are_the_weights_to_the_nearest_draw(weights):
    shares = block_shares(weights)
    assert shares.sum() == BLOCK and np.abs(shares - np.array(weights) / sum(weights) * BLOCK).max() < 1


def test_ratios_and_percentages_are_exact_and_a_weight_without_a_draw_is_refused():
    assert block_shares([2, 1]).tolist() == [16800, 8400] and block_shares([0.35, 0.6, 0.05]).tolist() == [8820, 15120, 1260]
    with pytest.raises(DataError, match="weight 0.001 of 100.001 is less than one draw in 25200"):
        block_shares([100, 0.001])


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=3), st.integers(0, 1000), st.integers(0, 2))
def test_a_mixture_is_each_data_sets_own_order_in_its_share(tmp_path_factory, weights, seed, block):
    tmp = tmp_path_factory.mktemp("mixed")
    datasets = []
    for n in range(len(weights)):
        write_episodes([episode(f"{n}/{i}") for i in range(5 + n)], tmp / f"{n}.parquet", rows_per_group=2)
        datasets.append(EpisodeDataset(tmp / f"{n}.parquet"))
    mixture, shares = Mixture(datasets, weights, seed), block_shares(weights)
    start, first = block * BLOCK, np.cumsum([0] + [len(d) for d in datasets])
    drawn = [mixture.at(start + p) for p in range(3000)]
    which = np.searchsorted(first, drawn, side="right") - 1
    for n, dataset in enumerate(datasets):
        own, order = [i - first[n] for i, w in zip(drawn, which) if w == n], ShuffledOrder(dataset.group_rows, seed + n)
        assert own == [order[block * int(shares[n]) + j] for j in range(len(own))]  # goes on where the last block ended
        short = np.cumsum(which == n) - np.arange(1, 3001) * shares[n] / BLOCK
        assert np.abs(short).max() <= 1 + len(weights)  # on any stretch from the block's start
    resumed = Mixture(datasets, weights, seed)
    assert [resumed.at(start + p) for p in (2999, 17, 1234)] == [drawn[p] for p in (2999, 17, 1234)]
    last = [mixture.at(start + p) for p in range(BLOCK - 3000, BLOCK)]
    assert abs((np.searchsorted(first, last, side="right") == 1).sum() - 3000 * shares[0] / BLOCK) <= 1 + len(weights)
    assert mixture[len(mixture) - 1].episode_id == f"{len(weights) - 1}/{len(datasets[-1]) - 1}"
    with pytest.raises(IndexError):
        mixture[len(mixture)]


def test_fingerprint_follows_contents_and_shares(folder):
    plain = EpisodeDataset(folder).fingerprint
    assert plain == EpisodeDataset(str(folder), min_share=0.01).fingerprint != EpisodeDataset([folder / "a.parquet"] * 2).fingerprint
    a, b = EpisodeDataset(folder / "a.parquet"), EpisodeDataset(folder / "b.parquet")
    assert Mixture([a], [3], 0).fingerprint == a.fingerprint
    assert Mixture([a, b], [2, 1], 0).fingerprint == f"16800*{a.fingerprint}+8400*{b.fingerprint}" == Mixture([a, b], [4, 2], 1).fingerprint
    shard = folder / "b.parquet"
    data = bytearray(shard.read_bytes())
    data[60] ^= 1  # one bit of a page, which no footer tells of
    shard.write_bytes(data)
    assert EpisodeDataset(folder).fingerprint != plain
    assert EpisodeDataset(folder / "a.parquet").fingerprint == a.fingerprint


def test_hashes_of_large_files_are_remembered_until_the_file_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, small = tmp_path / "large", tmp_path / "small"
    file.write_bytes(b"a" * 100), small.write_bytes(b"b")
    first = file_hashes([file, small, file], large=100)
    assert first[file].hex().startswith("2816597888e4a0d3a36b82b83316ab32") and len(list(hashing.memory().iterdir())) == 1
    assert f"hashing {file}" in capsys.readouterr().err
    assert file_hashes([file, small], large=100) == first and capsys.readouterr().err == ""
    before = file.stat()
    file.write_bytes(b"c" * 100)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file_hashes([file], large=100)[file] == file_hashes([file])[file] != first[file]


def test_memory_stays_flat_however_often_a_shard_is_listed(tmp_path):
    """2,000 rows listed once and 100 times: draws all over the data set hold no more than the cache may."""
    shard, cache = tmp_path / "x.parquet", 200_000
    write_episodes([episode(f"e{i}", query="q" * 200) for i in range(2000)], shard, rows_per_group=50)
    size = pq.read_table(shard).nbytes
    peaks = {}
    for times in (1, 100):
        gc.collect()
        tracemalloc.start()
        before, held = pa.total_allocated_bytes(), []
        dataset = EpisodeDataset([shard] * times, min_share=0.01, cache_bytes=cache)
        order = ShuffledOrder(dataset.group_rows, seed=0, window_groups=8)
        for position in [*range(0, 2 * len(dataset), len(dataset) // 30), *range(100)]:
            assert dataset[order[position]].query == "q" * 200
            held.append(pa.total_allocated_bytes() - before)
        peaks[times] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(dataset) == 2000 * times and 0 < max(held) < cache + size / 10 < size / 2
    assert peaks[100] - peaks[1] < 400_000  # 24 bytes of bookkeeping for each of 3,960 more row groups, briefly several times
