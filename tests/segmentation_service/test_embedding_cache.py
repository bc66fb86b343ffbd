"""The cache of image embeddings: the same masks with and without, least recently used out first, bytes bounded."""

import numpy as np
import pytest
import torch

from segmentation_service.embedding_cache import EmbeddingCache, bytes_of, fingerprint
from segmentation_service.sam2_decoding import FrameEmbedding
from segmentation_service.segmenter import ObjectPrompt, Segmenter

pytestmark = pytest.mark.usefixtures("one_thread")

HYPOTHESES = [[ObjectPrompt((28, 18, 71, 46)), ObjectPrompt(None, ((80, 50),), (1,))]]


@pytest.fixture(params=["transformers", "sam2"])
def backend(request, tiny_sam2, tmp_path):
    backend = Segmenter(str(tiny_sam2), device="cpu").backend
    if request.param == "transformers":
        return backend
    pytest.importorskip("sam2")
    from meta_sam2 import save_as_meta

    checkpoint, config = save_as_meta(backend.model, tmp_path)
    return Segmenter(checkpoint, "sam2", device="cpu", model_config=config).backend


def test_a_frame_that_was_seen_is_not_encoded_again_and_gives_the_same_masks(backend, frame):
    cached, plain = Segmenter("", backend, cache=EmbeddingCache(2**24)), Segmenter("", backend)
    other = np.ascontiguousarray(frame[:, ::-1])
    expected, expected_other = plain.segment_group(frame, HYPOTHESES), plain.segment_group(other, HYPOTHESES)
    assert expected != expected_other
    for _ in range(2):
        assert cached.segment_group(frame, HYPOTHESES, key="a") == expected
        assert cached.segment_group(other, HYPOTHESES, key="b") == expected_other
    stats = cached.stats()
    assert (stats["image_encodings"], stats["cache_hits"], stats["cache_misses"], stats["cache_evictions"]) == (2, 2, 2, 0)
    assert stats["cache_bytes"] == 2 * sum(t.numel() * t.element_size() for t in backend.encode(frame).features)


def test_without_a_key_nothing_is_kept(backend, frame):
    segmenter = Segmenter("", backend, cache=EmbeddingCache(2**24))
    segmenter.segment_group(frame, HYPOTHESES)
    segmenter.segment_group(frame, HYPOTHESES)
    assert segmenter.stats()["image_encodings"] == 2 and segmenter.stats()["cache_bytes"] == 0


def test_another_model_or_size_of_frame_is_another_embedding(tiny_sam2, frame):
    cache = EmbeddingCache(2**24)
    one, two = (Segmenter(str(tiny_sam2), device="cpu") for _ in range(2))
    with torch.no_grad():
        next(two.backend.model.vision_encoder.parameters()).mul_(1.5)
    assert fingerprint(one.backend) == fingerprint(Segmenter(str(tiny_sam2), device="cpu").backend) != fingerprint(two.backend)
    for backend in (one.backend, two.backend):
        for image in (frame, frame[:40]):
            assert Segmenter("", backend, cache=cache).segment_group(image, HYPOTHESES, "k") == Segmenter("", backend).segment_group(image, HYPOTHESES)
    assert cache.hits == 0 and cache.misses == 4


def test_least_recently_used_goes_first_and_bytes_are_bounded():
    cache = EmbeddingCache(100)
    for key in "abc":
        cache.put(key, np.zeros(30, np.uint8))
    assert cache.get("a") is not None and cache.bytes == 90
    cache.put("d", np.zeros(40, np.uint8))
    assert [cache.get(k) is not None for k in "abcd"] == [True, False, True, True] and (cache.bytes, cache.evictions) == (100, 1)
    cache.put("huge", np.zeros(101, np.uint8))
    assert cache.get("huge") is None and cache.bytes == 100
    cache.put("d", np.zeros(10, np.uint8))
    assert cache.bytes == 70 and cache.get("d").nbytes == 10


def test_bytes_of_whatever_an_embedding_is_made_of():
    tensor, array = torch.zeros(3, 5, dtype=torch.bfloat16), np.zeros(7)
    assert bytes_of(FrameEmbedding((tensor, tensor), (60, 100))) == 60
    assert bytes_of({"a": [tensor, array], "b": (array,), "c": 4, "d": "text"}) == 30 + 56 + 56
