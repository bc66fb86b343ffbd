"""Trackers on a tiny network: the order of updates, bad input, bounded memory, and the network's two forms."""

from dataclasses import replace

import pytest
import torch

import xmem_recipe as recipe
from segmentation_service.xmem import XMem, XMemConfig, XMemGroupTracker, XMemTracker
from segmentation_service.xmem.blocks import WideConv2d
from tiny_xmem import TINY, tiny_state_dict

HEIGHT, WIDTH = 35, 50  # three by four positions, both sides padded


@pytest.fixture(scope="module")
def clip():
    """Normalised frames and one-hot masks of two objects."""
    rgb, index = recipe.video(24, HEIGHT, WIDTH, 2, 5)
    return [recipe.to_input(image) for image in rgb], [recipe.one_hot(i, 2, [1, 2]) for i in index]


def calls_of(tracker):
    """Which parts of the network ran, with the light or deep update asked for."""
    calls = []
    network = tracker.group.network
    network.decoder.register_forward_pre_hook(lambda module, args: calls.append("light" if args[3] else "decode"))
    network.value_encoder.register_forward_pre_hook(lambda module, args: calls.append("deep" if args[3] else "value"))
    return calls


def run(tracker, images, masks):
    """Probabilities of all frames; masks: {frame: (mask, labels)}."""
    return [tracker.step(image, *masks.get(t, (None, None))) for t, image in enumerate(images)]


def test_memory_frames_get_the_deep_update_and_others_the_light_one(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny, XMemConfig(mem_every=3, objects_per_batch=8))
    calls = calls_of(tracker)
    run(tracker, images[:8], {0: (masks[0], None)})
    assert calls == ["deep", "light", "light", "decode", "deep", "light", "light", "decode", "deep", "light"]


def test_deep_updates_at_their_own_pace(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny, XMemConfig(mem_every=2, deep_update_every=3, objects_per_batch=8))
    calls = calls_of(tracker)
    run(tracker, images[:7], {0: (masks[0], None)})
    assert calls == ["deep", "light", "light", "value", "light", "light", "deep", "light", "light", "value"]


def test_a_mask_restarts_the_interval(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny, XMemConfig(mem_every=3, objects_per_batch=8))
    run(tracker, images[:3], {0: (masks[0], None), 2: (masks[2], None)})
    sizes = []
    for image in images[3:7]:
        tracker.step(image)
        sizes.append(tracker.memory.sizes()["working"][0] // 12)
    assert sizes == [2, 2, 3, 3]


def usage(tracker):
    return tracker.memory.banks[0].usage.working[:, 1].max().item()


def test_a_mask_for_all_labels_is_not_segmented_and_counts_nothing(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny)
    run(tracker, images[:2], {0: (masks[0], None)})
    life = usage(tracker)
    calls = calls_of(tracker)
    probs = tracker.step(images[2], masks[2], labels=[1, 2])
    assert calls == ["deep"] * 2 and usage(tracker) == life
    torch.testing.assert_close(probs[1:], masks[2], atol=1e-6, rtol=0)


def test_a_mask_without_labels_counts_usage_and_hides_the_prediction(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny)
    run(tracker, images[:2], {0: (masks[0], None)})
    life = usage(tracker)
    probs = tracker.step(images[2], masks[2])
    assert usage(tracker) == pytest.approx(life + 1)
    torch.testing.assert_close(probs[1:], masks[2], atol=1e-6, rtol=0)


def test_objects_left_out_of_labels_keep_their_prediction_outside_the_mask(tiny, clip):
    images, masks = clip
    first, corrected = XMemTracker(tiny), XMemTracker(tiny)
    run(first, images[:4], {0: (masks[0], None)})
    predicted = first.step(images[4])
    run(corrected, images[:4], {0: (masks[0], None)})
    given = masks[4].clone()
    given[1] = 0
    probs = corrected.step(images[4], given, labels=[1])
    inside = given[0] > 0.5
    assert inside.any() and (probs[1][inside] > 0.99).all() and (probs[2][inside] < 1e-5).all()
    assert ((probs[2] > probs[0]) == (predicted[2] > 1 - predicted[2]))[~inside].float().mean() > 0.9


def test_new_objects_start_with_an_empty_sensory_memory(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny, XMemConfig(objects_per_batch=8))
    seen = []
    tracker.group.network.value_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[2].clone()))
    run(tracker, images[:4], {0: (masks[0][:1], None), 3: (masks[3], [2])})
    assert not seen[0].any() and seen[1][0].any() and not seen[1][1].any()


def test_end_changes_no_answer_and_nothing_that_is_remembered(tiny, clip):
    images, masks = clip
    a, b = XMemTracker(tiny), XMemTracker(tiny)
    run(a, images[:5], {0: (masks[0], None)})
    run(b, images[:5], {0: (masks[0], None)})
    before, hidden = b.memory.sizes(), b.group.hidden_OChw.clone()
    assert torch.equal(a.step(images[5]), b.step(images[5], end=True))
    assert b.memory.sizes() == before and torch.equal(b.group.hidden_OChw, hidden) and a.memory.sizes() != before


def test_clear_memory_starts_anew(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny)
    first = run(tracker, images[:7], {0: (masks[0], None)})
    tracker.clear_memory()
    again = run(tracker, images[:7], {0: (masks[0], None)})
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("mask", [lambda m: m.bool(), lambda m: (m * 255).to(torch.uint8), lambda m: m.double()])
def test_masks_of_other_kinds(tiny, clip, mask):
    images, masks = clip
    assert torch.equal(XMemTracker(tiny).step(images[0], mask(masks[0])), XMemTracker(tiny).step(images[0], masks[0]))


def test_bad_input_is_named(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny)
    for arguments, message in (
        ((images[0],), "first frame needs the masks"),
        ((images[0], masks[0][:, :-1]), r"image's size \(35, 50\); got torch.float32 \(2, 34, 50\)"),
        ((images[0], masks[0][0]), r"got torch.float32 \(35, 50\)"),
        ((images[0], masks[0][:0]), "at least 1 objects"),
        ((images[0], masks[0] * 2), "between 0 and 1; got values from 0 to 2"),
        ((images[0], masks[0] * float("nan")), "between 0 and 1; got values from nan"),
        ((images[0], masks[0], [3]), r"1 to 2 here; got \[3\]"),
        ((images[0], masks[0].numpy()), "got ndarray"),
        ((images[0][:2], masks[0]), r"\(3, H, W\); got torch.float32 \(2, 35, 50\)"),
        ((images[0].to(torch.uint8), masks[0]), "normalised float tensor"),
        ((images[0], None, [1]), "there are none; got labels"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.step(*arguments)
    assert tracker.group.frame == -1
    tracker.step(images[0], masks[0])
    for arguments, message in (
        ((images[1][:, :-1],), r"one size; got \(34, 50\) after \(35, 50\)"),
        ((images[1], masks[1][:1]), "at least 2 objects, the known ones included; got 1"),
        ((images[1], None, [1]), "there are none"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.step(*arguments)
    assert tracker.group.frame == 0 and tracker.step(images[1]).shape == (3, HEIGHT, WIDTH)


def test_a_first_frame_that_is_not_remembered(tiny, clip):
    images, masks = clip
    tracker = XMemTracker(tiny)
    assert tracker.step(images[0], masks[0], end=True).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="end=True"):
        tracker.step(images[1])


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(mem_every=0), "xmem.mem_every must be a whole number of at least 1; got 0"),
        (dict(top_k=2.5), "xmem.top_k .* got 2.5"),
        (dict(min_mid_term_frames=1), "xmem.min_mid_term_frames .* at least 2; got 1"),
        (dict(max_mid_term_frames=5), "above xmem.min_mid_term_frames .5.; got 5"),
        (dict(max_long_term_elements=100), "at least xmem.num_prototypes .128.; got 100"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        XMemConfig(**setting)


def test_memory_is_bounded_over_hundreds_of_frames(tiny):
    """Working memory within T_max frames and long-term memory within its limit; the buffers stop growing and stay where they are."""
    config = XMemConfig(mem_every=1, max_mid_term_frames=5, min_mid_term_frames=3, num_prototypes=12, max_long_term_elements=100)
    tracker = XMemTracker(tiny, config)
    images = [torch.randn(3, 32, 48) for _ in range(8)]
    mask = torch.zeros(1, 32, 48)
    mask[:, 8:20, 10:30] = 1
    size_at = {}
    for t in range(400):
        tracker.step(images[t % 8], mask if t == 0 else None)
        sizes = tracker.memory.sizes()
        assert sizes["working"][0] < 5 * 6 and sizes["long_term"][0] <= 100
        size_at[t] = (tracker.memory.nbytes(), tracker.memory.banks[0].cohorts[0].data.data_ptr())
    assert size_at[100] == size_at[399] and sizes["long_term"][0] > 80


@pytest.mark.parametrize("hidden", [4, 0])
def test_folded_network_gives_the_answers_of_the_plain_one(hidden):
    dims = replace(TINY, hidden=hidden)
    network = XMem(dims)
    network.load_state_dict(tiny_state_dict(dims))
    network.eval()
    folded = network.for_inference()
    image, masks, state = torch.randn(1, 3, 32, 48), torch.rand(2, 2, 32, 48), torch.randn(2, hidden, 2, 3)
    answers = []
    for n in (network, folded):
        with torch.no_grad():
            features = n.encode_image(image)
            value, deep = n.value_encoder(n.value_encoder.shared_parts(image, features.f16), masks, state, True)
            logits, light = n.decoder(n.decoder.shared_parts(features), value, state, True)
        answers.append([features.f4, features.key, features.shrinkage, features.selection, value, deep, logits, light])
    for plain, fast in zip(*answers):
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=2e-5)
    assert folded.for_inference() is folded and XMemTracker(folded).group.network is folded
    assert set(network.state_dict()) == set(tiny_state_dict(dims)) and all(p.requires_grad for p in network.parameters())


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="this torch or CPU has no NNPACK")
def test_decoder_convolutions_by_nnpack(monkeypatch):
    """Used where it pays and not where gradients or other precisions are wanted; the answers are those of torch's convolution."""
    calls = []
    nnpack = torch._nnpack_spatial_convolution
    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", lambda *args: calls.append(1) or nnpack(*args))
    conv = WideConv2d(64, 32)
    x = torch.randn(2, 64, 40, 30)
    direct = torch.nn.functional.conv2d(x, conv.weight, conv.bias, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), direct, atol=1e-3, rtol=0)
        torch.testing.assert_close(conv(x.contiguous(memory_format=torch.channels_last)), direct, atol=1e-3, rtol=0)
        assert len(calls) == 4
        conv(x[:, :, :30])  # too small
        with torch.autocast("cpu", dtype=torch.bfloat16):
            conv(x)
        conv.double()(x.double())
    conv.float()(x).sum().backward()
    assert len(calls) == 4


def test_tracker_without_sensory_memory(clip):
    images, masks = clip
    network = XMem(replace(TINY, hidden=0))
    probs = run(XMemTracker(network), images[:7], {0: (masks[0], None)})
    assert probs[-1].shape == (3, HEIGHT, WIDTH) and network.training and probs[-1].isfinite().all()


def test_network_can_be_trained():
    network = XMem(TINY).train()
    image = torch.randn(1, 3, 32, 48)
    features = network.encode_image(image)
    state = torch.zeros(2, 4, 2, 3)
    value, state = network.value_encoder(network.value_encoder.shared_parts(image, features.f16), torch.rand(2, 2, 32, 48), state, True)
    logits, state = network.decoder(network.decoder.shared_parts(features), value, state, True)
    (logits.square().mean() + state.square().mean() + features.key.mean() + features.shrinkage.mean() + features.selection.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_half_precision_by_autocast(tiny, clip):
    images, masks = clip
    exact = run(XMemTracker(tiny), images[:7], {0: (masks[0], None)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tracker = XMemTracker(tiny)
        coarse = run(tracker, images[:7], {0: (masks[0], None)})
    assert all(probs.dtype == torch.float32 and probs.isfinite().all() for probs in coarse)
    assert tracker.memory.banks[0].rows.data.dtype == torch.float32
    assert sum((a - b).abs().mean() for a, b in zip(exact, coarse)) / 7 < 0.05


def test_double_precision(tiny_weights, clip):
    images, masks = clip
    network = XMem(TINY)
    network.load_state_dict(tiny_weights)
    probs = run(XMemTracker(network.eval().double()), images[:7], {0: (masks[0], None)})
    assert probs[-1].dtype == torch.float64


def test_group_with_one_hypothesis_is_the_tracker(tiny, clip):
    images, masks = clip
    one, group = XMemTracker(tiny), XMemGroupTracker(tiny)
    assert torch.equal(one.step(images[0], masks[0]), group.step(images[0], [masks[0]])[0])
    assert torch.equal(one.step(images[1]), group.step(images[1])[0])
