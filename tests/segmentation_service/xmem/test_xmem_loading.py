"""Loading is strict: every key and shape of the published checkpoints, other dimensions from the weights, and errors that name the fault."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from segmentation_service.checkpoint import CheckpointError
from segmentation_service.xmem import XMem, XMemConfig, XMemDims, load_xmem
from tiny_xmem import TINY


@pytest.fixture(scope="module")
def random_official(official_shapes):
    return {key: torch.zeros(shape, dtype=torch.int64) if key.endswith("tracked") else torch.full(shape, 0.01) for key, shape in official_shapes.items()}


def load_error(weights, config=None):
    with pytest.raises(CheckpointError) as caught:
        load_xmem(weights, config)
    assert caught.value.remedy and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


def test_official_keys_shapes_and_order(official_shapes):
    with torch.device("meta"):
        state = XMem().state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == official_shapes and len(state) == 412


def test_official_size_state_dict_and_file(random_official, tmp_path):
    network = load_xmem(random_official)
    assert network.dims == XMemDims() and not network.training and not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(tensor, random_official[key]) for key, tensor in network.state_dict().items())
    torch.save(random_official, tmp_path / "XMem.pth")
    assert all(torch.equal(tensor, random_official[key]) for key, tensor in load_xmem(str(tmp_path / "XMem.pth")).state_dict().items())


def test_state_dict_is_copied(tiny_weights):
    network = load_xmem(tiny_weights)
    assert not {p.data_ptr() for p in network.state_dict().values()} & {p.data_ptr() for p in tiny_weights.values()}


def test_checkpoint_without_sensory_memory(random_official):
    without = {key: tensor for key, tensor in random_official.items() if "hidden_" not in key}
    for name in ("conv1", "downsample"):
        without[f"decoder.fuser.block1.{name}.weight"] = without[f"decoder.fuser.block1.{name}.weight"][:, : 1024 + 512]
    assert load_xmem(without).dims.hidden == 0


def test_old_checkpoint_with_four_input_channels(random_official):
    stem = "value_encoder.conv1.weight"
    weight = load_xmem({**random_official, stem: random_official[stem][:, :4]}).state_dict()[stem]
    assert weight.shape[1] == 5 and torch.equal(weight[:, :4], random_official[stem][:, :4]) and not weight[:, 4].any()


def test_other_dimensions_are_read_from_the_weights(tiny_weights, tmp_path):
    assert load_xmem(tiny_weights).dims == TINY == load_xmem(tiny_weights, XMemConfig(dims=TINY)).dims
    save_file(tiny_weights, tmp_path / "tiny.safetensors")
    assert load_xmem(tmp_path / "tiny.safetensors").dims == TINY
    message = load_error(tiny_weights, XMemConfig(dims=XMemDims()))
    assert "mis-shaped keys (key_encoder.conv1.weight [4, 3, 7, 7] for [64, 3, 7, 7]" in message and "missing keys (key_encoder.res2.1.conv1.weight" in message


def test_missing_unexpected_and_mis_shaped_keys(tiny_weights):
    weights = dict(tiny_weights)
    weights["surplus"] = weights.pop("decoder.pred.bias")
    weights["key_proj.e_proj.bias"] = torch.zeros(7)
    message = load_error(weights)
    assert "1 missing keys (decoder.pred.bias)" in message and "1 unexpected keys (surplus)" in message
    assert "1 mis-shaped keys (key_proj.e_proj.bias [7] for [8])" in message
    assert "1 missing keys (key_proj.key_proj.weight)" in load_error({k: v for k, v in tiny_weights.items() if k != "key_proj.key_proj.weight"})


@pytest.mark.parametrize("key", ["value_encoder.bn1.num_batches_tracked", "decoder.hidden_update.transform.weight", "key_encoder.res2.0.conv1.weight"])
def test_any_missing_key_is_named(random_official, key):
    assert f"1 missing keys ({key})" in load_error({k: v for k, v in random_official.items() if k != key})


def test_what_is_no_state_dict(tiny_weights, tmp_path):
    assert "does not exist" in load_error(tmp_path / "nowhere.pth")
    (tmp_path / "damaged.pth").write_bytes(b"not a checkpoint")
    assert "cannot be read" in load_error(tmp_path / "damaged.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    assert "holds a Tensor, not a state dict" in load_error(tmp_path / "tensor.pth")
    torch.save({"model": tiny_weights, "step": 3}, tmp_path / "wrapped.pth")
    assert "something other than named tensors (first: 'model')" in load_error(tmp_path / "wrapped.pth")


def test_a_folder_holds_weights_and_their_dimensions(tiny_weights, tmp_path):
    config = tmp_path / "config.json"
    assert "is a folder without a config.json" in load_error(tmp_path)
    config.write_text('{"model_type": "sam2"}')
    assert "is a 'sam2' model, not an XMem" in load_error(tmp_path)
    for broken in ("[]", "{", '{"model_type": "xmem"}', '{"model_type": "xmem", "dims": {"depth": 3}}', '{"model_type": "xmem", "dims": {"key": 0}}'):
        config.write_text(broken)
        assert "config.json does not state the dimensions" in load_error(tmp_path)
    dims = load_xmem(tiny_weights).dims
    config.write_text(json.dumps({"model_type": "xmem", "dims": dataclasses.asdict(dims)}))
    assert "model.safetensors does not exist" in load_error(tmp_path)
    save_file({key: tensor.contiguous() for key, tensor in tiny_weights.items()}, tmp_path / "model.safetensors")
    network = load_xmem(tmp_path)
    assert network.dims == dims
    assert all(torch.equal(tensor, tiny_weights[key]) for key, tensor in network.state_dict().items())
    config.write_text(json.dumps({"model_type": "xmem", "dims": dataclasses.asdict(dims) | {"key": dims.key + 1}}))
    assert "mis-shaped keys (key_proj.key_proj.weight" in load_error(tmp_path)


def test_settings_are_read_without_torch():
    code = "import sys; from segmentation_service.xmem import XMemConfig, XMemDims; XMemConfig(dims=XMemDims()); assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_files_are_data_and_no_programs(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"weight": Surprise()}, tmp_path / "bad.pth")
    assert "cannot be read" in load_error(tmp_path / "bad.pth")
