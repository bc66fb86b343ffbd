"""Tiny random policies of both families and random samples for them: what the learner's tests train on."""

from __future__ import annotations

import numpy as np
import torch

from learner.batch import Sample, prompt_fingerprint
from learner.patchify import PatchSpec

VOCABULARY, IMAGE, VIDEO, START, END = 300, 290, 291, 292, 293
BANNED = (IMAGE, VIDEO, START, END, *range(294, 300))
SPECS = {
    "qwen2_5_vl": PatchSpec(14, 2, 2, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "qwen3_vl": PatchSpec(16, 2, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def tiny_model(hidden=32, layers=2, vision=32, heads=4, key_heads=2, seed=0, tie=False, vocabulary=VOCABULARY, intermediate=None):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    width = hidden // heads
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate or 2 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[width // 2 - 2 * (width // 6), width // 6, width // 6]),
        ),
        vision_config=dict(
            depth=2, hidden_size=vision, intermediate_size=2 * vision, num_heads=2, out_hidden_size=hidden, patch_size=14,
            spatial_merge_size=2, window_size=56, fullatt_block_indexes=[1],
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=tie,
    )
    return _perturbed(Qwen2_5_VLForConditionalGeneration(config))


def _perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at 1, which hides mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tiny_qwen3_model(seed=0):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1], mrope_interleaved=True),
        ),
        vision_config=dict(
            depth=3, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=16, spatial_merge_size=2,
            num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )
    return _perturbed(Qwen3VLForConditionalGeneration(config))


def save_policy(folder, **options) -> str:
    from transformers import Qwen2VLImageProcessor

    tiny_model(**options).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    return str(folder)


def image_processor(spec: PatchSpec):
    """The real image processor with the settings of `spec`."""
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(patch_size=spec.patch, merge_size=spec.merge, temporal_patch_size=spec.temporal, image_mean=spec.mean, image_std=spec.std)


def random_samples(groups=3, completions=4, seed=0, images=2, grid_hw=(4, 6), text=20, response=(1, 12), vary=True, patch=14) -> list[Sample]:
    """Samples whose images have `grid_hw` patches of `patch` pixels."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        count = images if not vary else int(rng.integers(1, images + 1)) if images else 0
        pictures = tuple(rng.integers(0, 256, (patch * grid_hw[0], patch * grid_hw[1], 3), dtype=np.uint8) for _ in range(count))
        grid = np.array([[1, *grid_hw]] * count, np.int64).reshape(-1, 3)
        ids = list(rng.integers(0, 280, 3))
        for t, h, w in grid:
            ids += [START, *[IMAGE] * (t * h * w // 4), END]
        ids += list(rng.integers(0, 280, int(rng.integers(text // 2, text + 1)) if vary else text))
        prompt = np.array(ids, np.int32)
        for _ in range(completions):
            length = int(rng.integers(response[0], response[1] + 1))
            samples.append(
                Sample(
                    prompt, rng.integers(0, 280, length).astype(np.int32), rng.normal(-5.6, 0.3, length).astype(np.float32),
                    pictures, grid, group, prompt_fingerprint(prompt, pictures), advantage=float(rng.normal()),
                )
            )
    return samples


def plain_logprobs(model, sample: Sample, temperature: float, banned=BANNED):
    """Log-probs of one sample's response."""
    return plain_logprobs_and_entropy(model, sample, temperature, banned)[0]


def plain_logprobs_and_entropy(model, sample: Sample, temperature: float, banned=BANNED):
    """Both the plain way: one row, full logits, transformers' own forward pass. Differentiable."""
    ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64))[None]
    media = {}
    if sample.images:
        inputs = image_processor(SPECS[model.config.model_type])(images=list(sample.images), do_resize=False, return_tensors="pt")
        media = dict(pixel_values=inputs["pixel_values"].to(model.dtype), image_grid_thw=inputs["image_grid_thw"])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(), use_cache=False, **media).logits[0]
    logits = logits[len(sample.prompt_ids) - 1 : -1] / temperature
    logits[:, list(banned)] = float("-inf")
    log_p = torch.log_softmax(logits, -1)
    entropy = torch.distributions.Categorical(logits=logits.masked_fill(logits.isinf(), -1e9)).entropy()
    return log_p.gather(1, ids[0, len(sample.prompt_ids) :, None])[:, 0], entropy
