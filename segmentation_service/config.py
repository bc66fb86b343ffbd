"""Settings of the segmentation service: which SAM2, how many replicas, on what they run, and how masks go through a video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from .xmem.config import XMemConfig

BACKENDS = ("transformers", "sam2")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
METHODS = ("xmem", "sam2", "cutie")
PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass
class PropagationConfig:
    """How masks on one frame are carried to the other frames of its video. Defaults are those of XMem's evaluation, but for `dtype`."""

    method: str = field(default="xmem", metadata={"help": "Program that carries masks through a video.", "choices": METHODS})
    checkpoint: Optional[str] = field(
        default=None,
        metadata={
            "help": "Its weights: an XMem of any dimensions, a file such as XMem.pth or a folder such as examples/toy/models/xmem; the file of a "
            "Cutie; for sam2 a folder or hub id of a SAM2 for videos, such as facebook/sam2.1-hiera-large, or a .pt file of Meta's. null: masks are "
            "not propagated."
        },
    )
    model_config: Optional[str] = field(default=None, metadata={"help": "Architecture of a SAM2's .pt file; as segmentation.model_config."})
    size: int = field(
        default=480,
        metadata={
            "help": "Short side to which frames are brought, larger or smaller; 0: they keep their size; sam2 has a size of its own. "
            "Masks come back at the frames' own.",
            "min": 0,
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision of the networks, by autocast; memory stays float32. The published program uses float16 on GPUs.",
            "choices": PRECISIONS,
        },
    )
    max_objects: int = field(
        default=64,
        metadata={"help": "Most distinct objects of a group that go through the video together; more go in turns, which bounds memory.", "min": 1},
    )
    xmem: XMemConfig = field(default_factory=XMemConfig, metadata={"help": "XMem's memory, under the published names."})


@dataclass
class SegmentationConfig:
    """One frozen SAM2, shared by all replicas. "auto" means CUDA and bfloat16 where a replica has a GPU, else CPU and float32."""

    checkpoint: str = field(
        default="facebook/sam2.1-hiera-large",
        metadata={"help": "SAM2 weights: a Hugging Face folder or a hub id; a .pt file of Meta's for the backend sam2."},
    )
    backend: str = field(default="transformers", metadata={"help": "Program that runs SAM2; sam2 is Meta's package.", "choices": BACKENDS})
    model_config: Optional[str] = field(
        default=None,
        metadata={"help": "Architecture of a .pt file: a YAML file, or a name inside the package sam2; null: told by the name of the checkpoint."},
    )
    device: str = field(default="auto", metadata={"help": "Where a replica runs; auto takes the GPU that it is given.", "choices": DEVICES})
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision of encoder and mask decoder; auto is bfloat16 on CUDA and float32 elsewhere.", "choices": DTYPES},
    )
    replicas: int = field(
        default=1, metadata={"help": "Segmenter actors in the trainer's placement group, or replicas of the Ray Serve application.", "min": 1}
    )
    cpus_per_replica: int = field(
        default=1,
        metadata={"help": "CPU cores that each replica reserves, and its number of torch threads.", "min": 1},
    )
    max_prompts_per_batch: int = field(
        default=64,
        metadata={"help": "Most prompts decoded at a time; more are decoded in turns, which bounds memory.", "min": 1},
    )
    propagation: PropagationConfig = field(default_factory=PropagationConfig, metadata={"help": "From masks on the target frame to masks on all."})
