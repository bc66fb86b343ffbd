"""The learner as a Ray actor: a thin shell round `LearnerWorker`, one per rank."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from .batch import Sample
from .weights import WeightBucket


class LearnerActor:
    """Make it an actor with `ray.remote(LearnerActor).options(...)`.

    Rank 0's `address()` is asked first; `start()` then runs on all ranks at the same time, as does every later call but
    `address`. `weight_buckets` is a generator: call it with num_returns="streaming", and consume it on all ranks.
    """

    def __init__(self):
        self.worker = None

    def address(self) -> tuple[str, int]:
        """(host, a port that was free a moment ago) for the learner's process group."""
        import ray

        with socket.socket() as s:
            s.bind(("", 0))
            return ray.util.get_node_ip_address(), s.getsockname()[1]

    def start(self, **worker_arguments) -> str:
        """Load policy, optimiser and reference (arguments of LearnerWorker) -> device and type, for the log."""
        from .worker import LearnerWorker

        self.worker = LearnerWorker(**worker_arguments)
        return f"{self.worker.device} {self.worker.dtype}"

    def train_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        return self.worker.train_step(samples)

    def compute_logprobs(self, samples: Sequence[Sample]) -> list:
        return self.worker.compute_logprobs(samples)

    def weight_buckets(self, max_bytes: int) -> Iterator[WeightBucket]:
        yield from self.worker.weight_buckets(max_bytes)

    def save(self, folder: str) -> None:
        self.worker.save(folder)

    def load(self, folder: str) -> None:
        self.worker.load(folder)

    def export(self, folder: str) -> None:
        self.worker.export(folder)
