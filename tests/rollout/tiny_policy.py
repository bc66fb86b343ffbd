"""Tiny random checkpoint folders of both policy families for tests: real config, tokenizer, processor and safetensors."""

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


FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def build_tiny_policy(folder, *, family="qwen2_5_vl", seed=0, tie=True, hidden=128, layers=4, scale=0.05):
    """Write a random policy of a family into `folder` (created) and return the folder as a string.

    `tie` ties the output head to the embeddings (as the small published models do); `scale` is the standard deviation of the random
    weights, large enough that distributions are far from uniform and images change them. The weights depend only on the arguments.
    """
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    folder = str(folder)
    os.makedirs(folder, exist_ok=True)
    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    model = AutoModelForImageTextToText.from_config(_config(family, ids, tie, hidden, layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else scale * noise)
    model.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    return folder


def image_processor(family):
    """The image processor of a family's published checkpoints, but for smaller limits on pixels."""
    from transformers import Qwen2VLImageProcessor

    if family == "qwen2_5_vl":
        return Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=1024 * 1024, patch_size=14)
    return Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=1024 * 1024, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _config(family, ids, tie, hidden, layers):
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    text = dict(
        vocab_size=VOCAB_PADDED,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tie,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
    )
    vision = dict(hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=hidden, spatial_merge_size=2, temporal_patch_size=2)
    if family == "qwen2_5_vl":
        text |= dict(rope_theta=10000.0, rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [hidden // 32, hidden * 3 // 64, hidden * 3 // 64]})
        vision |= dict(depth=2, patch_size=14, window_size=56, fullatt_block_indexes=[1])
    else:
        side = hidden * 5 // 128
        rope = dict(rope_type="default", rope_theta=10000.0, mrope_interleaved=True, mrope_section=[hidden // 8 - 2 * side, side, side])
        text |= dict(head_dim=hidden // 4, rope_parameters=rope)
        vision |= dict(depth=3, patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    return {"qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}[family](
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tie,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


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
