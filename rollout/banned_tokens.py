"""Which token ids a policy must never sample: placeholders of media, and ids that mean nothing to its tokenizer.

A sampled `<|image_pad|>` makes a later forward pass look for an image that is not there, and the padded end of the vocabulary
(Qwen2.5-VL has 152064 output rows for 151665 tokens) holds untrained rows that decode to nothing.
"""

from collections.abc import Collection

MEDIA_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>")
CONFIG_KEY = "videoseg_banned_token_ids"  # where vLLM's additional_config carries the ids to `rollout.banned_logits`
MEDIA_CONFIG_KEYS = ("image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id", "vision_end_token_id")


def holds_media_token(text: str) -> bool:
    """Whether a text would be taken for a picture's place in a prompt."""
    return any(token in text for token in MEDIA_TOKENS)


def banned_token_ids(tokenizer, model_config, vocab_size: int | None = None) -> tuple[int, ...]:
    """Sorted ids that sampling bans and that the learner masks (-inf) before its log-softmax.

    `tokenizer` and `model_config` are the Hugging Face objects; `vocab_size` is the number of logits (default: the text model's).
    """
    if vocab_size is None:
        vocab_size = model_config.get_text_config().vocab_size
    vocabulary = tokenizer.get_vocab()
    media = {vocabulary[token] for token in MEDIA_TOKENS if token in vocabulary}
    media |= {value for key in MEDIA_CONFIG_KEYS if isinstance(value := getattr(model_config, key, None), int)}
    unknown = set(range(vocab_size)) - set(vocabulary.values())
    return tuple(sorted(token for token in media | unknown if token < vocab_size))


def holds_banned(token_ids: Collection[int], banned: Collection[int]) -> bool:
    """Whether any of `token_ids` is banned."""
    return not set(banned).isdisjoint(int(token) for token in token_ids)
