"""Memory: the fast read equals the formula, late cohorts, eviction, the corrected store, and bounded buffers."""

import random

import pytest
import torch

import segmentation_service.xmem.memory as memory_module
from plain_xmem import PlainMemory
from segmentation_service.xmem import XMemConfig
from segmentation_service.xmem.memory import ElementTable, MemoryBank, XMemMemory
from segmentation_service.xmem.reading import BLOCK, memory_rows, query_rows, top_k

KEY, VALUE, HW = 6, 5, (3, 4)
ELEMENTS = HW[0] * HW[1]


def frame(seed, objects):
    """Key, shrinkage, selection and values of a frame."""
    g = torch.Generator().manual_seed(seed)
    key, selection = torch.randn(1, KEY, *HW, generator=g), torch.rand(1, KEY, *HW, generator=g)
    return key, 1 + torch.rand(1, 1, *HW, generator=g), selection, torch.randn(objects, VALUE, *HW, generator=g)


@pytest.mark.parametrize("columns", [40, 4 * 5 * BLOCK, 4 * 5 * BLOCK + 13, 3000])
def test_top_k_is_that_of_torch(columns):
    scores = torch.randn(7, columns)
    scores[:, :4] = 5.0  # ties
    values, places = top_k(scores, 5)
    assert torch.equal(values.sort(1).values, scores.topk(5, dim=1).values.sort(1).values)
    assert torch.equal(scores.gather(1, places), values)
    assert all(len(set(row)) == 5 for row in places.tolist())


def test_similarity_is_the_formula():
    key, shrinkage, query, selection = torch.randn(9, KEY), 1 + torch.rand(9, 1), torch.randn(4, KEY), torch.rand(4, KEY)
    got = query_rows(query, selection) @ memory_rows(key, shrinkage).T
    distance = (selection[:, None] * (key[None] - query[:, None]) ** 2).sum(2)
    torch.testing.assert_close(got, -shrinkage.T * distance / KEY**0.5, atol=1e-5, rtol=1e-5)


def dense_read(frames, objects, key, selection, top):
    """The read as it is written in the paper, with the values of one cohort in one matrix."""
    memory_key = torch.cat([f[0][0].flatten(1).T for f in frames])
    shrinkage = torch.cat([f[1][0].flatten(1).T for f in frames])
    values = torch.cat([f[3][objects].permute(2, 3, 0, 1).reshape(ELEMENTS, -1) for f in frames])
    scores = query_rows(key[0].flatten(1).T, selection[0].flatten(1).T) @ memory_rows(memory_key, shrinkage).T
    best = scores.topk(min(top, scores.shape[1]), dim=1)
    weights = torch.zeros_like(scores).scatter(1, best.indices, best.values.softmax(1))
    return (weights @ values).T.view(-1, VALUE, *HW)


@pytest.mark.parametrize("compatible", [True, False])
@pytest.mark.parametrize("at_once", [50, 10**6])
def test_read_of_two_cohorts_is_the_dense_one(compatible, at_once, monkeypatch):
    monkeypatch.setitem(memory_module.SCORES_AT_ONCE, "cpu", at_once)
    memory = XMemMemory(XMemConfig(top_k=7, compatible=compatible))
    frames = [frame(0, 2), frame(1, 2), frame(2, 3), frame(3, 3)]
    for f in frames:
        memory.write(*f)
    key, _, selection, _ = frame(9, 1)
    readout = memory.read(key, selection)
    torch.testing.assert_close(readout[:2], dense_read(frames, slice(0, 2), key, selection, 7), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(readout[2:], dense_read(frames[2:], slice(2, 3), key, selection, 7), atol=1e-5, rtol=1e-5)


def test_fewer_elements_than_top_k():
    memory = XMemMemory(XMemConfig(top_k=30))
    memory.write(*frame(0, 1))
    key, _, selection, _ = frame(9, 1)
    torch.testing.assert_close(memory.read(key, selection), dense_read([frame(0, 1)], slice(0, 1), key, selection, 30), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_memory_is_the_plain_one(seed):
    """Random settings and arrivals, through consolidations and evictions: the same elements are read with the same weights."""
    draw = random.Random(seed)
    t_min = draw.randint(2, 4)
    p = draw.randint(3, 16)
    config = XMemConfig(
        top_k=draw.choice([30, 45, 200]),  # enough that no element is unread: among such the choice of prototypes is arbitrary
        enable_long_term=seed != 0,
        min_mid_term_frames=t_min,
        max_mid_term_frames=t_min + draw.randint(1, 4),
        num_prototypes=p,
        max_long_term_elements=draw.choice([p, 2 * p + 1, 5 * p, 10000]),
    )
    arrivals = sorted(draw.sample(range(1, 14), 3))
    ours, plain = XMemMemory(config), PlainMemory(config)
    for t in range(36):
        key, shrinkage, selection, values = (x.double() for x in frame(1000 * seed + t, 1 + sum(t >= a for a in arrivals)))
        if t:
            known = ours.objects
            expected = plain.read(key[0].flatten(1), selection[0].flatten(1))
            torch.testing.assert_close(ours.read(key, selection).flatten(2), expected.view(known, VALUE, -1), atol=1e-9, rtol=1e-9)
        ours.write(key, shrinkage, selection, values)
        plain.write(key[0].flatten(1), shrinkage[0].flatten(1), selection[0].flatten(1), values.flatten(2))
        assert ours.sizes()["working_by_cohort"] == [v.shape[2] for v in plain.values]
        assert ours.sizes()["long_term_by_cohort"] == [0 if v is None else v.shape[2] for v in plain.long_values]


def test_corrected_store_treats_a_late_cohort_as_if_its_first_frame_were_the_first():
    """Through consolidations and evictions: with compatible=False what came before an object does not touch its memory."""
    config = dict(max_mid_term_frames=4, min_mid_term_frames=2, num_prototypes=9, max_long_term_elements=30, top_k=7)
    late, alone = XMemMemory(XMemConfig(compatible=False, **config)), XMemMemory(XMemConfig(**config))
    for t in range(24):
        key, shrinkage, selection, values = frame(t, 3)
        late.write(key, shrinkage, selection, values if t >= 5 else values[:2])
        if t >= 5:
            alone.write(key, shrinkage, selection, values[2:])
        key, _, selection, _ = frame(100 + t, 1)
        readout = late.read(key, selection)
        if t >= 5:
            torch.testing.assert_close(readout[2:], alone.read(key, selection), atol=1e-6, rtol=1e-6)
    assert alone.sizes()["long_term"][0] > 0 and late.sizes()["long_term"][1] == alone.sizes()["long_term"][0]


def test_eviction_with_several_cohorts_keeps_values_with_their_keys():
    """The least read elements go, and all that tie with the last of them; a cohort's values belong to the last elements."""
    bank = MemoryBank(XMemConfig(max_long_term_elements=7, num_prototypes=3), torch.empty(0), 1, KEY)
    elements = torch.arange(6.0)
    bank.rows.append_long(elements[:, None].expand(6, 2 * KEY + 1))
    bank.usage.append_long(torch.stack([torch.tensor([3.0, 0, 8, 1, 1, 4]), torch.ones(6)], 1))
    bank.cohorts = [bank._table(2), bank._table(1)]
    bank.cohorts[0].append_long(elements[:, None].expand(6, 2))
    bank.cohorts[1].append_long(elements[2:, None])
    bank._evict()
    assert bank.rows.long[:, 0].tolist() == bank.cohorts[0].long[:, 1].tolist() == [0, 2, 5]
    assert bank.cohorts[1].long[:, 0].tolist() == [2, 5] and bank.usage.long[:, 0].tolist() == [3, 8, 4]


def test_long_term_memory_of_two_cohorts_stays_within_its_limit():
    memory = XMemMemory(XMemConfig(max_mid_term_frames=4, min_mid_term_frames=2, num_prototypes=9, max_long_term_elements=30, top_k=7))
    for t in range(40):
        memory.write(*frame(t, 1 if t < 3 else 2))
        key, _, selection, _ = frame(100 + t, 1)
        assert memory.read(key, selection).isfinite().all()
        sizes = memory.sizes()
        assert sizes["long_term"][0] <= 30 and sizes["long_term_by_cohort"][0] == sizes["long_term"][0] and sizes["working"][0] < 4 * ELEMENTS


def test_eviction_without_counted_usage_says_what_to_do():
    memory = XMemMemory(XMemConfig(max_mid_term_frames=4, min_mid_term_frames=2, num_prototypes=9, max_long_term_elements=20, enable_long_term_count_usage=False))
    with pytest.raises(ValueError, match="set xmem.enable_long_term_count_usage=true"):
        for t in range(40):
            memory.write(*frame(t, 1))
            memory.read(frame(100 + t, 1)[0], frame(100 + t, 1)[2])


def test_table_against_lists():
    table = ElementTable(2, torch.empty(0), split=12, long_capacity=9)
    working, long = torch.empty(0, 2), torch.empty(0, 2)
    for turn in range(6):
        while len(working) < 12:
            rows = torch.randn(4, 2)
            table.append_working(rows)
            working = torch.cat([working, rows])
        rows = torch.randn(3, 2)
        if len(long) + 3 > 9:
            kept = torch.rand(len(long)) > 0.5
            kept[0] = False
            kept[1:4] = False
            table.keep_long(kept)
            long = long[kept]
        table.append_long(rows)
        long = torch.cat([long, rows])
        table.drop_working(4, 10)
        working = torch.cat([working[:4], working[10:]])
        while len(working) % 4:
            table.append_working(working[:2])
            working = torch.cat([working, working[:2]])
        assert torch.equal(table.working, working) and torch.equal(table.long, long)
        assert torch.equal(table.data[table.row_of(torch.arange(len(working) + len(long)))], torch.cat([working, long]))
        assert len(table.data) <= table.limit
