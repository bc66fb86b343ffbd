"""Floating-point operations that a training step needs, and their share of a GPU's peak: model FLOPs utilisation (MFU, PaLM,
arXiv:2204.02311, appendix B).

Counted is what the samples need once: matrix products and, of attention, the pairs that a mask leaves (PaLM counts all pairs). Not
counted: recomputed activations and logits, padding in attention's views, attention within the vision tower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .policy import part_of
from .schedule import SampleSize
from .weights import full_shape

# Dense bfloat16, FLOP/s, from NVIDIA's data sheets; a part of the name that CUDA reports.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


@dataclass(frozen=True)
class ModelSize:
    """Weights of the decoder's matrices, of the language head and (for each patch) of the vision tower, and layers x heads x head width of the decoder.

    `learns` and `vision_learns`: a forward pass costs two operations a weight and token, the backward pass two for what goes on to
    the layer before and, where the weight itself learns, two more. With adapters the decoder's weights do not.
    """

    decoder: int
    head: int
    attention: int
    vision: int
    learns: bool
    vision_learns: bool

    @classmethod
    def of(cls, policy: nn.Module) -> ModelSize:
        """Of a PolicyModel, sharded or not."""
        text, merged = policy.model.config.get_text_config(), policy.model.config.vision_config.spatial_merge_size ** 2
        sizes, learns = dict.fromkeys(("language", "vision", "projector"), 0), False
        for name, parameter in policy.model.named_parameters():
            shape, part = full_shape(parameter), part_of(name)
            if len(shape) < 2 or "embed" in name.rsplit(".", 2)[-2] or "lm_head" in name:
                continue  # norms and biases are no matrices, and a look-up multiplies nothing
            sizes[part] += math.prod(shape)
            learns |= part == "language" and parameter.requires_grad and ".lora_" not in name
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        attention = text.num_hidden_layers * text.num_attention_heads * width
        vision = sizes["vision"] + sizes["projector"] // merged  # which sees merged patches
        return cls(sizes["language"], text.vocab_size * text.hidden_size, attention, vision, learns, policy.vision_learns)


def step_flops(model: ModelSize, batches: Sequence[Sequence[SampleSize]], reference: bool, passes: int = 1) -> float:
    """Operations of `passes` passes over micro-batches of samples; prompts count once for their completions in a micro-batch.

    reference: its forward pass too, without a vision tower where that is the policy's.
    """
    tokens = responses = pairs = patches = 0
    for batch in batches:
        groups: dict[int, list[SampleSize]] = {}
        for size in batch:
            groups.setdefault(size.group, []).append(size)
        for sizes in groups.values():
            p, rows = sizes[0].prompt_tokens, [s.response_tokens - 1 for s in sizes]  # the last token predicts nothing
            tokens += p + sum(rows)
            responses += sum(rows) + len(rows)
            pairs += p * p / 2 + sum(r * (p + r / 2) for r in rows)
            patches += sizes[0].patches
    forward = 2.0 * (model.decoder * tokens + model.head * responses) + 4.0 * model.attention * pairs
    vision = 2.0 * model.vision * patches
    policy = forward * (3 if model.learns else 2) + vision * (3 if model.vision_learns else 1)
    return passes * policy + (forward + vision * model.vision_learns if reference else 0.0)


def peak_flops(device_name: str) -> float | None:
    """Of one GPU by its name, None for one that is not in `PEAKS`."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
