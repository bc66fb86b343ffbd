"""The error that a bad checkpoint raises, and checks of SAM2 checkpoints in milliseconds. Torch-free."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

VIDEO_TYPE = "sam2_video"
MODEL_TYPES = ("sam2", VIDEO_TYPE)
"""Both hold the image model; the published `facebook/sam2.1-hiera-*` are of the second kind, with the video parts besides."""

SAM2_FOLDER = "give a folder with a Hugging Face SAM2, or a hub id such as facebook/sam2.1-hiera-large"

META_CONFIGS = {
    f"{version}_hiera_{size}.pt": f"configs/{version}/{version}_hiera_{short}.yaml"
    for version in ("sam2.1", "sam2")
    for size, short in (("tiny", "t"), ("small", "s"), ("base_plus", "b+"), ("large", "l"))
}
"""The names of the files that Meta published, and where its package keeps their architectures."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. `message` names it and the fault, `remedy` says what to do; both survive pickling."""

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


def check_sam2(checkpoint: str, backend: str = "transformers", model_config: str | None = None) -> None:
    """Check what can be known of a checkpoint without loading it: `check_folder` or, for the backend `sam2`, `find_meta_config`."""
    if backend == "sam2":
        find_meta_config(checkpoint, model_config)
    else:
        check_folder(checkpoint)


def check_propagation(method: str, checkpoint: str, model_config: str | None = None) -> None:
    """As `check_sam2`, of the weights of a method of propagation."""
    path = Path(checkpoint).expanduser()
    if method == "sam2" and checkpoint.endswith(".pt"):
        find_meta_config(checkpoint, model_config)
    elif method == "sam2":
        check_folder(checkpoint, video=True)
    elif not path.exists():
        raise CheckpointError(f"{method} checkpoint {checkpoint} does not exist", "give its file, such as XMem.pth, or the folder of an XMem")
    elif path.is_dir() and (method != "xmem" or not (path / "model.safetensors").is_file() or _model_type(path) != "xmem"):
        raise CheckpointError(f"checkpoint {checkpoint} is not the folder of an XMem", "give one as examples/toy/train_xmem.py writes it, or the file of weights")


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_meta_config(checkpoint: str, model_config: str | None = None) -> Path:
    """The YAML file of the architecture of a checkpoint of Meta's package `sam2`, which must be a file.

    model_config: a file, or the name of one inside the package; None: told by the file name, where that is one that Meta
    published. Raises CheckpointError where a file or the package is missing, or the architecture is not known.
    """
    remedy = "give the file of a SAM2 of Meta's, such as sam2.1_hiera_large.pt, or set segmentation.backend=transformers for folders and hub ids"
    file = Path(checkpoint).expanduser()
    if not file.is_file():
        fault = "is a folder, and the sam2 backend reads files" if file.is_dir() else "does not exist"
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} {fault}", remedy)
    spec = find_spec("sam2")
    package = Path(next(iter(spec.submodule_search_locations))) if spec is not None and spec.submodule_search_locations else None
    if package is None or not (package / "build_sam.py").is_file():
        raise CheckpointError(f"SAM2 checkpoint {checkpoint} needs the package sam2, which is not installed", "pip install 'videoseg-r1[sam2]'")
    if model_config is None and file.name not in META_CONFIGS:
        raise CheckpointError(
            f"the name of SAM2 checkpoint {checkpoint} does not tell its architecture",
            f"name its YAML in model_config, or give the file one of the published names: {', '.join(META_CONFIGS)}",
        )
    named = META_CONFIGS[file.name] if model_config is None else model_config
    for candidate in (Path(named).expanduser(), package / named):
        if candidate.is_file():
            return candidate
    inside = ", ".join(sorted(META_CONFIGS.values()))
    raise CheckpointError(f"model_config {named} is neither a file nor in the package sam2", f"give a YAML file, or one of the package's: {inside}")


def check_folder(checkpoint: str, video: bool = False) -> None:
    """Check that a local checkpoint is a SAM2 in Hugging Face layout, without loading it; a hub id passes unchecked.

    Raises CheckpointError where the folder or one of its files is missing, or it holds another architecture; with video also
    where it holds an image model alone.
    """
    remedy = SAM2_FOLDER
    folder = Path(checkpoint).expanduser()
    if is_hub_id(checkpoint):
        return
    if folder.is_file():
        raise CheckpointError(
            f"SAM2 checkpoint {checkpoint} is a file, and the transformers backend reads folders", f"{remedy}; segmentation.backend=sam2 reads files of Meta's"
        )
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
    check_model_type(checkpoint, model_type, video)
    for kind, names in (("weights", WEIGHTS), ("preprocessor configuration", PROCESSORS)):
        if not any((folder / name).is_file() for name in names):
            raise CheckpointError(f"SAM2 checkpoint {checkpoint} has no {kind} ({' or '.join(names[:2])})", "restore or re-download the checkpoint")


def check_model_type(checkpoint: str, model_type: str | None, video: bool = False) -> None:
    """Raises CheckpointError where the `model_type` of a `config.json` is not SAM2's, or with video, not that of its video model."""
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"checkpoint {checkpoint} is a {model_type!r} model, not SAM2", SAM2_FOLDER)
    if video and model_type != VIDEO_TYPE:
        raise CheckpointError(
            f"SAM2 checkpoint {checkpoint} is a {model_type!r} model, which has no memory and cannot carry masks through a video",
            f"give one of model_type {VIDEO_TYPE!r}, such as facebook/sam2.1-hiera-large",
        )
