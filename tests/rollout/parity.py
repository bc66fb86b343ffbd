"""Log-probs of a completion by a plain float32 forward pass of transformers: what engine and learner are held against."""

import numpy as np


def load_policy(folder):
    """The float32 transformers model of a checkpoint folder, in evaluation mode."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def transformers_logprobs(model, folder, prompt, response_ids, temperature, banned):
    """Float32 log-probs (R,) of `response_ids` after `prompt`."""
    every = transformers_distribution(model, folder, prompt, response_ids, temperature, banned)
    return np.take_along_axis(every, np.asarray(response_ids, np.int64)[:, None], axis=1)[:, 0]


def transformers_distribution(model, folder, prompt, response_ids, temperature, banned, resize=False):
    """Float32 log-probs (R, V) of every token where those of `response_ids` stand: banned ids masked, logits divided by the
    temperature, log-softmax. `resize` lets the processor bring the images to size.

    Note `mm_token_type_ids`: without them transformers 5 silently gives the images one-dimensional text positions.
    """
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    images = processor(images=[Image.fromarray(image) for image in prompt.images], do_resize=resize, return_tensors="pt")
    assert np.array_equal(images["image_grid_thw"].numpy(), prompt.grid_thw)
    ids = torch.as_tensor(np.concatenate([prompt.token_ids, response_ids]), dtype=torch.long)[None]
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=images["pixel_values"],
            image_grid_thw=images["image_grid_thw"],
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        ).logits[0, len(prompt.token_ids) - 1 : -1]
    logits = logits.float()
    logits[:, list(banned)] = float("-inf")
    return torch.log_softmax(logits / temperature, dim=-1).numpy()


def mean_difference(model, folder, prompt, completions, temperature, banned):
    """Mean |rollout log-prob - transformers log-prob| over all tokens of some completions of one prompt."""
    differences = [
        np.abs(completion.logprobs - transformers_logprobs(model, folder, prompt, completion.token_ids, temperature, banned)) for completion in completions
    ]
    return float(np.concatenate(differences).mean())
