"""The policy as the learner runs it: a Hugging Face vision-language model that maps a micro-batch to response log-probs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from . import shared_prompt
from .batch import MicroBatch
from .logprobs import LogProbHead

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


class PolicyModel(nn.Module):
    """Wraps the model so that DeepSpeed sees one module whose forward pass gives what the loss needs.

    model: a Qwen2.5-VL or Qwen3-VL with the `shared_prompt` attention; its language head is replaced by a LogProbHead.
    """

    def __init__(self, model: nn.Module, banned_token_ids: Collection[int], temperature: float, chunk: int):
        super().__init__()
        if not temperature > 0.0:
            raise ValueError(f"temperature = {temperature}; training needs samples drawn at a temperature above 0")
        model.lm_head = LogProbHead.replacing(model.lm_head)
        self.model = model
        self.shares_vision = False
        """Policy and reference have the same vision tower, which does not learn: the first of them that sees a micro-batch computes its features."""
        self.temperature, self.chunk = float(temperature), chunk
        vocabulary = model.config.get_text_config().vocab_size
        banned = sorted({int(i) for i in banned_token_ids})
        if banned and not 0 <= banned[0] <= banned[-1] < vocabulary:
            raise ValueError(f"banned token ids {banned[0]}..{banned[-1]} lie outside of the vocabulary of {vocabulary}")
        self.register_buffer("banned", torch.tensor(banned, dtype=torch.int64), persistent=False)

    def forward(self, batch: MicroBatch, entropy: bool = False, train_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probs (M,) of the response tokens and their entropies (M,), float32: see `chunked_logprobs`."""
        with self._features_once(batch):
            output = self.model.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, pixel_values=batch.pixel_values,
                image_grid_thw=batch.grid_thw, shared_prompt_layout=batch.layout,  # travels through transformers to our attention
            )
            hidden = output.last_hidden_state[0].index_select(0, batch.target_rows)
            if batch.pixel_values is None:
                hidden = hidden + self._unused_vision(hidden)
        return self.model.lm_head(
            hidden, batch.target_ids, temperature=self.temperature, banned=self.banned, chunk=self.chunk, entropy=entropy, train_entropy=train_entropy
        )

    @contextmanager
    def _features_once(self, batch: MicroBatch) -> Iterator[None]:
        model = self.model.model
        if not self.shares_vision:
            yield
            return
        compute = model.get_image_features

        def features(*args, **kwargs):
            if not batch.features:
                batch.features.append(compute(*args, **kwargs))
            return batch.features[0]

        model.get_image_features = features  # in this instance only, in front of the class's method
        try:
            yield
        finally:
            del model.get_image_features

    @property
    def vision_learns(self) -> bool:
        return any(p.requires_grad for name, p in self.named_parameters() if part_of(name) != "language")

    def _unused_vision(self, hidden: Tensor) -> Tensor:
        """0, by way of the vision tower: under ZeRO-3 every rank must run the same modules or all of them hang."""
        vision = self.model.config.vision_config
        side = vision.spatial_merge_size
        pixels = hidden.new_zeros(side * side, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
        grid = torch.tensor([[1, side, side]], device=hidden.device)
        features = self.model.model.get_image_features(pixels, grid)
        deepstack = getattr(features, "deepstack_features", ())  # Qwen3-VL's, each by a merger of its own
        return 0.0 * sum(feature[0].sum() for feature in (features.pooler_output, *deepstack))

    def rope_index(self, prompt_ids: np.ndarray, grid_thw: np.ndarray) -> np.ndarray:
        """M-RoPE positions (3, P) int64 of one prompt, by the model's own rule."""
        ids = torch.from_numpy(np.array(prompt_ids, np.int64))[None]
        config = self.model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        grid = torch.from_numpy(np.array(grid_thw, np.int64)) if len(grid_thw) else None
        positions, _ = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        return positions[:, 0].numpy()

    def freeze(self, parts: Collection[str]) -> None:
        for name, parameter in self.named_parameters():
            if part_of(name) in parts:
                parameter.requires_grad_(False)


def part_of(name: str) -> str:
    """The part of a policy, "language", "vision" or "projector", that a parameter belongs to."""
    if ".visual." not in name:
        return "language"
    return "projector" if "merger" in name else "vision"  # Qwen2.5-VL: visual.merger; Qwen3-VL: also visual.deepstack_merger_list


def block_of(name: str) -> str:
    """The block of a policy that a parameter belongs to: "vision", "projector", a decoder layer ("layers.3"), or the module outside of
    them ("embed_tokens", "norm", "lm_head").
    """
    if (part := part_of(name)) != "language":
        return part
    layer = re.search(r"\blayers\.\d+", name)
    return layer[0] if layer else name.rpartition(".")[0].rpartition(".")[2]


def load_model(policy_path: str, dtype: torch.dtype, gradient_checkpointing: bool = False) -> nn.Module:
    """The Hugging Face model of a folder or hub id, on the CPU, with attention over shared prompts.

    Raises ValueError for a model family that the learner does not know.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(policy_path)
    if config.model_type not in FAMILIES:
        raise ValueError(f"policy.path = {policy_path}: a {config.model_type!r} model; the learner trains {', '.join(FAMILIES)}")
    shared_prompt.register()
    implementation = {"text_config": shared_prompt.ATTENTION, "vision_config": "sdpa"}
    model = AutoModelForImageTextToText.from_pretrained(policy_path, dtype=dtype, attn_implementation=implementation)
    if getattr(config.get_text_config(), "sliding_window", None):
        raise ValueError(f"policy.path = {policy_path}: sliding-window attention is not supported by the learner")
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model

