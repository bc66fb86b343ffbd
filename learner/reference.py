"""The policy that the KL is measured to: a frozen copy, which may be renewed from the policy as training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .batch import MicroBatch
from .config import LearnerConfig
from .engine import deepspeed_settings
from .weights import gathered

FILE = "reference.safetensors"


class Reference:
    """A policy that is run and never trained: whole on every rank, or sharded like the trained one under ZeRO-3.

    All ranks call every method alike.
    """

    def __init__(self, policy: nn.Module, config: LearnerConfig, world_size: int, dtype: torch.dtype, device: torch.device):
        policy.requires_grad_(False)
        self.policy, self.run = policy, policy
        if config.zero_stage == 3:
            import deepspeed

            settings = deepspeed_settings(config, world_size, dtype) | {"gradient_clipping": 0.0}
            self.run = deepspeed.initialize(model=policy, config=settings, dist_init_required=False)[0]
        else:
            policy.to(device)

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self.run(batch)

    def renew(self, trained: nn.Module) -> None:
        """Take over the present weights of `trained`, which is under the same ZeRO stage."""
        self._assign(_whole(trained, _learning(trained)))

    def save(self, folder: Path, trained: nn.Module, rank: int) -> None:
        """Write those of its weights that learn in `trained`; rank 0 gathers them in CPU memory."""
        whole = {name: weight.to("cpu", copy=True) for name, weight in _whole(self.policy, _learning(trained)) if rank == 0}
        if rank == 0:
            from safetensors.torch import save_file

            save_file(whole, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, by any number of ranks."""
        from safetensors.torch import load_file

        self._assign(load_file(folder / FILE).items())

    def _assign(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.policy.named_parameters())
        for name, weight in weights:
            with gathered([own[name]], modifier_rank=0), torch.no_grad():
                own[name].copy_(weight)


def _learning(trained: nn.Module) -> list[str]:
    return [name for name, parameter in trained.named_parameters() if parameter.requires_grad]


def _whole(policy: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and whole weight, one at a time and valid until the next."""
    parameters = dict(policy.named_parameters())
    for name in names:
        with gathered([parameters[name]]):
            yield name, parameters[name].detach()
