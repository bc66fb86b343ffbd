"""How large a policy is, from its configuration alone: nothing is downloaded and no weight is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import MissingFileError

_VISION_2_5 = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
# Published configurations (config.json of each repository) of policies that may not be on this machine.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": dict(model_type="qwen2_5_vl", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, vision=_VISION_2_5),
    "Qwen/Qwen2.5-VL-7B-Instruct": dict(model_type="qwen2_5_vl", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False, vision=_VISION_2_5),
    "Qwen/Qwen2.5-VL-32B-Instruct": dict(model_type="qwen2_5_vl", hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False, vision=_VISION_2_5 | {"intermediate_size": 3456}),
    "Qwen/Qwen3-VL-8B-Instruct": dict(model_type="qwen3_vl", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=False, vision=dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16)),
}  # fmt: skip


@dataclass(frozen=True)
class PolicySize:
    """parameters: of all parts; vision: those of the vision tower and projector among them. kv_width: numbers that a layer keeps of a token, keys and values."""

    parameters: int
    vision: int
    layers: int
    width: int
    inner_width: int
    kv_width: int
    vocabulary: int

    @classmethod
    def of(cls, path: str) -> PolicySize:
        """Of a folder, or of a hub id that is cached or in `PUBLISHED`. Raises MissingFileError for another."""
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        if path in PUBLISHED and not Path(path).exists():
            config = published_config(PUBLISHED[path])
        else:
            try:
                config = AutoConfig.from_pretrained(path)
            except (OSError, ValueError) as error:
                raise MissingFileError(f"policy.path = {path} is neither a folder nor a policy whose size is known", f"give a folder, or one of {', '.join(PUBLISHED)}") from error
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        text = config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        count = lambda wanted: sum(p.numel() for name, p in model.named_parameters() if wanted in name)
        return cls(count(""), count("visual."), text.num_hidden_layers, text.hidden_size, text.intermediate_size, 2 * text.num_key_value_heads * head, text.vocab_size)


def published_config(settings: dict[str, Any]):
    """A transformers configuration of one of `PUBLISHED`: its sizes, and nothing else of it."""
    from transformers import AutoConfig

    text = {name: value for name, value in settings.items() if name not in ("model_type", "vision")}
    vision = settings["vision"] | {"out_hidden_size": settings["hidden_size"]}
    return AutoConfig.for_model(settings["model_type"], text_config=text, vision_config=vision, tie_word_embeddings=settings["tie_word_embeddings"])
