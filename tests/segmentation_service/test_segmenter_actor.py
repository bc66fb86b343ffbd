"""The actor, through a real local Ray."""

import sys
from pathlib import Path

import numpy as np
import pytest

from segmentation_service.checkpoint import CheckpointError
from segmentation_service.config import PropagationConfig, SegmentationConfig
from segmentation_service.masks import decode_rle
from segmentation_service.segmenter import ObjectPrompt, Segmenter
from segmentation_service.video import FramesInMemory

sys.path.append(str(Path(__file__).parent / "xmem"))  # tiny_xmem.py


def test_actor_gives_the_masks_of_the_plain_class(ray_session, tiny_sam2, tmp_path, frame, one_thread):
    import ray
    import torch
    from tiny_xmem import tiny_state_dict

    from segmentation_service.actor import SegmenterActor

    box = ObjectPrompt((28, 18, 71, 46), ((50, 30),), (1,))
    hypotheses = [[box], [], [box, ObjectPrompt(None)]]
    torch.save(tiny_state_dict(), tmp_path / "xmem.pth")
    propagation = PropagationConfig(checkpoint=str(tmp_path / "xmem.pth"), size=0)
    actor = SegmenterActor.options(num_cpus=0).remote(SegmentationConfig(checkpoint=str(tiny_sam2), device="cpu", propagation=propagation))
    broken = SegmenterActor.options(num_cpus=0).remote(SegmentationConfig(checkpoint=str(tiny_sam2 / "nowhere")))
    try:
        assert ray.get(actor.ready.remote(), timeout=120) == {"device": "cpu", "dtype": "float32"}
        rles = ray.get(actor.segment_group.remote(frame, hypotheses), timeout=60)
        plain = Segmenter(str(tiny_sam2), device="cpu", propagation=propagation)
        expected = plain.segment_frame(frame, hypotheses)
        assert [[decode_rle(rle).tolist() for rle in group] for group in rles] == [masks.tolist() for masks in expected]
        stats = ray.get(actor.stats.remote(), timeout=60)
        assert (stats["image_encodings"], stats["prompts"], stats["decoded"], stats["deduplicated"], stats["empty"]) == (1, 3, 1, 1, 1)
        video = FramesInMemory(np.stack([np.roll(frame, 3 * t, 1) for t in range(4)]))
        propagated = ray.get(actor.propagate_group.remote(video, 0, rles, [1, 3]), timeout=60)
        assert propagated == plain.propagate_group(video, 0, rles, [1, 3]) and [len(f[3]) for f in propagated] == [1, 0, 2]
        with pytest.raises(CheckpointError, match="nowhere does not exist"):
            ray.get(broken.ready.remote(), timeout=120)
    finally:
        ray.kill(actor)
        ray.kill(broken)
