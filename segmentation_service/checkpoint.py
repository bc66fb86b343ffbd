"""The error that a bad SAM2 or XMem checkpoint raises, and a check of a SAM2 folder in milliseconds. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

MODEL_TYPES = ("sam2", "sam2_video")
"""Both hold the image model; the published `facebook/sam2.1-hiera-*` are of the second kind, with the video parts besides."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class CheckpointError(ValueError):
    """A SAM2 or XMem checkpoint that cannot be used. `message` names it and the fault, `remedy` says what to do; both survive pickling."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


def is_hub_id(checkpoint: str) -> bool:
    """Whether a checkpoint that is no folder can only be meant as `owner/name` on the hub."""
    parts = checkpoint.split("/")
    return not Path(checkpoint).exists() and len(parts) == 2 and all(parts) and not checkpoint.startswith((".", "~"))


def check_folder(checkpoint: str) -> None:
    """Check that a local checkpoint is a SAM2 in Hugging Face layout, without loading it; a hub id passes unchecked.

    Raises CheckpointError where the folder or one of its files is missing, or it holds another architecture.
    """
    remedy = "give a folder with a Hugging Face SAM2, or a hub id such as facebook/sam2.1-hiera-large"
    folder = Path(checkpoint).expanduser()
    if is_hub_id(checkpoint):
        return
    if folder.is_file():
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} is a file, and the transformers backend reads folders", remedy)
    if not folder.is_dir():
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} does not exist", remedy)
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except FileNotFoundError:
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} has no config.json", remedy) from None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config_file} is not a JSON object ({error})", "restore or re-download the checkpoint") from error
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"checkpoint {checkpoint} is a {model_type!r} model, not SAM2", remedy)
    for kind, names in (("weights", WEIGHTS), ("preprocessor configuration", PROCESSORS)):
        if not any((folder / name).is_file() for name in names):
            raise CheckpointError(f"SAM2 checkpoint {checkpoint} has no {kind} ({' or '.join(names[:2])})", "restore or re-download the checkpoint")
