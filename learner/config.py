"""Settings of the learner: optimiser, loss, batching and DeepSpeed, with ranges that `cluster.config` checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline")
SURROGATES = ("ppo", "cispo")
LEVELS = ("token", "sequence")
AGGREGATIONS = ("token", "sequence", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")
LR_SCHEDULES = ("constant", "linear", "cosine")
OFFLOADS = ("none", "optimizer", "all")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class LearnerConfig:
    """How the policy is updated. Formulas and their papers: docs/grpo.md."""

    # where it runs
    ranks: int = field(default=1, metadata={"help": "Learner processes; one GPU each where there are GPUs.", "min": 1})
    zero_stage: int = field(default=2, metadata={"help": "DeepSpeed ZeRO stage.", "min": 0, "max": 3})
    offload: str = field(
        default="none",
        metadata={"help": "What rests in CPU memory: the optimizer (ZeRO 1 or more), or all: optimizer and weights (ZeRO 3).", "choices": OFFLOADS},
    )
    dtype: str = field(
        default="auto", metadata={"help": "Weights and activations; auto: bfloat16 on CUDA, float32 elsewhere.", "choices": DTYPES}
    )
    threads: int = field(default=0, metadata={"help": "CPU threads of a rank; 0 keeps what the process has.", "min": 0})
    port: Optional[int] = field(
        default=None, metadata={"help": "Port of the ranks' process group on rank 0's node; null: any free one.", "min": 1024, "max": 65535}
    )
    collective_timeout_seconds: float = field(
        default=1800.0, metadata={"help": "A collective that takes longer than this fails instead of hanging.", "min": 1.0}
    )

    # optimiser
    lr: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW.", "min": 0.0})
    lora_rank: int = field(default=0, metadata={"help": "Rank of adapters that learn in place of the weights; 0: the weights learn.", "min": 0})
    lora_alpha: float = field(default=32.0, metadata={"help": "Adapters count alpha / rank times.", "min": 0.0})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Linear layers of the language model that get an adapter."},
    )
    vision_lr: Optional[float] = field(default=None, metadata={"help": "That of the vision tower; null: lr; 0 leaves the tower as it is.", "min": 0.0})
    projector_lr: Optional[float] = field(
        default=None, metadata={"help": "That of the projector from vision to language; null: lr; 0 leaves it as it is.", "min": 0.0}
    )
    lr_schedule: str = field(default="constant", metadata={"help": "Shape after the warm-up.", "choices": LR_SCHEDULES})
    min_lr_ratio: float = field(
        default=0.0, metadata={"help": "Last learning rate over the peak (linear and cosine).", "min": 0.0, "max": 1.0}
    )
    warmup_steps: int = field(default=0, metadata={"help": "Optimiser steps of linear warm-up.", "min": 0})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay.", "min": 0.0})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1.", "min": 0.0, "max": 0.9999})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW beta2.", "min": 0.0, "max": 0.999999})
    adam_eps: float = field(default=1e-8, metadata={"help": "AdamW epsilon.", "min": 0.0})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip gradients to this global norm; 0 never clips.", "min": 0.0})
    skip_above: Optional[float] = field(
        default=None,
        metadata={"help": "Leave an update out whose gradient norm is above this; null: only one that is not finite.", "above": 0.0},
    )
    max_skipped: int = field(default=3, metadata={"help": "Steps in a row with an update left out before the run stops.", "min": 0})

    # loss
    advantage: str = field(default="grpo", metadata={"help": "How rewards of a group become advantages.", "choices": ADVANTAGES})
    advantage_eps: float = field(default=1e-6, metadata={"help": "Added to the standard deviation of rewards.", "min": 0.0})
    surrogate: str = field(
        default="ppo",
        metadata={
            "help": "ppo: clipped probability ratio times advantage (GRPO, DAPO, GSPO); cispo: log-prob times advantage, weighted by the clipped ratio.",
            "choices": SURROGATES,
        },
    )
    ratio_level: str = field(
        default="token", metadata={"help": "Probability ratio of each token, or one of its sequence (geometric mean, as in GSPO).", "choices": LEVELS}
    )
    clip_low: float = field(
        default=0.2, metadata={"help": "Probability ratios below 1 - clip_low are clipped; 1 leaves them free from below.", "min": 0.0, "max": 1.0}
    )
    clip_high: float = field(
        default=0.2, metadata={"help": "Probability ratios above 1 + clip_high are clipped; above clip_low in DAPO (0.28).", "min": 0.0}
    )
    dual_clip: Optional[float] = field(
        default=None, metadata={"help": "Bound on the ratio where the advantage is negative (3.0 is common); null for none.", "min": 1.0}
    )
    loss_aggregation: str = field(
        default="token", metadata={"help": "Mean over all tokens of the step, over sequences, or a constant length.", "choices": AGGREGATIONS}
    )
    constant_length: int = field(
        default=2000, metadata={"help": "Tokens that each sequence's sum is divided by (loss_aggregation=constant).", "min": 1}
    )
    mask_overlong: bool = field(
        default=False, metadata={"help": "Leave completions that hit the response limit out of the loss; their rewards still count in their group."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus, which is subtracted from the loss.", "min": 0.0})
    kl_coef: float = field(default=5e-3, metadata={"help": "Weight of the KL to the reference policy; 0 loads no reference.", "min": 0.0})
    reference_every: int = field(
        default=0, metadata={"help": "Steps after which the policy becomes the new reference of the KL; 0: it stays the policy that training began from.", "min": 0}
    )
    kl_in: str = field(
        default="loss", metadata={"help": "Where the KL goes: added to the loss, or subtracted from the reward before advantages are taken.", "choices": KL_PLACES}
    )
    kl_estimator: str = field(default="k3", metadata={"help": "KL estimator of a token.", "choices": KL_ESTIMATORS})
    kl_clamp: Optional[float] = field(
        default=10.0, metadata={"help": "Largest KL of a token (10 as in verl); null for none.", "min": 0.0}
    )
    tis_cap: Optional[float] = field(
        default=2.0,
        metadata={"help": "Cap of the importance weight learner/rollout (truncated importance sampling); null turns it off.", "min": 1.0},
    )
    tis_level: str = field(
        default="token", metadata={"help": "Importance weight of each token, or one of its whole sequence (the product).", "choices": LEVELS}
    )
    ppo_epochs: int = field(default=1, metadata={"help": "Passes over the samples of a step.", "min": 1})
    minibatches: int = field(default=1, metadata={"help": "Optimiser steps of a pass; groups are dealt out to them.", "min": 1})

    # batching and memory
    tokens_per_microbatch: int = field(
        default=16384, metadata={"help": "Tokens of a micro-batch (a prompt counts once for its group).", "min": 1}
    )
    logprob_chunk_tokens: int = field(
        default=256, metadata={"help": "Response tokens whose full logits are held at a time.", "min": 1}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory, about a third slower."})
    entropy: bool = field(default=True, metadata={"help": "Measure the policy's entropy."})

    def peak_lr(self, part: str) -> float:
        """Of the language model, the vision tower or the projector."""
        own = {"language": None, "vision": self.vision_lr, "projector": self.projector_lr}[part]
        return self.lr if own is None else own

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return tuple(part for part, rate in (("vision", self.vision_lr), ("projector", self.projector_lr)) if rate == 0.0)

    @property
    def one_update(self) -> bool:
        """Whether a step has one."""
        return self.ppo_epochs == self.minibatches == 1

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0.0 and self.kl_in == "reward"


def check_config(config: LearnerConfig) -> None:
    """Raise ValueError for combinations that no single range can catch."""
    if config.loss_aggregation == "token" and config.advantage == "dr_grpo":
        # Legal, but it is not Dr. GRPO: the paper divides by a constant, so that no length is favoured. Told, not forbidden.
        import warnings

        warnings.warn("learner.advantage=dr_grpo is published with learner.loss_aggregation=constant", stacklevel=2)
    if config.surrogate == "cispo" and config.dual_clip is not None:
        raise ValueError(f"learner.dual_clip = {config.dual_clip} bounds the ppo surrogate; use null with learner.surrogate=cispo, which has clip_high")
    for key in ("vision_lr", "projector_lr"):
        if config.lora_rank and getattr(config, key):
            raise ValueError(f"learner.{key} = {getattr(config, key)}: only adapters learn with learner.lora_rank above 0; use null or 0")
    if config.lora_rank and not config.lora_targets:
        raise ValueError("learner.lora_targets is empty; name at least one linear layer, or use learner.lora_rank=0")
    if config.reference_every and (config.lora_rank or config.kl_coef == 0.0):
        reason = "learner.kl_coef = 0 loads none" if config.kl_coef == 0.0 else "with adapters it is the model without them, of which there is one copy"
        raise ValueError(f"learner.reference_every = {config.reference_every} renews the reference of the KL, but {reason}; use 0")
    least = {"none": 0, "optimizer": 1, "all": 3}[config.offload]
    if config.zero_stage < least:
        raise ValueError(f"learner.offload={config.offload} needs learner.zero_stage of at least {least}, got {config.zero_stage}")
    if config.zero_stage > 0 and config.adam_eps == 0.0:
        raise ValueError("learner.adam_eps = 0 divides by zero in the padding of ZeRO's flat buffers; use a positive value")
