"""What must be equal in engines, prompts and learner for their log-probs to mean the same, and in a run that is resumed: the policy's fingerprints."""

import hashlib
import json
from pathlib import Path

from rollout.banned_tokens import banned_token_ids
from rollout.file_hashes import file_hashes


def policy_fingerprints(model: str, tokenizer=None, vocab_size: int | None = None) -> dict:
    """SHA-256 (hex) of a policy's tokenizer, chat template and image processor, its vocabulary sizes, end tokens and banned ids.

    Compare the dict of an engine with that of the folder that learner and prompt builder use: equal, or the run is wrong.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

    tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    vocab_size = vocab_size or config.get_text_config().vocab_size
    processor = AutoImageProcessor.from_pretrained(model).to_dict()
    try:
        end = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        end = config.get_text_config().eos_token_id
    return {
        "tokenizer": sha256_of({"vocabulary": tokenizer.get_vocab(), "backend": json.loads(tokenizer.backend_tokenizer.to_str())}),
        "chat_template": sha256_of(tokenizer.chat_template),
        "processor": sha256_of({key: processor.get(key) for key in _PROCESSOR_KEYS}),
        "model_type": config.model_type,
        "vocab_size": int(vocab_size),
        "tokenizer_size": len(tokenizer),
        "end_token_ids": sorted({int(token) for token in (end if isinstance(end, list) else [end]) if token is not None} | {tokenizer.eos_token_id}),
        "banned_token_ids": list(banned_token_ids(tokenizer, config, vocab_size)),
    }


def model_fingerprint(folder: str | Path) -> str:
    """SHA-256 (hex) over names and contents of a checkpoint's files: some seconds for every 10 GB, once (see `file_hashes`)."""
    digests = file_hashes(sorted(f for f in Path(folder).iterdir() if f.suffix in _MODEL_FILES))
    return hashlib.sha256(b"".join(file.name.encode() + digest for file, digest in digests.items())).hexdigest()


_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".jinja", ".model")
_PROCESSOR_KEYS = ("image_processor_type", "patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize")


def sha256_of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
