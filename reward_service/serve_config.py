"""Settings of the reward service as others call it: how it scores, where masks come from, what it takes on, where it listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional
from urllib.parse import urlsplit

from reward_service.config import RewardConfig
from segmentation_service.serve_config import TOKEN_VARIABLE

MIB = 2**20


@dataclass
class RewardServeConfig:
    """One Ray Serve application. Whatever is over a limit is refused with status 413, unless another is named."""

    reward: RewardConfig = field(default_factory=RewardConfig, metadata={"help": "How requests are scored that name no preset and no settings."})
    replicas: int = field(default=1, metadata={"help": "Processes that score.", "min": 1})
    cpus_per_replica: float = field(default=1.0, metadata={"help": "CPU cores that each reserves; scoring uses one.", "min": 0.0})

    segmentation: Optional[str] = field(
        default=None, metadata={"help": "URL of the segmentation service, for terms that need SAM2's masks; null: requests must bring them."}
    )
    segmentation_token: Optional[str] = field(default=None, metadata={"help": f"Its bearer token; null: that of the variable {TOKEN_VARIABLE}, if set."})
    segmentation_seconds: float = field(
        default=120.0, metadata={"help": "Most seconds that a request waits for masks; items that still lack them are invalid.", "min": 0.1}
    )

    max_items: int = field(default=1024, metadata={"help": "Most items of a request.", "min": 1, "max": 4096})
    max_objects: int = field(default=256, metadata={"help": "Most objects of a target; an item with more is invalid.", "min": 1})
    max_mask_pixels: int = field(
        default=2**28, metadata={"help": "Most pixels of an item's masks and frame, in memory at once; an item with more is invalid.", "min": 1}
    )
    max_queued_requests: int = field(default=256, metadata={"help": "Requests that each caller lets wait; more are refused with status 503.", "min": 1})
    wait_seconds: float = field(default=300.0, metadata={"help": "Most seconds until an answer; status 503 past it.", "min": 0.1})

    end_tokens: list[str] = field(
        default_factory=lambda: ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>"],
        metadata={"help": "OpenRLHF sends completions with their special tokens: these are cut off at the end."},
    )

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; beyond loopback a token is required."})
    port: int = field(default=8001, metadata={"help": "Port to listen at; 0: any free one.", "min": 0, "max": 65535})
    token: Optional[str] = field(
        default=None, metadata={"help": f"What clients must send as bearer token; null: that of the variable {TOKEN_VARIABLE}, if set."}
    )
    max_body_bytes: int = field(default=16 * MIB, metadata={"help": "Most bytes of a request.", "min": 1})
    body_seconds: float = field(default=30.0, metadata={"help": "Most seconds until a request has come; status 408 past it.", "min": 0.1})
    max_in_flight: int = field(default=256, metadata={"help": "Most HTTP requests at work or waiting; status 503 past it.", "min": 1})
    max_in_flight_per_client: int = field(
        default=256, metadata={"help": "The same of one client address; status 429 past it. Behind a proxy all clients have its address.", "min": 1}
    )


def check(config: RewardServeConfig) -> None:
    """Raises ValueError where a number is out of its range or the segmentation service is no URL; the message names the setting."""
    for name, known in config.__dataclass_fields__.items():
        least, most, value = known.metadata.get("min"), known.metadata.get("max"), getattr(config, name)
        if (least is not None and not value >= least) or (most is not None and not value <= most):
            raise ValueError(f"{name} must be {f'at least {least}' if most is None else f'between {least} and {most}'}; got {value}")
    for term in config.reward.own_terms:
        term.check()
    if config.segmentation is not None:
        url = urlsplit(config.segmentation)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"segmentation={config.segmentation!r} is no URL; write for example segmentation=http://127.0.0.1:8000")
