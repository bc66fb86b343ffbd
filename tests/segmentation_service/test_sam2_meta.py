"""SAM2 by Meta's package: the toy weights in its layout give the masks of the other backend; files that do not fit are named."""

import builtins
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from segmentation_service import checkpoint as checkpoints
from segmentation_service.checkpoint import META_CONFIGS, CheckpointError, check_sam2, find_meta_config
from segmentation_service.config import SegmentationConfig
from segmentation_service.sam2_meta import MetaSam2, load_model
from segmentation_service.segmenter import ObjectPrompt, Segmenter

pytest.importorskip("sam2")

from meta_sam2 import meta_weights, save_as_meta

TOY = Path(__file__).resolve().parents[2] / "examples/toy/models/sam2"

pytestmark = pytest.mark.usefixtures("one_thread")

BOX, SQUARE = (48, 44, 98, 90), (110, 100, 170, 160)
PROMPTS = {
    "box": [ObjectPrompt(BOX), ObjectPrompt(SQUARE)],
    "point": [ObjectPrompt(None, ((70, 66),), (1,)), ObjectPrompt(None, ((140, 130),), (1,))],
    "points": [ObjectPrompt(None, ((70, 66), (140, 130)), (1, 0))],
    "box and point": [ObjectPrompt(BOX, ((70, 66),), (1,)), ObjectPrompt(SQUARE, ((140, 130),), (1,))],
    "box and points": [ObjectPrompt(SQUARE, ((140, 130), (20, 20)), (1, 0))],
}
HYPOTHESES = [PROMPTS["box"], PROMPTS["point"] + PROMPTS["box and point"], [], PROMPTS["box and points"] + PROMPTS["box"][:1] + PROMPTS["points"]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The toy SAM2 as a `.pt` and a `.yaml` file."""
    from transformers import Sam2Model

    return save_as_meta(Sam2Model.from_pretrained(TOY), tmp_path_factory.mktemp("meta"))


@pytest.fixture(scope="module")
def meta(files):
    return Segmenter(files[0], "sam2", device="cpu", model_config=files[1])


@pytest.fixture(scope="module")
def other():
    return Segmenter(str(TOY), device="cpu")


@pytest.fixture(scope="module")
def scene():
    """An ellipse and a rectangle on grain: uint8 (192, 192, 3), the size that the toy SAM2 sees, so that nothing is resized."""
    y, x = np.mgrid[0:192, 0:192]
    frame = np.full((192, 192, 3), 55, np.uint8)
    frame[((x - 73) / 25) ** 2 + ((y - 67) / 23) ** 2 <= 1] = (225, 45, 45)
    frame[100:161, 110:171] = (60, 95, 235)
    return np.clip(frame + np.random.default_rng(0).normal(0, 8, frame.shape), 0, 255).astype(np.uint8)


def logits(backend, frame, prompts, monkeypatch):
    """What the mask decoder says, before anything is enlarged: float32 (N, 1, h, w)."""
    seen = []
    module = __import__(type(backend).__module__, fromlist=["decode_in_batches"])
    decode = module.decode_in_batches

    def watched(*args):
        def logits_of(*points):
            seen.append(args[-1](*points))
            return seen[-1]

        return decode(*args[:-1], logits_of)

    with monkeypatch.context() as patch:
        patch.setattr(module, "decode_in_batches", watched)
        backend.decode(backend.encode(frame), prompts)
    (found,) = seen
    return found


@pytest.mark.parametrize("form", PROMPTS)
def test_logits_are_those_of_the_other_backend(meta, other, scene, form, monkeypatch):
    a, b = (logits(segmenter.backend, scene, PROMPTS[form], monkeypatch) for segmenter in (meta, other))
    assert a.shape == b.shape == (len(PROMPTS[form]), 1, 48, 48)
    assert b.abs().max() > 20 and (a - b).abs().max() < 1e-3


def test_masks_are_those_of_the_other_backend(meta, other, scene):
    for a, b in zip(meta.segment_frame(scene, HYPOTHESES), other.segment_frame(scene, HYPOTHESES)):
        assert a.shape == b.shape and (a == b).all()
        assert all(0.02 < mask.mean() < 0.5 for mask in a)


@pytest.mark.parametrize("hw", [(96, 128), (300, 200)])
def test_frames_of_other_sizes_differ_by_the_resizing_alone(meta, other, scene, hw):
    """Transformers rounds resized pixels to whole numbers, Meta's program does not."""
    from PIL import Image

    frame = np.asarray(Image.fromarray(scene).resize(hw[::-1], Image.BILINEAR))
    prompts = [ObjectPrompt(tuple(v * hw[i % 2 == 0] // 192 for i, v in enumerate(box))) for box in (BOX, SQUARE)]
    a, b = (segmenter.segment_frame(frame, [prompts])[0] for segmenter in (meta, other))
    assert a.shape == (2, *hw) and a.any((1, 2)).all() and np.mean(a != b) < 1e-3


def test_one_encoding_for_all_and_small_batches(meta, files, scene):
    backend = MetaSam2(meta.backend.model, max_prompts_per_batch=1)
    segmenter = Segmenter("", backend)
    for a, b in zip(segmenter.segment_frame(scene, HYPOTHESES), meta.segment_frame(scene, HYPOTHESES)):
        assert (a != b).mean() < 1e-4 if a.size else a.shape == b.shape
    assert segmenter.stats()["image_encodings"] == 1 and segmenter.stats()["decoded"] == 8


def test_bfloat16_keeps_coordinates_in_float32(meta, files, scene):
    low = Segmenter(files[0], "sam2", "cpu", "bfloat16", model_config=files[1])
    assert low.backend.encode(scene).features[0].dtype == torch.bfloat16
    told = []
    hooks = [
        segmenter.backend.model.sam_mask_decoder.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs), with_kwargs=True)
        for segmenter in (low, meta)
    ]
    for a, b in zip(low.segment_frame(scene, HYPOTHESES), meta.segment_frame(scene, HYPOTHESES)):
        assert np.mean(a != b) < 0.01 if a.size else not b.size
    for hook in hooks:
        hook.remove()
    half = len(told) // 2
    for key in ("sparse_prompt_embeddings", "image_pe"):
        assert half and all(a[key].dtype == torch.float32 and torch.equal(a[key], b[key]) for a, b in zip(told[:half], told[half:]))


def test_frames_out_of_the_object_store_are_read_only(meta, scene, recwarn):
    locked = scene.copy()
    locked.flags.writeable = False
    (a,), (b,) = meta.segment_frame(locked, HYPOTHESES[:1]), meta.segment_frame(scene, HYPOTHESES[:1])
    assert (a == b).all() and not [w for w in recwarn if "writ" in str(w.message)]


def load_error(*args) -> str:
    with pytest.raises(CheckpointError) as caught:
        Segmenter(args[0], "sam2", device="cpu", model_config=args[1] if len(args) > 1 else None)
    assert str(args[0]) in str(caught.value) and caught.value.remedy
    return str(caught.value)


def test_missing_files(files, tmp_path):
    assert "nowhere.pt does not exist" in load_error(str(tmp_path / "nowhere.pt"))
    assert "is a folder, and the sam2 backend reads files" in load_error(str(TOY))
    assert "does not tell its architecture; name its YAML in model_config" in load_error(files[0])
    with pytest.raises(CheckpointError, match="model_config no.yaml is neither a file nor in the package sam2.*configs/sam2.1/sam2.1_hiera_l.yaml"):
        load_model(files[0], "no.yaml")
    with pytest.raises(CheckpointError, match="is a file, and the transformers backend reads folders.*segmentation.backend=sam2 reads files"):
        Segmenter(files[0])


def test_missing_package(files, monkeypatch):
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    assert "needs the package sam2, which is not installed; pip install 'videoseg-r1[sam2]'" in load_error(*files)


def test_another_architecture(files, tmp_path):
    weights = torch.load(files[0], weights_only=True)["model"]
    named = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": weights}, named)
    assert "does not match sam2.1_hiera_t.yaml: 2" in load_error(str(named))
    broken = dict(weights, surplus=torch.zeros(2), no_mem_embed=torch.zeros(1, 1, 7))
    del broken["sam_mask_decoder.iou_token.weight"]
    torch.save({"model": broken}, tmp_path / "broken.pt")
    message = load_error(str(tmp_path / "broken.pt"), files[1])
    for fault in ("1 missing keys (sam_mask_decoder.iou_token.weight)", "1 unexpected keys (surplus)", "1 mis-shaped keys (no_mem_embed [1, 1, 7]"):
        assert fault in message
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    assert "holds a Tensor, not a state dict" in load_error(str(tmp_path / "tensor.pt"), files[1])
    half = Path(files[0]).read_bytes()
    (tmp_path / "half.pt").write_bytes(half[: len(half) // 2])
    assert "cannot be read" in load_error(str(tmp_path / "half.pt"), files[1])
    (tmp_path / "other.yaml").write_text("model: {_target_: torch.nn.Linear, in_features: 2}")
    with pytest.raises(CheckpointError, match="other.yaml is not the configuration of a SAM2"):
        load_model(files[0], str(tmp_path / "other.yaml"))


class Evil:
    def __reduce__(self):
        return builtins.exec, ("raise SystemExit('ran what the file held')",)


def test_a_checkpoint_is_not_run(files, tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    assert "cannot be read" in load_error(str(tmp_path / "evil.pt"), files[1])


def test_published_names_tell_the_architecture(tmp_path):
    assert len(META_CONFIGS) == 8
    for name in META_CONFIGS:
        (tmp_path / name).touch()
        assert find_meta_config(str(tmp_path / name)).is_file()
        check_sam2(str(tmp_path / name), "sam2")
    chosen = find_meta_config(str(tmp_path / "sam2_hiera_large.pt"), "configs/sam2.1/sam2.1_hiera_b+.yaml")
    assert chosen.name == "sam2.1_hiera_b+.yaml"


def test_a_checkpoint_of_published_size(tmp_path):
    """The published tiny model by key and shape: transformers' class, renamed, is what the package builds, and loads by its name."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    torch.manual_seed(0)
    model = Sam2VideoModel(Sam2VideoConfig(vision_config=dict(backbone_config=dict(blocks_per_stage=[1, 2, 7, 2], global_attention_blocks=[5, 7, 9]))))
    file = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": meta_weights(model.state_dict())}, file)
    loaded = load_model(str(file))
    assert loaded.sam_mask_decoder.dynamic_multimask_via_stability and loaded.image_size == 1024
    assert abs(sum(p.numel() for p in loaded.parameters()) / 1e6 - 38.9) < 0.1


def test_settings_reach_the_actor(files, scene, meta, ray_session):
    import ray

    from segmentation_service.actor import SegmenterActor

    actor = SegmenterActor.options(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}).remote(
        SegmentationConfig(checkpoint=files[0], backend="sam2", model_config=files[1], device="cpu")
    )
    try:
        assert ray.get(actor.segment_group.remote(scene, HYPOTHESES), timeout=120) == meta.segment_group(scene, HYPOTHESES)
    finally:
        ray.kill(actor)
