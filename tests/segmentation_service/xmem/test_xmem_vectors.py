"""Our XMem meets every published test vector: weights of official size, five videos, and the steps in between."""

import zlib

import numpy as np
import pytest
import torch

import segmentation_service.xmem.memory as memory
import xmem_recipe as recipe
from segmentation_service.xmem import XMemConfig, XMemTracker
from segmentation_service.xmem.blocks import upsample
from segmentation_service.xmem.reading import memory_rows, query_rows, soft_aggregate, top_k

SAME_WEIGHTS_TOGETHER = sorted(recipe.SCENARIOS, key=lambda name: recipe.SCENARIOS[name][1])
STEP = 6  # the vectors hold every sixth row and column of the probabilities
TOLERANCE = 2e-4


def crc32(x, value=0):
    return zlib.crc32(np.ascontiguousarray(x).tobytes(), value)


def test_recipe_of_the_weights(vectors, official_shapes):
    weights = recipe.fill(official_shapes, 7)
    value = 0
    for tensor in weights.values():
        value = crc32(tensor.numpy(), value)
    assert value == vectors["weights_seed_7"]["crc32_of_all_keys_in_tsv_order"]


def follow(name, official, vectors, arrays):
    """Play a scenario and compare all that the vectors say of each frame."""
    expected = vectors["scenarios"][name]
    worst, unequal, pixels = 0.0, 0, 0
    trackers = []

    def make(config):
        assert config == expected["config"]
        trackers.append(XMemTracker(official(expected["weight_seed"]), XMemConfig(**config)))
        return trackers[0]

    for t, probs in recipe.play(make, name):
        frame, probs = expected["frames"][t], probs.numpy()
        reference = arrays[f"{name}.probs"][t][: len(probs)]
        worst = max(worst, float(np.abs(probs[:, ::STEP, ::STEP] - reference).max()))
        mask = probs.argmax(0).astype(np.uint8)
        wrong = int((mask != arrays[f"{name}.masks"][t]).sum())
        assert wrong <= frame["near_ties"] and (crc32(mask) == frame["mask_crc32"] or wrong), (t, wrong)
        unequal, pixels = unequal + wrong, pixels + mask.size
        np.testing.assert_allclose(probs.mean((1, 2), dtype=np.float64), frame["mean"], atol=TOLERANCE)
        np.testing.assert_allclose(probs.std((1, 2), dtype=np.float64), frame["std"], atol=TOLERANCE)
        np.testing.assert_allclose(probs.reshape(len(probs), -1)[:, :4], frame["first"], atol=TOLERANCE)
        np.testing.assert_allclose(probs.sum(0), 1, atol=1e-5)
        sizes = trackers[0].memory.sizes()
        row = [*sizes["working"], sizes["working_by_cohort"], *sizes["long_term"], [n for n in sizes["long_term_by_cohort"] if n]]
        assert row == expected["memory_after_frame"]["rows"][t], t
    assert worst < TOLERANCE and unequal < 1e-3 * pixels, (worst, unequal)


@pytest.mark.parametrize("name", SAME_WEIGHTS_TOGETHER)
def test_scenario(name, official, vectors, arrays, monkeypatch):
    expected = vectors["scenarios"][name]
    rgb, index = recipe.video(*expected["video"])
    assert crc32(rgb) == expected["video_crc32"] and crc32(index) == expected["index_mask_crc32"]
    consolidations = []

    def recorded(frequency_N, count):
        places = memory_choose(frequency_N, count)
        consolidations.append((len(frequency_N), places.tolist(), frequency_N[places][:6].tolist()))
        return places

    memory_choose = memory.choose_prototypes
    monkeypatch.setattr(memory, "choose_prototypes", recorded)
    follow(name, official, vectors, arrays)
    assert len(consolidations) >= len(expected["consolidations"])
    for (candidates, places, usage), wanted in zip(consolidations, expected["consolidations"]):
        assert (candidates, places) == (wanted["candidates"], wanted["indices"])
        np.testing.assert_allclose(usage, wanted["usage_first"], rtol=1e-4)


def watch(network):
    """A dictionary that always holds what last went through the network's parts, under the vectors' names."""
    seen = {}

    def note(*names):
        def hook(module, args, outputs):
            seen.update(zip(names, outputs if isinstance(outputs, tuple) else (outputs,)))

        return hook

    def note_inputs(module, args):
        _, seen["memory_readout"], seen["hidden_before"], _ = args

    network.key_encoder.register_forward_hook(note("f16", "f8", "f4"))
    network.key_proj.register_forward_hook(note("key", "shrinkage", "selection"))
    network.value_encoder.layer3.register_forward_hook(note("value_resnet_stage3"))
    network.value_encoder.register_forward_hook(note("value", "hidden_after_deep_update"))
    network.decoder.fuser.register_forward_hook(note("decoder_g16"))
    network.decoder.up_16_8.register_forward_hook(note("decoder_g8"))
    network.decoder.up_8_4.register_forward_hook(note("decoder_g4"))
    network.decoder.register_forward_pre_hook(note_inputs)
    network.decoder.register_forward_hook(note("logits_stride4", "hidden_after_light_update"))
    return seen


def test_tensors_in_between(official, vectors, arrays):
    """Frames 0, 1 and 5 of `one_object`: every tensor that the vectors describe."""
    config, seed, video, _ = recipe.SCENARIOS["one_object"]
    tracker = XMemTracker(official(seed), XMemConfig(**{**recipe.BASE, **config}))
    seen = watch(tracker.group.network)
    rgb, index = recipe.video(*video)
    compared = 0
    for t in range(6):
        tracker.step(recipe.to_input(rgb[t]), recipe.one_hot(index[0], 1, [1]) if t == 0 else None)
        if "logits_stride4" in seen:
            seen["logits_full_resolution"] = upsample(seen["logits_stride4"], 4)
        for name, probe in vectors["probes_one_object"].items():
            frame, what = name.split(".", 1)
            if frame == f"frame{t}":
                got = seen[what].contiguous().numpy()
                assert got.size == np.prod(probe["shape"]), name
                np.testing.assert_allclose([got.mean(dtype=np.float64), got.std(dtype=np.float64)], [probe["mean"], probe["std"]], atol=2e-4, err_msg=name)
                np.testing.assert_allclose(got.ravel()[:6], probe["first"], atol=1e-3, err_msg=name)
                if f"probe.{name}" in arrays:
                    np.testing.assert_allclose(got.ravel(), arrays[f"probe.{name}"].ravel(), atol=1e-3, err_msg=name)
                compared += 1
    assert compared == len(vectors["probes_one_object"])


def test_toy_reading(arrays):
    toy = {name[4:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("toy.")}
    rows = memory_rows(toy["memory_key"][0].T, toy["memory_shrinkage"][0].T)
    scores_QN = query_rows(toy["query_key"][0].T, toy["query_selection"][0].T) @ rows.T
    torch.testing.assert_close(scores_QN.T, toy["similarity"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores_QN.softmax(1).T, toy["full_softmax"][0], atol=1e-5, rtol=1e-5)
    best, places = top_k(scores_QN, 3)
    weights_QN = torch.zeros_like(scores_QN).scatter(1, places, best.softmax(1))
    torch.testing.assert_close(weights_QN.T, toy["affinity_top3"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights_QN.sum(0), toy["usage"][0], atol=1e-5, rtol=1e-5)


def test_toy_aggregation(arrays):
    for kind in ("aggregate", "aggregate_binary"):
        got = soft_aggregate(torch.from_numpy(arrays[f"toy.{kind}_in"]))
        np.testing.assert_allclose(got, arrays[f"toy.{kind}_out"], atol=1e-6)
