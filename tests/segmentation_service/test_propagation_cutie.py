"""Masks through a video by Cutie, where the package `rf-cutie` is installed; without it one clear error."""

import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from propagating import FRAMES, TARGET, CountingVideo, all_nearly_equal, collect, make_clip, objects_of
from segmentation_service.checkpoint import CheckpointError
from segmentation_service.config import PropagationConfig
from segmentation_service.propagation import Propagator
from segmentation_service.video import FramesInMemory

SIZE = 96  # of frames 44x60: 96x130

pytestmark = pytest.mark.usefixtures("one_thread")


def config(checkpoint, **changes):
    return PropagationConfig(**{"method": "cutie", "checkpoint": str(checkpoint), "size": SIZE, **changes})


def test_missing_file_and_package(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="Cutie checkpoint .*nowhere.pth does not exist; give the file of a Cutie"):
        Propagator.load(config(tmp_path / "nowhere.pth"))
    torch.save({}, tmp_path / "cutie.pth")
    monkeypatch.setitem(sys.modules, "cutie", None)
    with pytest.raises(CheckpointError, match=r"needs the package rf-cutie .*pip install 'videoseg-r1\[cutie\]'"):
        Propagator.load(config(tmp_path / "cutie.pth"))


@pytest.fixture(scope="module")
def weights():
    """A random Cutie of the published small size."""
    pytest.importorskip("cutie")
    from pathlib import Path

    import cutie.config
    from cutie.model.cutie import CUTIE
    from cutie.model.utils import resnet
    from omegaconf import OmegaConf

    folder = Path(cutie.config.__file__).parent
    settings = OmegaConf.merge(OmegaConf.load(folder / "eval_config.yaml"), {"model": OmegaConf.load(folder / "model/base.yaml")})
    settings.model.pixel_encoder = {"type": "resnet18", "ms_dims": [256, 128, 64]}
    torch.manual_seed(0)
    with mock.patch.object(resnet.model_zoo, "load_url"), mock.patch.object(resnet, "load_weights_add_extra_dim"):
        return CUTIE(settings).state_dict()


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("cutie") / "cutie-small.pth"
    torch.save(weights, file)
    return file


@pytest.fixture(scope="module")
def propagator(checkpoint):
    return Propagator.load(config(checkpoint))


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture(scope="module")
def objects(clip):
    return objects_of(clip)


def test_grouped_equals_separate(propagator, clip, objects):
    hypotheses = [objects[:1], objects, objects[1:], objects[[2, 0]]]
    video = CountingVideo(clip[0])
    for hypothesis, found in zip(hypotheses, collect(propagator, video, hypotheses, range(2, 7))):
        (alone,) = collect(propagator, FramesInMemory(clip[0]), [hypothesis], range(2, 7))
        assert all_nearly_equal(found, alone) and (found[TARGET] == hypothesis).all()
    assert video.most_alive == 2


def test_agrees_with_the_documented_loop(propagator, clip, objects):
    """As the package's page shows it: one InferenceCore, and an index mask."""
    from cutie.inference.inference_core import InferenceCore

    (found,) = collect(propagator, FramesInMemory(clip[0]), [objects], range(TARGET, FRAMES))
    core = InferenceCore(propagator.method.network, cfg=propagator.method.network.cfg)
    index = torch.from_numpy(clip[1][TARGET].astype(np.float32))
    for t in range(TARGET, FRAMES):
        image = F.interpolate(torch.from_numpy(clip[0][t]).permute(2, 0, 1)[None] / 255, (SIZE, 130), mode="bilinear", align_corners=False)[0]
        mask = F.interpolate(index[None, None], (SIZE, 130), mode="nearest")[0, 0].long()
        with torch.inference_mode():
            probs = core.step(image, mask, objects=[1, 2, 3]) if t == TARGET else core.step(image)
            labels = core.output_prob_to_mask(F.interpolate(probs[None], (44, 60), mode="bilinear", align_corners=False)[0])
        if t > TARGET:
            assert np.mean((labels.numpy() == np.arange(1, 4)[:, None, None]) != found[t]) < 1e-3


def test_frames_too_small_for_its_memory(checkpoint, clip, objects):
    small = Propagator.load(config(checkpoint, size=0))
    with pytest.raises(ValueError, match="frames of 44x60 are too small for Cutie; set segmentation.propagation.size to 96 or more"):
        small.propagate_rle(FramesInMemory(clip[0]), TARGET, [objects])


def test_memory_does_not_grow_with_the_video(checkpoint, clip, objects):
    """Counted in the whole process, for Cutie keeps its memory to itself; its long-term memory first fills."""
    import gc

    def tensors():
        gc.collect()
        return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) is torch.Tensor)

    propagator = Propagator.load(config(checkpoint))
    propagator.method.network.cfg.merge_with({"mem_every": 1, "long_term": {"max_num_tokens": 500, "buffer_tokens": 100}})  # full at frame 25
    tracker = propagator.method.start(clip[0][0], [objects[:1]])
    kept = {}
    for t in range(1, 51):
        tracker.step(clip[0][t % FRAMES])
        if t in (25, 30, 35, 40, 45, 50):
            kept[t] = tensors()
    assert max(kept[t] for t in (40, 45, 50)) <= 1.001 * max(kept[t] for t in (25, 30, 35)), kept


def test_another_architecture(weights, tmp_path):
    broken = dict(weights)
    del broken["key_proj.key_proj.weight"]
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match="broken.pth does not fit: 1 missing keys .key_proj.key_proj.weight"):
        Propagator.load(config(tmp_path / "broken.pth"))
