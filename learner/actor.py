"""The learner as a Ray actor: a thin shell round `LearnerWorker`, one per rank."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from .batch import Sample
from .weights import WeightBucket


class PortInUse(ValueError):
    """The port asked for is taken."""


class LearnerActor:
    """Make it an actor with `ray.remote(LearnerActor).options(...)`.

    Rank 0's `address()` is asked first; `start()` then runs on all ranks at the same time, as does every later call but
    `address`. `weight_buckets` is a generator: call it with num_returns="streaming", and consume it on all ranks.
    """

    def __init__(self):
        self.worker = None
        self.sender = None

    def address(self, port: int | None = None) -> tuple[str, int]:
        """(host, port) for the learner's process group: `port`, or one that was free a moment ago.

        Raises PortInUse where another process has it.
        """
        import ray

        with socket.socket() as s:
            try:
                s.bind(("", port or 0))
            except OSError as error:
                raise PortInUse(f"learner.port = {port} cannot be used on rank 0's node ({error.strerror}); choose another, or null for a free one") from error
            return ray.util.get_node_ip_address(), s.getsockname()[1]

    def start(self, **worker_arguments) -> str:
        """Load policy, optimiser and reference (arguments of LearnerWorker) -> device and type, for the log."""
        from .worker import LearnerWorker

        self.worker = LearnerWorker(**worker_arguments)
        return f"{self.worker.device} {self.worker.dtype}"

    def alive(self) -> None:
        """Returns, once what was asked before is done."""

    def accumulate(self, samples: Sequence[Sample]) -> None:
        self.worker.accumulate(samples)

    def train_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        return self.worker.train_step(samples)

    def compute_logprobs(self, samples: Sequence[Sample]) -> list:
        return self.worker.compute_logprobs(samples)

    def reference_kl(self, samples: Sequence[Sample]) -> list:
        return self.worker.reference_kl(samples)

    def weight_buckets(self, max_bytes: int) -> Iterator[WeightBucket]:
        yield from self.worker.weight_buckets(max_bytes)

    def connect(self, backend: str, client, bucket_bytes: int, rendezvous: tuple[str, int, int] | None = None) -> None:
        """Join the engines for `send_weights` (GPUs only; see `gpu_sync.make_sender`)."""
        from .gpu_sync import make_sender

        self.sender = make_sender(self.worker.policy.model, backend, client, self.worker.rank, bucket_bytes, rendezvous)

    def send_weights(self, hashed: bool = False) -> dict[str, str]:
        return self.sender.send_weights(hashed)

    def save(self, folder: str) -> None:
        self.worker.save(folder)

    def load(self, folder: str) -> None:
        self.worker.load(folder)

    def export(self, folder: str) -> None:
        self.worker.export(folder)
