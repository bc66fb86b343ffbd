"""Does a folder hold a policy that can be trained? Answered from its config and the headers of its weight files, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from .policy import FAMILIES


class PolicyError(ValueError):
    """A policy checkpoint that cannot be used; the message names it, the fault and the remedy."""


def check_policy(path: str) -> None:
    """Raises PolicyError where a local folder lacks a file, is of another architecture, or its weights do not fit its config.

    A hub id passes unchecked: it has not been downloaded yet.
    """
    folder = Path(path)
    if not folder.exists():
        return
    if not (folder / "config.json").is_file():
        raise PolicyError(f"policy.path = {path} has no config.json; give a Hugging Face folder or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct")
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"{folder / 'config.json'} is not a model's configuration ({error}); restore the checkpoint") from error
    if model_type not in FAMILIES:
        raise PolicyError(f"policy.path = {path} is a {model_type!r} model; a policy is one of {', '.join(FAMILIES)}")
    found = stored_shapes(folder)
    problems = [
        f"{name} is missing" if name not in found else f"{name} is {found[name]} instead of {shape}"
        for name, shape in expected_shapes(path).items()
        if found.get(name) != shape
    ]
    if problems:
        raise PolicyError(f"the weights in {path} do not fit its config.json: {'; '.join(problems[:3])} ({len(problems)} problems); restore the checkpoint")


def expected_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every parameter that the config asks for; nothing is allocated."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from .weights import weight_metadata

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    return {name: shape for name, _, shape in weight_metadata(model)}


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the folder's safetensors files."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PolicyError(f"policy.path = {folder} holds no *.safetensors; convert or restore the checkpoint")
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except SafetensorError as error:
            raise PolicyError(f"{file} is not a readable safetensors file ({error}); restore the checkpoint") from error
    return shapes
