"""The actor, through a real local Ray."""

import pytest

from segmentation_service.checkpoint import CheckpointError
from segmentation_service.config import SegmentationConfig
from segmentation_service.masks import decode_rle
from segmentation_service.segmenter import ObjectPrompt, Segmenter


def test_actor_gives_the_masks_of_the_plain_class(ray_session, tiny_sam2, frame, one_thread):
    import ray

    from segmentation_service.actor import SegmenterActor

    box = ObjectPrompt((28, 18, 71, 46), ((50, 30),), (1,))
    hypotheses = [[box], [], [box, ObjectPrompt(None)]]
    actor = SegmenterActor.options(num_cpus=0).remote(SegmentationConfig(checkpoint=str(tiny_sam2), device="cpu"))
    broken = SegmenterActor.options(num_cpus=0).remote(SegmentationConfig(checkpoint=str(tiny_sam2 / "nowhere")))
    try:
        assert ray.get(actor.ready.remote(), timeout=120) == {"device": "cpu", "dtype": "float32"}
        rles = ray.get(actor.segment_group.remote(frame, hypotheses), timeout=60)
        expected = Segmenter(str(tiny_sam2), device="cpu").segment_frame(frame, hypotheses)
        assert [[decode_rle(rle).tolist() for rle in group] for group in rles] == [masks.tolist() for masks in expected]
        stats = ray.get(actor.stats.remote(), timeout=60)
        assert (stats["image_encodings"], stats["prompts"], stats["decoded"], stats["deduplicated"], stats["empty"]) == (1, 3, 1, 1, 1)
        with pytest.raises(CheckpointError, match="nowhere does not exist"):
            ray.get(broken.ready.remote(), timeout=120)
    finally:
        ray.kill(actor)
        ray.kill(broken)
