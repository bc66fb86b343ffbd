"""Checkpoints load strictly, official layouts included; anything less is one clear error."""

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from segmentation_service.checkpoint import CheckpointError, check_folder, is_hub_id
from segmentation_service.segmenter import ObjectPrompt, Segmenter
from tiny_sam2 import edit_json, save_tiny_sam2


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copy(tiny_sam2, tmp_path):
    return shutil.copytree(tiny_sam2, tmp_path / "copy")


def load_error(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        Segmenter(str(folder), device="cpu")
    assert str(folder) in caught.value.message and caught.value.remedy
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


def test_missing_folder_and_files(tmp_path, copy):
    assert "does not exist" in load_error(tmp_path / "nowhere")
    (tmp_path / "sam2.pt").write_bytes(b"")
    assert "is a file" in load_error(tmp_path / "sam2.pt")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in load_error(tmp_path / "empty")
    (copy / "preprocessor_config.json").unlink()
    assert "no preprocessor configuration" in load_error(copy)
    (copy / "model.safetensors").unlink()
    assert "no weights" in load_error(copy)
    (copy / "config.json").write_text("{")
    assert "not a JSON object" in load_error(copy)


def test_another_architecture(copy):
    edit_json(copy / "config.json", model_type="qwen2_5_vl")
    assert "is a 'qwen2_5_vl' model, not SAM2" in load_error(copy)


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weight(copy):
    edit_weights(copy, lambda w: w.pop("mask_decoder.iou_token.weight"))
    assert "1 missing keys (mask_decoder.iou_token.weight)" in load_error(copy)


def test_unexpected_weight(copy):
    edit_weights(copy, lambda w: w.update(surplus=torch.zeros(2)))
    assert "1 unexpected keys (surplus)" in load_error(copy)


def test_weight_of_another_shape(copy):
    edit_weights(copy, lambda w: w.update({"no_memory_embedding": torch.zeros(1, 1, 7)}))
    assert "1 mismatched keys (no_memory_embedding [1, 1, 7] for [1, 1, 32])" in load_error(copy)


def test_truncated_weights(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot be loaded" in load_error(copy)


def test_preprocessor_of_another_size(copy):
    edit_json(copy / "preprocessor_config.json", size={"height": 128, "width": 128})
    with pytest.raises(CheckpointError, match="resizes frames to 128x128, the model expects 64x64"):
        Segmenter(str(copy), device="cpu")


def test_hub_ids_are_told_from_paths(tmp_path):
    assert is_hub_id("facebook/sam2.1-hiera-large")
    assert not is_hub_id(str(tmp_path)) and not is_hub_id("./a") and not is_hub_id("models/sam2/large") and not is_hub_id("sam2")
    check_folder("facebook/sam2.1-hiera-large")


def test_video_checkpoints_give_the_masks_of_their_image_part(tiny_sam2, tmp_path, frame):
    """The published checkpoints are of type sam2_video."""
    from transformers import Sam2Model

    folder = save_tiny_sam2(tmp_path / "video", video=True)
    segmenter = Segmenter(str(folder), device="cpu")
    image_model = Sam2Model.from_pretrained(tiny_sam2)
    weights = segmenter.backend.model.state_dict()
    assert set(weights) == set(image_model.state_dict())
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[key], saved[key]) for key in weights)
    assert segmenter.segment_frame(frame, [[ObjectPrompt((10, 10, 50, 50))]])[0].shape == (1, 60, 100)


def test_official_large_model_by_key_and_shape():
    """The architecture of facebook/sam2.1-hiera-large (224.4 M parameters, as published): every key of it that the image model
    does not ignore by name has a place of its shape in `Sam2Model`, and none is left over."""
    import re

    from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel

    vision = dict(
        backbone_config=dict(
            hidden_size=144,
            num_attention_heads=2,
            embed_dim_per_stage=[144, 288, 576, 1152],
            num_attention_heads_per_stage=[2, 4, 8, 16],
            blocks_per_stage=[2, 6, 36, 4],
            window_size_per_stage=[8, 4, 16, 8],
            global_attention_blocks=[23, 33, 43],
            window_positional_embedding_background_size=[7, 7],
        ),
        backbone_channel_list=[1152, 576, 288, 144],
    )
    with torch.device("meta"):
        video, image = Sam2VideoModel(Sam2VideoConfig(vision_config=dict(vision), enable_temporal_pos_encoding_for_object_pointers=True)), Sam2Model(Sam2Config(vision_config=dict(vision)))
    assert abs(sum(p.numel() for p in video.parameters()) / 1e6 - 224.4) < 0.1
    ignored = [re.compile(p) for p in Sam2Model._keys_to_ignore_on_load_unexpected]
    published = {k: v.shape for k, v in video.state_dict().items() if not any(p.search(k) for p in ignored)}
    assert published == {k: v.shape for k, v in image.state_dict().items()}
