"""Loads XMem checkpoints: plain files of names and tensors, or folders of one with its dimensions, every name and shape in its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoint import CheckpointError
from ..weights import misfit, read_weights
from .config import XMemConfig, XMemDims
from .network import XMem

STEM = "value_encoder.conv1.weight"


def load_xmem(path_or_state_dict: str | Path | Mapping[str, torch.Tensor], config: XMemConfig | None = None) -> XMem:
    """An XMem in float32 on the CPU, frozen, from a `.pth` (or `.safetensors`) file, a folder, or a state dict, which is copied.

    The published `XMem.pth`, `XMem-s012.pth`, `XMem-s2.pth` and `XMem-no-sensory.pth` fit, and checkpoints of other widths
    and depths: the dimensions are read from the weights. If `config.dims` is given, or a folder's config.json, they must be
    those. Raises CheckpointError where a file cannot be read, or a name is missing, unexpected, or of another shape; it names
    the first of each.
    """
    dims = config.dims if config is not None else None
    if isinstance(path_or_state_dict, Mapping):
        name, weights = "state dict", dict(path_or_state_dict)
    else:
        name, file = f"checkpoint {path_or_state_dict}", Path(path_or_state_dict).expanduser()
        if file.is_dir():
            dims, file = dims or folder_dims(file), file / "model.safetensors"
        weights = read_weights(file, "XMem", "give the file of an XMem state dict, such as XMem.pth, or a folder with one and its config.json")
    strange = [key for key, tensor in weights.items() if not isinstance(key, str) or not isinstance(tensor, torch.Tensor)]
    if strange:
        raise CheckpointError(f"XMem {name} holds something other than named tensors (first: {strange[0]!r})", "give the plain state dict of an XMem")
    stem = weights.get(STEM)
    if stem is not None and stem.ndim == 4 and stem.shape[1] == 4:  # of a time when XMem knew one object and no "others" channel
        weights[STEM] = torch.cat([stem, torch.zeros_like(stem[:, :1])], 1)
    dims = dims or read_dims(weights)
    with torch.device("meta"):
        network = XMem(dims)
    wrong = misfit(weights, network.state_dict())
    if wrong:
        raise CheckpointError(
            f"XMem {name} does not fit: {wrong}",
            "give the whole, unchanged state dict of an XMem (a DEVA or Cutie checkpoint is none); restore or re-download the file",
        )
    network.load_state_dict({key: _own(key, tensor) for key, tensor in weights.items()}, assign=True)
    return network.eval().requires_grad_(False)


def folder_dims(folder: Path) -> XMemDims:
    """The dimensions that a folder's config.json states. Raises CheckpointError where there is none, or it is not an XMem's."""
    remedy = "give the folder of an XMem, as examples/toy/train_xmem.py writes it, or the file of one, such as XMem.pth"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
        dims = XMemDims(**config["dims"]) if model_type == "xmem" else None
    except FileNotFoundError:
        raise CheckpointError(f"XMem checkpoint {folder} is a folder without a config.json", remedy) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not state the dimensions of an XMem ({error!r})", remedy) from error
    if dims is None:
        raise CheckpointError(f"checkpoint {folder} is a {model_type!r} model, not an XMem", remedy)
    return dims


def read_dims(weights: Mapping[str, torch.Tensor]) -> XMemDims:
    """The dimensions that the shapes of a state dict imply; a published one where the key that would tell is missing."""
    official = XMemDims()

    def rows(key: str, default: int) -> int:
        return weights[key].shape[0] if key in weights and weights[key].ndim else default

    def blocks(prefix: str, default: int) -> int:
        return max((int(key[len(prefix) :].split(".")[0]) + 1 for key in weights if key.startswith(prefix)), default=default)

    key_stages = [f"key_encoder.{stage}." for stage in ("res2", "layer2", "layer3")]
    value_stages = [f"value_encoder.{stage}." for stage in ("layer1", "layer2", "layer3")]
    scales = [f"decoder.{part}.weight" for part in ("fuser.block2.conv2", "up_16_8.out_conv.conv2", "up_8_4.out_conv.conv2")]
    sensory = any(".hidden_" in key for key in weights)
    try:
        return XMemDims(
            key=rows("key_proj.key_proj.weight", official.key),
            value=rows("value_encoder.fuser.block2.conv2.weight", official.value),
            hidden=rows("decoder.hidden_update.transform.weight", 3 * official.hidden) // 3 if sensory else 0,
            key_planes=tuple(rows(f"{stage}0.conv1.weight", n) for stage, n in zip(key_stages, official.key_planes)),
            key_blocks=tuple(map(blocks, key_stages, official.key_blocks)),
            value_planes=tuple(rows(f"{stage}0.conv1.weight", n) for stage, n in zip(value_stages, official.value_planes)),
            value_blocks=tuple(map(blocks, value_stages, official.value_blocks)),
            decoder=tuple(map(rows, scales, official.decoder)),
            update=rows("decoder.hidden_update.g16_conv.weight", official.update),
        )
    except ValueError:
        return official


def _own(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float32 on the CPU; channels last, the layout in which most is convolved fastest, but for the decoder's `WideConv2d`."""
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    planes = tensor.ndim != 4 or key.startswith(("decoder.up_", "decoder.pred"))
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format if planes else torch.channels_last)
