"""Many hypotheses in one pass equal each of them alone, and share what does not depend on masks."""

import pytest
import torch

import xmem_recipe as recipe
from segmentation_service.xmem import XMemConfig, XMemGroupTracker, XMemTracker

FRAMES, HEIGHT, WIDTH, OBJECTS = 26, 44, 60, 4
CONSOLIDATING = dict(mem_every=1, max_mid_term_frames=4, min_mid_term_frames=2, num_prototypes=9)


@pytest.fixture(scope="module")
def clip():
    rgb, index = recipe.video(FRAMES, HEIGHT, WIDTH, OBJECTS, 9)
    return [recipe.to_input(image) for image in rgb], torch.from_numpy(index)


def one_hot(index_HW, objects):
    return torch.stack([index_HW == o for o in objects]).float()


def equal_alone(network, images, config, masks_at, batch=0):
    """Masks at frames: {frame: [(mask, labels) of each hypothesis]}. Returns the group's tracker."""
    config = XMemConfig(**config, objects_per_batch=batch)
    group = XMemGroupTracker(network, config)
    alone = [XMemTracker(network, config) for _ in masks_at[0]]
    for t, image in enumerate(images):
        given = masks_at.get(t)
        together = group.step(image, given and [mask for mask, _ in given], given and [labels for _, labels in given])
        for g, tracker in enumerate(alone):
            expected = tracker.step(image, *(given[g] if given else (None, None)))
            assert together[g].shape == expected.shape
            difference = (together[g] - expected).abs().max().item()
            best = expected.topk(2, dim=0).values
            clear = best[0] - best[1] > 1e-5
            assert difference < 1e-4 and torch.equal(together[g].argmax(0)[clear], expected.argmax(0)[clear]), (t, g, difference)
    return group


@pytest.mark.parametrize("batch", [0, 3, 100])
def test_different_numbers_of_objects(tiny, clip, batch):
    images, index = clip
    first = [(one_hot(index[0], objects), None) for objects in ([1], [2, 1, 3], [4, 2], [1], [3, 4, 1, 2])]
    group = equal_alone(tiny, images[:12], dict(mem_every=2), {0: first}, batch)
    assert group.memory.objects == 11


@pytest.mark.parametrize("compatible", [True, False])
@pytest.mark.parametrize("deep_update_every", [-1, 3])
def test_objects_that_arrive_later_with_consolidation(tiny, clip, compatible, deep_update_every):
    images, index = clip
    masks_at = {
        0: [(one_hot(index[0], [1]), None), (one_hot(index[0], [2, 3]), None), (one_hot(index[0], [4]), None)],
        3: [(one_hot(index[3], [1, 2]), [2]), (one_hot(index[3], [2, 3]) * 0, []), (one_hot(index[3], [4, 1, 2]), [2, 3])],
        9: [(one_hot(index[9], [1, 2, 4]), [3]), (one_hot(index[9], [2, 3, 1]), None), (one_hot(index[9], [4, 1, 2]), [1])],
    }
    group = equal_alone(tiny, images, dict(**CONSOLIDATING, compatible=compatible, deep_update_every=deep_update_every), masks_at)
    assert group.memory.sizes()["long_term"][0] > 0


def test_eviction(tiny, clip):
    images, index = clip
    masks_at = {0: [(one_hot(index[0], [1]), None), (one_hot(index[0], [2, 3]), None)]}
    group = equal_alone(tiny, images, dict(**CONSOLIDATING, max_long_term_elements=30), masks_at)
    assert 0 < group.memory.sizes()["long_term"][0] <= 30


def test_without_long_term_memory(tiny, clip):
    images, index = clip
    equal_alone(tiny, images[:12], dict(mem_every=2, enable_long_term=False), {0: [(one_hot(index[0], [1]), None), (one_hot(index[0], [2]), None)]})


def test_official_size(official):
    """Two hypotheses about a video of the vectors, with weights of official size."""
    rgb, index = recipe.video(*recipe.SCENARIOS["late_object_long_term"][2])
    images, index = [recipe.to_input(image) for image in rgb[:3]], torch.from_numpy(index)
    masks_at = {0: [(one_hot(index[0], [1]), None), (one_hot(index[0], [2, 3]), None)]}
    equal_alone(official(recipe.SCENARIOS["late_object_long_term"][1]), images, dict(mem_every=1), masks_at)


def test_image_and_similarity_are_computed_once(tiny, clip, monkeypatch):
    import segmentation_service.xmem.memory as memory

    images, index = clip
    group = XMemGroupTracker(tiny, XMemConfig(objects_per_batch=100))
    runs = {"images": 0, "decoder": 0, "top_k": 0}
    group.network.key_encoder.register_forward_hook(lambda *_: runs.update(images=runs["images"] + 1))
    group.network.decoder.register_forward_hook(lambda *_: runs.update(decoder=runs["decoder"] + 1))
    top_k = memory.top_k
    monkeypatch.setattr(memory, "top_k", lambda *args: runs.update(top_k=runs["top_k"] + 1) or top_k(*args))
    group.step(images[0], [one_hot(index[0], [o]) for o in (1, 2, 3, 4)])
    for image in images[1:4]:
        group.step(image)
    assert runs == {"images": 4, "decoder": 3, "top_k": 3}


def test_hypotheses_keep_one_rhythm(tiny, clip):
    images, index = clip
    group = XMemGroupTracker(tiny)
    with pytest.raises(ValueError, match="got 2 masks and 1 labels"):
        group.step(images[0], [one_hot(index[0], [1])] * 2, [None])
    with pytest.raises(ValueError, match="got 0 masks"):
        group.step(images[0], [])
    group.step(images[0], [one_hot(index[0], [1])] * 2)
    with pytest.raises(ValueError, match="each hypothesis of 2 has masks"):
        group.step(images[1], [one_hot(index[1], [1])])
    with pytest.raises(ValueError, match="track them apart"):
        group.step(images[1], [one_hot(index[1], [1])] * 2, [[1], None])
