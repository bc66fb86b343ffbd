"""Settings of the segmentation service as others call it: what it may read, how much it takes on, and where it listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from .config import SegmentationConfig

MIB, GIB = 2**20, 2**30
TOKEN_VARIABLE = "VIDEOSEG_TOKEN"


@dataclass
class ServeConfig:
    """One Ray Serve application. Whatever is over a limit is refused with status 413, unless another is named."""

    segmentation: SegmentationConfig = field(
        default_factory=SegmentationConfig, metadata={"help": "Networks, number of replicas, and CPU cores that each reserves."}
    )
    gpus_per_replica: float = field(default=0.0, metadata={"help": "GPUs that each replica reserves; a part of one is shared.", "min": 0.0})

    roots: list[str] = field(default_factory=list, metadata={"help": "Folders below which requests may name videos; nothing else is read."})
    uploads: Optional[str] = field(default=None, metadata={"help": "Folder of uploaded videos, the same for all replicas; null: no uploads."})

    batch_size: int = field(default=16, metadata={"help": "Most requests that a replica answers together.", "min": 1})
    batch_wait_seconds: float = field(
        default=0.005, metadata={"help": "How long an idle replica waits for more requests after a first; a busy one does not wait.", "min": 0.0}
    )
    cache_bytes: int = field(
        default=512 * MIB,
        metadata={"help": "Most bytes of image embeddings that a replica keeps, where it runs; 0: none. A frame takes about 8 MiB in bfloat16.", "min": 0},
    )
    max_queued_requests: int = field(
        default=128,
        metadata={"help": "Requests that each caller (a client in a process, or an HTTP proxy) lets wait; more are refused with status 503.", "min": 1},
    )
    work_seconds: float = field(default=600.0, metadata={"help": "Most seconds that one request's propagation may take.", "min": 0.1})
    wait_seconds: float = field(
        default=900.0, metadata={"help": "Most seconds until an answer, time in queues and repetitions included; status 503 past it.", "min": 0.1}
    )

    max_frames: int = field(default=10_000, metadata={"help": "Most frames of a video.", "min": 1})
    max_frame_pixels: int = field(default=3840 * 2160, metadata={"help": "Most pixels of a frame.", "min": 1})
    max_hypotheses: int = field(default=64, metadata={"help": "Most hypotheses of a request.", "min": 1})
    max_objects: int = field(default=256, metadata={"help": "Most objects of a request, all hypotheses together; their masks are in memory at once.", "min": 1})
    max_points: int = field(default=64, metadata={"help": "Most points of an object.", "min": 1})
    max_masks: int = field(default=100_000, metadata={"help": "Most masks of an answer: objects times frames.", "min": 1})

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; beyond loopback a token is required."})
    port: int = field(default=8000, metadata={"help": "Port to listen at; 0: any free one.", "min": 0, "max": 65535})
    token: Optional[str] = field(
        default=None, metadata={"help": f"What clients must send as bearer token; null: that of the variable {TOKEN_VARIABLE}, if set."}
    )
    max_body_bytes: int = field(default=MIB, metadata={"help": "Most bytes of a request's JSON.", "min": 1})
    max_upload_bytes: int = field(default=GIB, metadata={"help": "Most bytes of one uploaded video.", "min": 1})
    max_uploads_bytes: int = field(default=20 * GIB, metadata={"help": "Most bytes of all uploaded videos.", "min": 1})
    upload_seconds: float = field(default=86_400.0, metadata={"help": "How long an uploaded video is kept after its last use.", "min": 1.0})
    body_seconds: float = field(default=10.0, metadata={"help": "Most seconds until a request's JSON has come; status 408 past it.", "min": 0.1})
    upload_body_seconds: float = field(default=600.0, metadata={"help": "The same of an uploaded video, its check included.", "min": 0.1})
    max_in_flight: int = field(default=256, metadata={"help": "Most HTTP requests at work or waiting; status 503 past it.", "min": 1})
    max_in_flight_per_client: int = field(
        default=128, metadata={"help": "The same of one client address; status 429 past it. Behind a proxy all clients have its address.", "min": 1}
    )


def check(config: ServeConfig) -> None:
    """Raises ValueError where a number is below its range, or a root is no folder; the message names the setting."""
    for name, known in config.__dataclass_fields__.items():
        least, value = known.metadata.get("min"), getattr(config, name)
        if least is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    for name, folder in (*(("roots", root) for root in config.roots), *([("uploads", config.uploads)] if config.uploads else [])):
        if not Path(folder).expanduser().is_dir():
            raise ValueError(f"{name}: {folder} is no folder; create it, or name another")
    if not config.roots and not config.uploads:
        raise ValueError("neither roots nor uploads is set, so no video could be read; name folders of videos in roots")
