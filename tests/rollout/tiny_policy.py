"""A tiny random Qwen2.5-VL checkpoint folder for tests: real config, tokenizer, processor and safetensors, about 1.5 M parameters."""

import json
import os

import numpy as np

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_PADDED = 288  # larger than the tokenizer's 264 ids, like Qwen's 152064 > 151665, so that tests see the padded part
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_policy(folder, *, seed=0, tie=True, hidden=128, layers=4, scale=0.05):
    """Write a random Qwen2.5-VL policy into `folder` (created) and return the folder as a string.

    `tie` ties the output head to the embeddings (as the 3B model does); `scale` is the standard deviation of the random
    weights, large enough that distributions are far from uniform and images change them. The weights depend only on the arguments.
    """
    import torch
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
    )

    folder = str(folder)
    os.makedirs(folder, exist_ok=True)
    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = dict(
        vocab_size=VOCAB_PADDED,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [hidden // 32, hidden * 3 // 64, hidden * 3 // 64]},
        tie_word_embeddings=tie,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
    )
    vision = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=hidden,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=56,
        fullatt_block_indexes=[1],
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tie,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else scale * noise)
    model.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=1024 * 1024, patch_size=14, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    return folder


def tiny_prompt(folder, text="the red circle", sizes=((56, 56), (56, 56), (168, 112)), seed=0, tokenizer=None):
    """A `rollout.prompts.Prompt` with one random image of each (height, width) in `sizes`, the last one the target frame."""
    from transformers import AutoTokenizer

    from rollout.prompts import Prompt, expand_pads, fingerprint

    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    rng = np.random.default_rng(seed)
    images = tuple(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes)
    grid_thw = np.array([[1, h // 14, w // 14] for h, w in sizes], np.int64)
    frames = "".join(f"{i}s: <|vision_start|><|image_pad|><|vision_end|>" for i in range(len(sizes)))
    chat = f"<|im_start|>user\n{frames}Find {text}.<|im_end|>\n<|im_start|>assistant\n"
    short_ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    token_ids = expand_pads(short_ids, tokenizer.convert_tokens_to_ids("<|image_pad|>"), grid_thw.prod(1) // 4)
    return Prompt(
        episode_id=f"tiny-{seed}",
        text=chat,
        token_ids=token_ids,
        vllm_token_ids=tuple(short_ids),
        images=images,
        grid_thw=grid_thw,
        frame_ids=tuple(range(len(sizes) - 1)),
        target_frame=len(sizes) - 1,
        policy_hw=sizes[-1],
        frame_hw=sizes[-1],
        units="pixels",
        fingerprint=fingerprint(token_ids, images),
    )
