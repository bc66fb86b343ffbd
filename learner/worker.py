"""One rank of the learner: a plain class that trains a policy under DeepSpeed on samples that it is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .batch import MicroBatch, Sample, check_fingerprints, check_samples, collate
from .checkpoint import export_policy, load_checkpoint, new_folder, save_checkpoint
from .config import LearnerConfig, check_config
from .engine import PolicyEngine, Update, init_distributed, pick_device_and_dtype
from .flops import ModelSize, peak_flops, step_flops
from .grpo import kl_to_reference, multiplicative_error, rollout_mismatch, token_sums
from .learning_rate import learning_rate
from .lora import add_adapters, without_adapters
from .loss import counted_sequences, micro_batch_loss, rescale, step_totals
from .patchify import PatchSpec
from .policy import PolicyModel, load_model
from .reference import Reference
from .schedule import schedule
from .step import Clock, Plan, Step
from .weights import WeightBucket, weight_buckets

MEANS = ("policy_loss", "kl", "clip_low", "clip_high", "dual_clip", "tis_weight", "tis_capped", "ratio", "entropy", "mismatch_kl", "mismatch_abs")


class LearnerWorker:
    """Holds a policy, its optimiser and the reference of the KL. All ranks are called alike, with the same arguments.

    config: see LearnerConfig. policy_path: Hugging Face folder or hub id; also the reference. total_steps: training steps of
    the whole run, for the learning-rate schedule. temperature, banned_token_ids: exactly as in sampling.
    """

    def __init__(
        self,
        config: LearnerConfig,
        policy_path: str,
        rank: int = 0,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int = 29500,
        seed: int = 0,
        total_steps: int = 1,
        temperature: float = 1.0,
        banned_token_ids: Collection[int] = (),
    ):
        check_config(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        init_distributed(rank, world_size, master_addr, master_port, config.collective_timeout_seconds)

        self.config, self.policy_path, self.seed, self.total_steps = config, policy_path, seed, total_steps
        self.rank, self.world_size = rank, world_size
        self.banned_token_ids = tuple(banned_token_ids)
        self.device, self.dtype = pick_device_and_dtype(config.dtype)
        self.patches = PatchSpec.from_policy(policy_path)
        self.steps, self.updates, self.skipped_in_a_row = 0, 0, 0
        self._begun: Step | None = None  # whose gradients `accumulate` has begun with

        wrap = lambda model: PolicyModel(model, banned_token_ids, temperature, config.logprob_chunk_tokens)
        policy = wrap(load_model(policy_path, self.dtype, config.gradient_checkpointing))
        policy.freeze(config.frozen_parts)
        if config.lora_rank:
            add_adapters(policy.model, config)
        policy.shares_vision = not policy.vision_learns
        self.size = ModelSize.of(policy)
        self.engine = PolicyEngine(policy, config, world_size, self.dtype)
        self.reference = None
        if config.kl_coef > 0.0 and config.lora_rank:
            self.reference = self._without_adapters
        elif config.kl_coef > 0.0:
            reference = wrap(load_model(policy_path, self.dtype))
            reference.shares_vision = policy.shares_vision
            self.reference = Reference(reference, config, world_size, self.dtype, self.device)

    @property
    def policy(self) -> PolicyModel:
        return self.engine.module

    # ---- training

    def accumulate(self, samples: Sequence[Sample]) -> None:
        """Gradients of some of the next step's samples, whole groups, while the others are on their way.

        The `train_step` that gets the others makes the update of all; its loss is that of all of them in one step, up to rounding. Only with one
        update a step. Raises ValueError, and SampleError or ScheduleError as `train_step` does.
        """
        if not self.config.one_update:
            raise ValueError("a step of several updates needs all samples before the first one: ppo_epochs and minibatches must be 1")
        self._begun, (part,), (plan,) = self._take_in(samples)
        self._begun.totals = self._begun.totals or step_totals(self.config, samples)
        self._gradients(self._begun, part, plan, before={})

    def train_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Train on all `samples` (the same list on every rank), and on those accumulated since the last step -> metrics, equal on all ranks but for seconds.

        One update by default; ppo_epochs passes of `minibatches` updates each otherwise, with the log-probs of the weights
        before the first one as the old ones. An update whose loss or gradient is not finite, or whose gradient is larger than
        `skip_above`, is left out and counted. Raises SampleError or ScheduleError before anything is computed.
        """
        step, parts, plans = self._take_in(samples)
        ahead, self._begun = self._begun is not None, None

        before: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        if self.config.ppo_epochs * len(parts) > 1:
            for part, plan in zip(parts, plans):
                for batch, _ in self._micro_batches(step.samples, part, plan, step.clock):
                    before[batch.indices] = self._no_grad_logprobs(self.engine, batch, step.clock, "old_logprobs"), self._reference(batch, step.clock)

        done, factor = [], 0.0
        for _ in range(self.config.ppo_epochs):
            for part, plan in zip(parts, plans):
                factor = self._rate_factor(len(parts))
                totals = step_totals(self.config, step.samples if ahead else [step.samples[i] for i in part])
                step.totals = step.totals if ahead else totals
                self._gradients(step, part, plan, before)
                scale = rescale(self.config, step.totals, totals)
                step.sums["loss"] += scale * step.sums["update_loss"]
                done.append(self._update(step.sums.pop("update_loss"), factor, scale))
                step.clock.lap("optimizer")
        self.steps += 1
        if self.config.reference_every and self.steps % self.config.reference_every == 0:
            self.reference.renew(self.policy)
            step.clock.lap("reference")
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if any(update.left_out for update in done) else 0
        return self._metrics(step, done, factor * self.config.lr)

    def _take_in(self, samples: Sequence[Sample]) -> tuple[Step, list[list[int]], list[Plan]]:
        """(the step that they are of, with them; the indices of them in each update; their plans)."""
        step = self._begun or Step(self.device)
        step.clock.resume()
        config, everything = self.policy.model.config, [*step.samples, *samples]
        if samples or not step.samples:  # all may have been accumulated before
            check_samples(samples, self.banned_token_ids, (config.image_token_id, config.video_token_id), self.patches.merge)
        parts = self._minibatches(everything, range(len(step.samples), len(everything)))
        plans = [self._plan(everything, part) for part in parts]
        check_fingerprints(everything, {i for plan in plans for indices in plan[self.rank] for i in indices})
        step.samples = everything
        step.plans += plans
        step.clock.lap("check")
        return step, parts, plans

    def _gradients(self, step: Step, part: Sequence[int], plan: Plan, before: Mapping[tuple[int, ...], tuple]) -> None:
        """Accumulates them, with the step's denominators. before: log-probs of the old weights and the reference, by a micro-batch's samples."""
        for batch, active in self._micro_batches(step.samples, part, plan, step.clock):
            self._accumulate(batch, step, active, before.get(batch.indices))

    def _accumulate(self, batch: MicroBatch, step: Step, active: bool, before: tuple[Tensor, Tensor | None] | None) -> None:
        """Forward and backward of one micro-batch; its share of the step's loss and per-token terms go to its sums."""
        config, sums, clock = self.config, step.sums, step.clock
        old, reference = before if before is not None else (None, self._reference(batch, clock))
        logprobs, entropy = self.engine(batch, entropy=config.entropy, train_entropy=config.entropy_coef > 0.0)
        old = logprobs.detach() if old is None else old
        loss, terms = micro_batch_loss(config, batch, step.totals, logprobs, old, reference, entropy, active)
        clock.lap("forward")
        # DeepSpeed takes the mean of gradients over ranks; the weights above are already those of the sum over ranks.
        self.engine.backward(loss * self.world_size)
        clock.lap("backward")
        if active:
            terms |= rollout_mismatch(old, batch.rollout_logprobs)
            terms |= {"entropy": entropy.detach()} if config.entropy else {}
            counted = counted_sequences(config, batch)[batch.sequence]
            for name, value in token_sums(terms, counted).items():
                sums[name] += value
            sums["update_loss"] += loss.detach()
            sums["tokens"] += counted.sum()
            sums["row_tokens"] += batch.input_ids.numel()
            sums["attention_rows"] += batch.layout.padded_to_packed.numel()
            sums["max_mismatch"] = torch.maximum(sums["max_mismatch"], terms["mismatch_abs"].max().double())

    def _update(self, loss: Tensor, factor: float, scale: float) -> Update:
        """One optimiser step on `scale` times the accumulated gradients; `loss` is theirs. All ranks agree on whether it is finite before any weight changes."""
        torch.distributed.all_reduce(loss)
        self.updates += 1
        return self.engine.step(factor, bool(torch.isfinite(loss)), scale)

    def _rate_factor(self, minibatches: int) -> float:
        """The learning rate over its peak."""
        c = self.config
        total = self.total_steps * c.ppo_epochs * max(minibatches, c.minibatches)
        return learning_rate(self.updates, total, 1.0, c.warmup_steps, c.lr_schedule, c.min_lr_ratio)

    # ---- batches

    def _minibatches(self, samples: Sequence[Sample], some: Sequence[int]) -> list[list[int]]:
        """Indices, among `some`, of each update of a pass: whole groups, dealt out at random (by seed and step) if there are several."""
        groups: dict[int, list[int]] = {}
        for i in some:
            groups.setdefault(samples[i].group, []).append(i)
        count = max(1, min(self.config.minibatches, len(groups)))
        order = list(groups.values())
        if count > 1:
            order = [order[k] for k in np.random.default_rng([self.seed, self.steps]).permutation(len(order))]
        return [sorted(i for members in order[k::count] for i in members) for k in range(count)]

    def _plan(self, samples: Sequence[Sample], part: Sequence[int]) -> Plan:
        """The same on every rank."""
        if not part:
            return [[] for _ in range(self.world_size)]
        hidden = self.policy.model.config.get_text_config().hidden_size
        plan = schedule([samples[i].size for i in part], self.world_size, self.config.tokens_per_microbatch, hidden)
        return [[[part[k] for k in indices] for indices in share] for share in plan]

    def _micro_batches(self, samples, part, plan, clock: Clock) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's micro-batches on its device, and whether they count: an empty one is filled with the part's shortest sample."""
        filler = min(part, key=lambda i: (len(samples[i].prompt_ids) + len(samples[i].response_ids), i), default=None)
        for indices in plan[self.rank]:
            batch = collate(samples, indices or [filler], self.patches, self.policy.rope_index, self.device, self.dtype)
            clock.lap("collate")
            yield batch, bool(indices)

    def _no_grad_logprobs(self, model, batch: MicroBatch, clock: Clock, lap: str) -> Tensor:
        with torch.no_grad():
            logprobs, _ = model(batch)
        clock.lap(lap)
        return logprobs

    def _without_adapters(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The policy that training began from, out of the one copy of its weights."""
        with without_adapters(self.policy.model):
            return self.engine(batch)

    def _reference(self, batch: MicroBatch, clock: Clock) -> Tensor | None:
        """For the KL in the loss; None without it."""
        if self.reference is None or self.config.kl_in_reward:
            return None
        return self._no_grad_logprobs(self.reference, batch, clock, "reference")

    def compute_logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Log-probs float32 (R,) of every sample's response under the present weights, on every rank."""
        clock = Clock(self.device)
        return self._for_each_sample(samples, clock, lambda batch: self._no_grad_logprobs(self.engine, batch, clock, "forward"))

    def reference_kl(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Per-token KL float32 (R,) of the present weights to the reference, of every sample, on every rank; their advantages
        play no part. Raises ValueError if there is no reference (kl_coef = 0).
        """
        if self.reference is None:
            raise ValueError("learner.kl_coef = 0 loads no reference; use a positive value with learner.kl_in=reward")
        clock, c = Clock(self.device), self.config

        def kl(batch: MicroBatch) -> Tensor:
            logprobs = self._no_grad_logprobs(self.engine, batch, clock, "forward")
            return kl_to_reference(logprobs, self._no_grad_logprobs(self.reference, batch, clock, "reference"), c.kl_estimator, c.kl_clamp)

        return self._for_each_sample(samples, clock, kl)

    def _for_each_sample(self, samples: Sequence[Sample], clock: Clock, compute: Callable[[MicroBatch], Tensor]) -> list[np.ndarray]:
        """Per-token values (M,) of micro-batches, computed by all ranks -> those of each sample, on every rank."""
        config = self.policy.model.config
        check_samples(samples, self.banned_token_ids, (config.image_token_id, config.video_token_id), self.patches.merge)
        part, own = list(range(len(samples))), {}
        for batch, active in self._micro_batches(samples, part, self._plan(samples, part), clock):
            values = compute(batch).cpu()
            if active:
                own |= {i: piece.numpy() for i, piece in zip(batch.indices, values.split(batch.lengths.tolist()))}
        shares: list[dict] = [{}] * self.world_size
        torch.distributed.all_gather_object(shares, own)
        everything = {i: piece for share in shares for i, piece in share.items()}
        return [everything[i] for i in part]

    # ---- metrics

    def _metrics(self, step: Step, done: list[Update], rate: float) -> dict[str, float]:
        samples, sums, plans, clock = step.samples, step.sums, step.plans, step.clock
        names = ("loss", "tokens", "row_tokens", "attention_rows", *MEANS)
        total = torch.stack([sums[name] for name in names])
        largest = sums["max_mismatch"]
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        values = dict(zip(names, total.tolist()))
        mean = {name: values[name] / max(1.0, values["tokens"]) for name in MEANS}
        rename = {"clip_low": "clip_low_fraction", "clip_high": "clip_high_fraction", "dual_clip": "dual_clip_fraction", "tis_capped": "tis_capped_fraction"}
        metrics = {rename.get(name, name): value for name, value in mean.items()}
        if self.reference is None or self.config.kl_in_reward:
            del metrics["kl"]
        if not self.config.entropy:
            del metrics["entropy"]
        if self.config.mask_overlong:
            metrics["masked_samples"] = float(sum(s.truncated for s in samples))
        seconds, measured = clock.total(), [update for update in done if update.blocks]
        return metrics | {
            "loss": values["loss"] / len(done),
            "multiplicative_error": multiplicative_error(mean["mismatch_abs"]),
            "max_mismatch": float(largest),
            "grad_norm": float(np.mean([update.norm for update in done])),
            **{f"grad_norm/{block}": float(np.mean([u.blocks[block] for u in measured])) for block in (measured[0].blocks if measured else ())},
            "lr": rate,
            "updates": float(len(done)),
            "updates_left_out": float(sum(update.left_out for update in done)),
            "skipped_in_a_row": float(self.skipped_in_a_row),
            "micro_batches": float(sum(len(plan[self.rank]) for plan in plans)),
            "samples": float(len(samples)),
            "response_tokens": float(sum(len(s.response_ids) for s in samples)),
            "row_tokens": values["row_tokens"] / self.config.ppo_epochs,
            "attention_padding": 1.0 - values["row_tokens"] / values["attention_rows"],
            "seconds": seconds,
            "response_tokens_per_second": values["tokens"] / seconds,
            **self._utilisation(samples, plans, seconds),
            **{f"seconds_{name}": value for name, value in clock.laps.items()},
        }

    def _utilisation(self, samples: Sequence[Sample], plans, seconds: float) -> dict[str, float]:
        """Operations a second of one rank, in units of 1e12, and on a known GPU in bfloat16 their share of its peak."""
        batches = [[samples[i].size for i in indices] for plan in plans for share in plan for indices in share]
        flops = step_flops(self.size, batches, self.reference is not None and not self.config.kl_in_reward, self.config.ppo_epochs) / self.world_size
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" and self.dtype == torch.bfloat16 else None
        return {"tflops_per_second": flops / seconds / 1e12} | ({"mfu": flops / seconds / peak} if peak else {})

    # ---- weights and checkpoints

    def weight_buckets(self, max_bytes: int) -> Iterator[WeightBucket]:
        """The policy's weights; every rank must consume its iterator to the end. Data on rank 0 only."""
        return weight_buckets(self.policy.model, max_bytes, self.rank)

    def save(self, folder: str) -> None:
        """Checkpoint to `folder`, which must not exist yet."""
        state = self._identity() | {"world_size": self.world_size, "steps": self.steps, "updates": self.updates}
        with new_folder(folder, self.rank) as writing:
            save_checkpoint(self.engine.deepspeed, writing, self.rank, state)
            if self._reference_was_renewed():
                self.reference.save(writing, self.policy, self.rank)

    def load(self, folder: str) -> None:
        """Continue from a checkpoint of the same ZeRO stage, type and adapters: to the last bit with as many ranks, else up to rounding.

        Raises CheckpointError.
        """
        state = load_checkpoint(self.engine.deepspeed, folder, self.rank, self.world_size, self._identity())
        self.steps, self.updates = state["steps"], state["updates"]
        if self._reference_was_renewed():
            self.reference.load(Path(folder))

    def _reference_was_renewed(self) -> bool:
        return 0 < self.config.reference_every <= self.steps

    def export(self, folder: str) -> None:
        """The policy as a Hugging Face folder, which must not exist yet."""
        export_policy(self.policy.model, self.policy_path, folder, self.rank)

    def _identity(self) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"zero_stage": self.config.zero_stage, "dtype": dtype, "lora_rank": self.config.lora_rank}
