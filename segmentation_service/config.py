"""Settings of the segmentation service: which SAM2, how many replicas, and on what they run."""

from __future__ import annotations

from dataclasses import dataclass, field

BACKENDS = ("transformers",)
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class SegmentationConfig:
    """One frozen SAM2, shared by all replicas. "auto" means CUDA and bfloat16 where a replica has a GPU, else CPU and float32."""

    checkpoint: str = field(
        default="facebook/sam2.1-hiera-large",
        metadata={"help": "SAM2 weights: a Hugging Face folder or a hub id."},
    )
    backend: str = field(default="transformers", metadata={"help": "Program that runs SAM2.", "choices": BACKENDS})
    device: str = field(default="auto", metadata={"help": "Where a replica runs; auto takes the GPU that it is given.", "choices": DEVICES})
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision of encoder and mask decoder; auto is bfloat16 on CUDA and float32 elsewhere.", "choices": DTYPES},
    )
    replicas: int = field(default=1, metadata={"help": "Segmenter actors in the trainer's placement group.", "min": 1})
    cpus_per_replica: int = field(
        default=1,
        metadata={"help": "CPU cores that each replica reserves, and its number of torch threads.", "min": 1},
    )
    max_prompts_per_batch: int = field(
        default=64,
        metadata={"help": "Most prompts decoded at a time; more are decoded in turns, which bounds memory.", "min": 1},
    )
