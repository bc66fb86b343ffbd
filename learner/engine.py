"""DeepSpeed round a policy: process group, settings, engine, and the frozen reference under the same ZeRO stage."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
from torch import nn

from .config import LearnerConfig
from .policy import part_of


def pick_device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """CUDA with bfloat16 where there is a GPU, else the CPU with float32; "float32" and "bfloat16" overrule the type."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return device, torch.float32 if dtype == "float32" or (dtype == "auto" and not cuda) else torch.bfloat16


def init_distributed(rank: int, world_size: int, master_addr: str, master_port: int, timeout_seconds: float) -> None:
    """Join the learner's process group: nccl on GPUs, gloo on CPUs. A second call in a process changes nothing."""
    cuda = torch.cuda.is_available()
    if not cuda:
        # Must be set before the import: otherwise DeepSpeed looks for accelerators, and says that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if torch.distributed.is_initialized():
        return
    # A shared-memory reduction that DeepSpeed would compile on first use: minutes on a slow machine, and a C++ compiler. Gloo will do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A rank has its one GPU to itself (Ray hides the others), hence local rank 0.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR=master_addr, MASTER_PORT=str(master_port))
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_seconds),
        init_method=f"tcp://{master_addr}:{master_port}", rank=rank, world_size=world_size,
    )


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
        "bf16": {"enabled": dtype == torch.bfloat16},
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


class PolicyEngine:
    """A trainable policy under DeepSpeed: forward, backward, and a step that returns the gradient norm."""

    def __init__(self, policy: nn.Module, config: LearnerConfig, world_size: int, dtype: torch.dtype):
        import deepspeed

        by_peak: dict[float, list[nn.Parameter]] = {}
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                by_peak.setdefault(config.peak_lr(part_of(name)), []).append(parameter)
        self._peaks, trainable = list(by_peak), [p for group in by_peak.values() for p in group]
        self.adam = adamw([{"params": group, "lr": peak} for peak, group in by_peak.items()], config)
        self._norm: float | None = None
        if clips_itself(config, dtype):
            limit = config.max_grad_norm or float("inf")
            self.adam.register_step_pre_hook(lambda *_: self._clip(trainable, limit))
        self.deepspeed, *_ = deepspeed.initialize(
            model=policy, optimizer=self.adam, model_parameters=trainable, config=deepspeed_settings(config, world_size, dtype), dist_init_required=False
        )

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def __call__(self, *args, **kwargs):
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`; their mean over ranks is what a step uses."""
        self.deepspeed.backward(loss)

    def step(self, factor: float) -> float:
        """One optimiser step on what has been accumulated, at `factor` times the peak rates -> the global gradient norm before clipping."""
        for group, peak in zip(self.adam.param_groups, self._peaks, strict=True):
            group["lr"] = factor * peak
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm() if self._norm is None else self._norm)

    def _clip(self, parameters: list[nn.Parameter], limit: float) -> None:
        self._norm = float(nn.utils.clip_grad_norm_(parameters, limit))


def frozen_engine(policy: nn.Module, config: LearnerConfig, world_size: int, dtype: torch.dtype, device: torch.device):
    """A policy that is only run, never trained: whole on every rank, or sharded like the trained one under ZeRO-3."""
    policy.requires_grad_(False)
    if config.zero_stage < 3:
        return policy.to(device)
    import deepspeed

    settings = deepspeed_settings(config, world_size, dtype) | {"gradient_clipping": 0.0}
    return deepspeed.initialize(model=policy, config=settings, dist_init_required=False)[0]
