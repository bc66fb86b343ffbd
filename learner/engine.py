"""DeepSpeed round a policy: process group, settings, engine."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
from torch import nn

from .config import LearnerConfig
from .policy import block_of, part_of


def pick_device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """CUDA with bfloat16 where there is a GPU, else the CPU with float32; "float32" and "bfloat16" overrule the type."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return device, torch.float32 if dtype == "float32" or (dtype == "auto" and not cuda) else torch.bfloat16


def import_deepspeed():
    """The package, without its remarks."""
    if not torch.cuda.is_available():
        # Must be set before the import: otherwise DeepSpeed looks for accelerators, and says that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def init_distributed(rank: int, world_size: int, master_addr: str, master_port: int, timeout_seconds: float) -> None:
    """Join the learner's process group: nccl on GPUs, gloo on CPUs. A second call in a process changes nothing."""
    cuda, deepspeed = torch.cuda.is_available(), import_deepspeed()
    if torch.distributed.is_initialized():
        return
    # Gloo would listen at the address that the host's name stands for, which on many machines is the loopback's.
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_to(master_addr)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    # A shared-memory reduction that DeepSpeed would compile on first use: minutes on a slow machine, and a C++ compiler. Gloo will do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A rank has its one GPU to itself (Ray hides the others), hence local rank 0.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR=master_addr, MASTER_PORT=str(master_port))
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_seconds),
        init_method=f"tcp://{master_addr}:{master_port}", rank=rank, world_size=world_size,
    )


def interface_to(address: str) -> str | None:
    """The network interface of this machine that leads to `address`; for an address of its own, the one that has it."""
    family, kind, protocol, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as s:
        s.connect(where)  # a route is chosen, nothing is sent
        own = s.getsockname()[0]
    return next((name for name, addresses in psutil.net_if_addrs().items() if any(a.address == own for a in addresses)), None)


def deepspeed_settings(config: LearnerConfig, world_size: int, dtype: torch.dtype) -> dict:
    """DeepSpeed's configuration. Batch sizes are formal: the schedule decides what a micro-batch is.

    `managed_gradient_accumulation` off: backward passes accumulate and `step()` is the boundary, whatever their number, so
    DeepSpeed divides by nothing and the loss's own weights (over all micro-batches and ranks) are the only normalisation.
    Raises ValueError for a combination that DeepSpeed lacks.
    """
    if config.zero_stage == 0 and dtype == torch.bfloat16:
        raise ValueError("learner.zero_stage = 0 with bfloat16: DeepSpeed has no float32 gradient accumulation there; use zero_stage 1 or more")
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    offload = {"offload_optimizer": to_cpu} if config.offload != "none" else {}
    offload |= {"offload_param": to_cpu} if config.offload == "all" else {}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": False, "contiguous_gradients": True, **offload},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},  # a gradient that is not finite changes nothing
        # Many micro-batches of bfloat16 gradients would lose the small ones.
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 0.0 if clips_itself(config, dtype) else config.max_grad_norm,
        "steps_per_print": None,
    }


def clips_itself(config: LearnerConfig, dtype: torch.dtype) -> bool:
    """Without ZeRO and in float32, DeepSpeed clips but does not say what the norm was; the learner then does both."""
    return config.zero_stage == 0 and dtype == torch.float32


def adamw(groups: list[dict], config: LearnerConfig) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed's own, which it compiles on first use, where a GPU's optimizer rests in CPU memory and is stepped there."""
    settings = dict(betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, weight_decay=config.weight_decay)
    if config.offload != "none" and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)


@dataclass(frozen=True)
class Update:
    """What an optimiser step did. `norm` is the gradient's over all ranks before clipping, `blocks` that of each block (`block_of`).

    An update that was left out changed neither weights nor AdamW's moments; its norm is inf where it was not finite.
    """

    norm: float
    blocks: dict[str, float]
    left_out: bool


class PolicyEngine:
    """A trainable policy under DeepSpeed: forward, backward, and an update, which is left out where its gradient cannot be trusted."""

    def __init__(self, policy: nn.Module, config: LearnerConfig, world_size: int, dtype: torch.dtype):
        import deepspeed

        # A parameter group of its own for each block: whatever the ZeRO stage does to them, AdamW then sees the block's gradients.
        blocks: dict[str, list[nn.Parameter]] = {}
        peaks: dict[str, float] = {}
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                blocks.setdefault(block_of(name), []).append(parameter)
                peaks[block_of(name)] = config.peak_lr(part_of(name))
        self._peaks, self._trainable = list(peaks.values()), [p for group in blocks.values() for p in group]
        self._limit = float("inf") if config.skip_above is None else config.skip_above
        self._clips_itself, self._max_norm = clips_itself(config, dtype), config.max_grad_norm or float("inf")
        self._partitioned = config.zero_stage > 0
        self.deepspeed, self._norm, self._squares, self._allowed = None, float("inf"), {}, True
        self.adam = adamw([{"params": group, "lr": peaks[block], "block": block} for block, group in blocks.items()], config)
        self._adam_step, self.adam.step = self.adam.step, self._guarded_step
        self.deepspeed, *_ = deepspeed.initialize(
            model=policy, optimizer=self.adam, model_parameters=self._trainable, config=deepspeed_settings(config, world_size, dtype), dist_init_required=False
        )

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def __call__(self, *args, **kwargs):
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`; their mean over ranks is what a step uses."""
        self.deepspeed.backward(loss)

    def step(self, factor: float, finite_loss: bool = True, scale: float = 1.0) -> Update:
        """One optimiser step on `scale` times what has been accumulated, at `factor` times the peak rates.

        It is left out where loss or gradient is not finite, or the gradient's norm above `skip_above`; all ranks must agree on `finite_loss`.
        """
        for group, peak in zip(self.adam.param_groups, self._peaks, strict=True):
            group["lr"] = factor * peak
        self._norm, self._squares, self._allowed = float("inf"), {}, finite_loss
        if scale != 1.0:
            self._scale_gradients(scale)
        self.deepspeed.step()  # which does not come to AdamW's step if it finds a gradient that is not finite
        if scale != 1.0 and hasattr(self.deepspeed.optimizer, "loss_scaler"):
            self.deepspeed.optimizer.loss_scale = 1.0
        return Update(self._norm, self._block_norms(), not self._may_step())

    def _scale_gradients(self, scale: float) -> None:
        """Of the coming step. To ZeRO, gradients that are too large by a factor are those of a loss that was scaled by it."""
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "loss_scaler"):
            optimizer.loss_scale = 1.0 / scale
        else:
            flat = getattr(optimizer, "fp32_groups_gradients_flat", None)  # bfloat16 under ZeRO 1
            for gradient in [p.grad for p in self._trainable if p.grad is not None] if flat is None else flat:
                gradient.mul_(scale)

    def _may_step(self) -> bool:
        return self._allowed and self._norm <= self._limit and self._norm < float("inf")

    def _guarded_step(self, *args, **kwargs) -> None:
        """In AdamW's place: DeepSpeed comes here once for all gradients, or (ZeRO) for those of a group after another, and has taken their norm before."""
        if self.deepspeed is None:  # ZeRO makes AdamW's moments by a step
            return self._adam_step(*args, **kwargs)
        if self._clips_itself:
            self._norm = float(nn.utils.clip_grad_norm_(self._trainable, self._max_norm))
        else:
            self._norm = float(self.deepspeed.optimizer._global_grad_norm)
        if self._norm < 0.0 or self._norm != self._norm:
            self._norm = float("inf")  # ZeRO says -1
        for group in self.adam.param_groups:
            squares = [torch.linalg.vector_norm(p.grad.detach()).double().square() for p in group["params"] if p.grad is not None]
            if squares:
                self._squares[group["block"]] = self._squares.get(group["block"], 0.0) + torch.stack(squares).sum()
        if self._may_step():
            self._adam_step(*args, **kwargs)

    def _block_norms(self) -> dict[str, float]:
        """Norms before clipping: DeepSpeed has clipped all blocks alike, so that their shares of the whole norm are still right."""
        names = [group["block"] for group in self.adam.param_groups]
        squares = torch.stack([torch.as_tensor(self._squares.get(name, 0.0), dtype=torch.float64, device=self._trainable[0].device) for name in names])
        if self._partitioned:
            torch.distributed.all_reduce(squares)
        whole = squares.sum().sqrt()
        if not (self._norm < float("inf") and whole > 0.0):
            return {}
        return dict(zip(names, (squares.sqrt() * (self._norm / whole)).tolist()))
