"""Settings of the HTTP shell: where it listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Optional


@dataclass
class HttpConfig:
    """One server. Sizes in bytes, times in seconds. Raises ValueError where it would be open to others without a token."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; beyond this machine (0.0.0.0) only with a token."})
    port: int = field(default=8000, metadata={"help": "Port; 0 takes a free one.", "min": 0, "max": 65535})
    token: Optional[str] = field(
        default=None, metadata={"help": "Requests must carry `Authorization: Bearer TOKEN`. VIDEOSEG_TOKEN in the environment sets it without showing it in `ps`."}
    )
    max_body_bytes: int = field(default=2**22, metadata={"help": "Largest request body, but for uploads.", "min": 1})
    max_upload_bytes: int = field(default=2**28, metadata={"help": "Largest upload; also what it may unpack to.", "min": 1})
    upload_quota_bytes: int = field(default=2**31, metadata={"help": "What all uploads together may take on disk.", "min": 1})
    upload_lifetime_seconds: float = field(default=3600.0, metadata={"help": "An upload is deleted this long after it came.", "above": 0})
    body_seconds: float = field(default=10.0, metadata={"help": "A request's body must have come by then (uploads: upload_seconds).", "above": 0})
    upload_seconds: float = field(default=300.0, metadata={"help": "An upload must have come and been checked by then.", "above": 0})
    request_seconds: float = field(default=120.0, metadata={"help": "A request that takes longer is given up with 503.", "above": 0})
    max_in_flight: int = field(default=256, metadata={"help": "Requests at work or in wait, of all clients; more get 503.", "min": 1})
    max_in_flight_per_client: int = field(
        default=128, metadata={"help": "The same of one client address; more get 429. Behind a proxy all clients have its address.", "min": 1}
    )

    def __post_init__(self) -> None:
        if self.token is not None and (not self.token.isascii() or not self.token.isprintable() or " " in self.token or len(self.token) < 8):
            raise ValueError("http.token must be at least 8 printable ASCII characters without spaces")
        if self.token is None and not is_loopback(self.host):
            raise ValueError(f"http.host = {self.host} lets other machines in, and http.token is not set; set VIDEOSEG_TOKEN, or listen on 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`. Names other than localhost count as open."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
