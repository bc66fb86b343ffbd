"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3) by peft: put in, left out for the reference, merged on the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import LearnerConfig

ADAPTER = "default"
LANGUAGE_MODEL = "language_model."


def add_adapters(model: nn.Module, config: LearnerConfig) -> None:
    """Puts an adapter on each linear layer of the language model that `lora_targets` names; nothing else of the model learns any more.

    Adapters begin as 0. Raises ValueError for a target that the language model does not have.
    """
    import peft

    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if LANGUAGE_MODEL in name and isinstance(module, nn.Linear)}
    if unknown := sorted(set(config.lora_targets) - linear):
        raise ValueError(f"learner.lora_targets: {', '.join(unknown)} is no linear layer of the language model; it has {', '.join(sorted(linear))}")
    targets = rf".*{re.escape(LANGUAGE_MODEL)}.*\.({'|'.join(config.lora_targets)})"
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets), model, ADAPTER)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each adapted weight in `model` -> its layer."""
    return {f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that training began from."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def low_rank_parts(layer: nn.Module) -> list[nn.Parameter]:
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]


def merged(layer: nn.Module) -> Tensor:
    """W + alpha / r B A, summed in float32, in W's type."""
    weight = layer.base_layer.weight.detach()
    a, b = (part.detach().float() for part in low_rank_parts(layer))
    return torch.addmm(weight.float(), b, a, alpha=layer.scaling[ADAPTER]).to(weight.dtype)
