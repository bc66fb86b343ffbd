"""Run by test_deepspeed.py in a process of its own: learners of one and of two ranks, whose results land in JSON files.

    python learner_ranks.py FOLDER PORT

DeepSpeed is imported once; three processes are forked: one learner of one rank, and two ranks of another.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_learner import BANNED, random_samples  # noqa: E402

from learner.advantages import step_advantages  # noqa: E402
from learner.config import LearnerConfig  # noqa: E402

# A large epsilon makes AdamW's first step close to plain gradient descent, so that weights show gradients.
PLAIN = LearnerConfig(lr=30.0, adam_eps=1.0, adam_beta1=0.0, weight_decay=0.0, max_grad_norm=0.0, kl_coef=0.1, tokens_per_microbatch=60, threads=1)
TRAIN = replace(PLAIN, lr=3e-3, adam_eps=1e-6, adam_beta1=0.9, max_grad_norm=0.05, warmup_steps=1, lr_schedule="cosine")

RENEWED = replace(TRAIN, lr_schedule="constant", reference_every=2)
ADAPTERS = replace(TRAIN, lr=0.02, lora_rank=4, lora_alpha=8.0)


def samples(seed=0):
    return random_samples(groups=3, completions=3, seed=seed)


class Scenarios:
    def __init__(self, folder: Path, rank: int, world_size: int, port: int):
        self.folder, self.rank, self.world_size, self.port = folder, rank, world_size, port
        self.results: dict[str, object] = {}

    def learner(self, config: LearnerConfig, policy="policy"):
        from learner.worker import LearnerWorker

        return LearnerWorker(
            config, str(self.folder / policy), rank=self.rank, world_size=self.world_size, master_port=self.port, seed=7, total_steps=4,
            temperature=0.7, banned_token_ids=BANNED,
        )

    def weights(self, learner) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for bucket in learner.weight_buckets(20_000) if bucket.data is not None for name, tensor in bucket.tensors()}

    def digest(self, learner) -> str:
        return hashlib.sha256("".join(b.sha256 for b in learner.weight_buckets(20_000) if b.sha256).encode()).hexdigest()

    def one_step(self, name: str, config: LearnerConfig, policy="policy"):
        learner = self.learner(config, policy)
        before = learner.compute_logprobs(samples())
        metrics = learner.train_step(samples())
        weights = self.weights(learner)
        if self.rank == 0:
            torch.save({"metrics": metrics, "before": before, "weights": weights}, self.folder / f"{name}_{self.world_size}.pt")
        self.results[f"{name} log-probs"] = [float(x.sum()) for x in before]
        self.results[f"{name} metrics"] = {k: v for k, v in metrics.items() if "second" not in k and k != "micro_batches"}
        return learner

    def run(self):
        for stage in (0, 2, 3):
            learner = self.one_step(f"zero{stage}", replace(PLAIN, zero_stage=stage))
        learner.export(str(self.folder / f"export_{self.world_size}"))
        self.one_step("offload", replace(PLAIN, zero_stage=3, offload="all") if self.world_size == 2 else replace(PLAIN, zero_stage=2, offload="optimizer"))
        self.in_pieces()
        self.resume(2)
        self.resume(2 if self.world_size == 1 else 3, "bfloat16")
        self.all_but_the_defaults()
        self.renewed(2 if self.world_size == 1 else 3)
        self.adapters(0 if self.world_size == 1 else 3)
        if self.world_size == 1:
            self.one_step("whole", replace(PLAIN, zero_stage=1, tokens_per_microbatch=10_000), policy="policy")
            self.one_step("tied", replace(PLAIN, zero_stage=1, kl_coef=0.0), policy="tied")
            self.resume(0)
            self.left_out(0)
            self.left_out(2)
            self.at_rest()
            self.rates_of_parts()
            self.several_updates()
        else:
            self.resume(3)
            self.left_out(3)
            self.fewer_samples_than_ranks()

    def resume(self, stage: int, dtype: str = "float32"):
        """Three steps in one go, and two, a checkpoint, a new learner, and the third."""
        config, name = replace(TRAIN, zero_stage=stage, dtype=dtype), f"{stage}" if dtype == "float32" else f"{stage}_{dtype}"
        straight = self.learner(config)
        history = [straight.train_step(samples(seed)) for seed in (1, 2)]
        folder = self.folder / f"checkpoint{name}_{self.world_size}"
        straight.save(str(folder))
        straight.export(str(folder) + "_export")
        history.append(straight.train_step(samples(3)))
        resumed = self.learner(config)
        resumed.load(str(folder))
        again = resumed.train_step(samples(3))
        same = all(history[-1][key] == again[key] for key in ("loss", "grad_norm", "lr", "kl", "entropy"))
        self.results[f"resume{name}"] = {
            "metrics equal": same, "weights equal": self.digest(straight) == self.digest(resumed), "moved": history[-1]["kl"] > 0,
            "grad_norms": [m["grad_norm"] for m in history], "lrs": [m["lr"] for m in history], "losses": [m["loss"] for m in history],
        }
        if name == "2":
            other = replace(config, zero_stage=0)
            try:
                self.learner(other).load(str(folder))
            except Exception as error:
                self.results["other stage"] = f"{type(error).__name__}: {error}"

    def in_pieces(self):
        """Two steps whose samples come a group at a time, the first step's all before `train_step`, beside the same steps at once; by every optimizer of DeepSpeed's."""
        alone = {"zero0": dict(zero_stage=0, mask_overlong=True), "zero2": dict(zero_stage=2), "offload": dict(zero_stage=2, offload="optimizer")}
        together = {"bfloat16": dict(zero_stage=1, dtype="bfloat16"), "zero3": dict(zero_stage=3), "sequence": dict(zero_stage=1, loss_aggregation="sequence")}
        for name, way in (alone if self.world_size == 1 else together).items():
            config = replace(TRAIN, lr_schedule="constant", warmup_steps=0, **way)
            whole, pieces = self.learner(config), self.learner(config)
            steps = [[replace(s, truncated=i % 4 == 0) for i, s in enumerate(samples(seed))] for seed in (1, 2)]
            expected = [whole.train_step(step) for step in steps]
            groups = [[s for s in steps[0] if s.group == g] for g in dict.fromkeys(s.group for s in steps[0])]
            for group in groups:
                pieces.accumulate(group)
            first = pieces.train_step([])
            pieces.accumulate(steps[1][:3])
            found = [first, pieces.train_step(steps[1][3:])]
            a, b = self.weights(whole), self.weights(pieces)  # empty but on rank 0
            error = [max((float((a[k] - b[k]).float().norm() / a[k].float().norm()) for k in a), default=0.0)]
            torch.distributed.broadcast_object_list(error)
            keys = ("loss", "grad_norm", "kl", "entropy", "lr", "samples", "response_tokens", "mismatch_abs", *(k for k in expected[0] if k.startswith("grad_norm/")))
            self.results[f"in pieces, {name}"] = {
                "expected": [{k: m[k] for k in keys} for m in expected], "found": [{k: m[k] for k in keys} for m in found],
                "error": error[0],
            }

    def renewed(self, stage: int):
        """Five steps with a reference that is renewed after the second and the fourth; the fourth and fifth again from a checkpoint of the third."""
        config, folder = replace(RENEWED, zero_stage=stage), self.folder / f"renewed{stage}_{self.world_size}"
        learner = self.learner(config)
        metrics = [learner.train_step(samples(seed)) for seed in (1, 2, 3)]
        learner.save(str(folder))
        metrics += [learner.train_step(samples(seed)) for seed in (4, 5)]
        resumed = self.learner(config)
        resumed.load(str(folder))
        again = [resumed.train_step(samples(seed)) for seed in (4, 5)]
        self.results["renewed"] = {
            "kls": [m["kl"] for m in metrics], "norms": [m["grad_norm"] for m in metrics],
            "resumed": [m["kl"] for m in again] == [m["kl"] for m in metrics[3:]] and self.digest(resumed) == self.digest(learner),
        }

    def elsewhere(self):
        """The third step of `resume`, from the checkpoint that the other number of ranks wrote."""
        for stage in (0, 2, 3):
            folder = self.folder / f"checkpoint{stage}_{3 - self.world_size}"
            if folder.exists():
                learner = self.learner(replace(TRAIN, zero_stage=stage))
                learner.load(str(folder))
                metrics = learner.train_step(samples(3))
                self.results[f"elsewhere{stage}"] = {"steps": learner.steps, **{key: metrics[key] for key in ("loss", "grad_norm", "lr")}}
        if self.world_size == 1:
            learner = self.learner(replace(ADAPTERS, zero_stage=3))
            learner.load(str(self.folder / "adapters3_2"))
            renewed = self.learner(replace(RENEWED, zero_stage=3))
            renewed.load(str(self.folder / "renewed3_2"))
            self.results["renewed elsewhere"] = renewed.train_step(samples(4))["kl"]
            self.results["adapters elsewhere"] = learner.train_step(samples(3))["loss"]

    def left_out(self, stage: int):
        """Between two good steps one whose loss overflows, one whose gradient does, and one whose gradient is too large: as if they had not been."""
        config = replace(TRAIN, zero_stage=stage, lr_schedule="constant", warmup_steps=0, skip_above=100.0)
        learner, undisturbed = self.learner(config), self.learner(config)
        bad = [[replace(s, advantage=s.advantage * factor) for s in samples(4)] for factor in (3e38, 1e30, 1e6)]
        metrics = [learner.train_step(step) for step in (samples(1), *bad, samples(2))]
        for seed in (1, 2):
            undisturbed.train_step(samples(seed))
        halves = self.learner(replace(config, minibatches=2))
        bad_group = [replace(s, advantage=3e38 * s.advantage) if s.group == samples(4)[0].group else s for s in samples(4)]
        left_out = halves.train_step(bad_group)["updates_left_out"]
        self.results[f"left out {stage}"] = {
            "of two updates": left_out,
            "in a row": [m["skipped_in_a_row"] for m in metrics], "norms": [m["grad_norm"] for m in metrics],
            "losses": [m["loss"] for m in metrics[1:4]], "equal": self.digest(learner) == self.digest(undisturbed),
        }

    def adapters(self, stage: int):
        """Two steps that train adapters only, a checkpoint, a third step; the merged weights as a policy of their own; and the third step again."""
        config = replace(ADAPTERS, zero_stage=stage)
        learner, folder = self.learner(config), self.folder / f"adapters{stage}_{self.world_size}"
        metrics = [learner.train_step(samples(seed)) for seed in (1, 2)]
        learner.save(str(folder))
        learner.export(str(folder) + "_export")
        logprobs = learner.compute_logprobs(samples())
        before, after = (load_file(path / "model.safetensors") for path in (self.folder / "policy", Path(f"{folder}_export")))
        changes = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
        alone = self.learner(replace(config, lora_rank=0), policy=f"{folder.name}_export").compute_logprobs(samples())
        metrics.append(learner.train_step(samples(3)))
        resumed = self.learner(config)
        resumed.load(str(folder))
        again = resumed.train_step(samples(3))
        self.results["adapters"] = {
            "changed": sorted({name.rpartition("layers.")[2].split(".", 1)[1] for name in changes}),
            "ranks": sorted({int(torch.linalg.matrix_rank(change, rtol=1e-4)) for change in changes.values()}),
            "kls": [m["kl"] for m in metrics], "losses": [m["loss"] for m in metrics], "merged error": max(float(abs(a - b).max()) for a, b in zip(logprobs, alone)),
            "resumed": again["loss"] == metrics[-1]["loss"] and self.digest(learner) == self.digest(resumed),
        }

    def at_rest(self):
        learner = self.learner(replace(TRAIN, lr=0.0, zero_stage=2))
        start, logprobs = self.digest(learner), learner.compute_logprobs(samples())
        metrics = [learner.train_step(samples(seed)) for seed in range(20)]
        after = learner.compute_logprobs(samples())
        self.results["at rest"] = {
            "weights": self.digest(learner) == start, "logprobs": all((a == b).all() for a, b in zip(logprobs, after)), "kl": [m["kl"] for m in metrics],
        }

    def all_but_the_defaults(self):
        """Two steps with every other way to compute the loss; the KL of the second goes into its rewards, token by token."""
        config = replace(
            PLAIN, lr=2.0, zero_stage=2, advantage="reinforce++", kl_in="reward", kl_estimator="k1", kl_clamp=None, ratio_level="sequence", tis_level="sequence",
            loss_aggregation="sequence", mask_overlong=True, entropy_coef=0.05, dual_clip=3.0, minibatches=2,
        )
        learner, first = self.learner(config), [replace(s, truncated=i % 4 == 0) for i, s in enumerate(samples())]
        start = learner.compute_logprobs(first)
        metrics = [learner.train_step(first)]
        kls, now = learner.reference_kl(first), learner.compute_logprobs(first)
        advantages = step_advantages(config, np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [3.0, 0.5, 0.0]]), kls)
        metrics.append(learner.train_step([replace(s, advantage=a) for s, a in zip(first, sum(advantages, []))]))
        self.results["all but the defaults"] = {
            "kl error": max(float(abs(kl - (b - a)).max()) for kl, a, b in zip(kls, start, now)), "kl": float(np.concatenate(kls).mean()),
            "numbers": [m[k] for m in metrics for k in ("loss", "grad_norm", "entropy", "ratio", "tis_weight", "mismatch_kl")],
            "masked": metrics[0]["masked_samples"], "kl in the loss": "kl" in metrics[0],
        }

    def rates_of_parts(self):
        """The largest change of a weight of each part: AdamW's first step is as long as its learning rate."""
        first_step = replace(TRAIN, lr=1e-3, adam_eps=1e-12, max_grad_norm=0.0, warmup_steps=0, lr_schedule="constant")
        for stage, vision, projector in ((2, 0.0, 0.0), (0, 4e-3, 5e-4), (3, 4e-3, None)):
            learner = self.learner(replace(first_step, zero_stage=stage, vision_lr=vision, projector_lr=projector))
            before = self.weights(learner)
            learner.train_step(samples())
            longest = dict.fromkeys(("language", "vision", "projector"), 0.0)
            for name, after in self.weights(learner).items():
                part = "language" if "visual" not in name else "projector" if "merger" in name else "vision"
                longest[part] = max(longest[part], float((after - before[name]).abs().max()))
            self.results[f"rates, ZeRO {stage}, {vision}, {projector}"] = longest

    def several_updates(self):
        learner = self.learner(replace(TRAIN, ppo_epochs=2, minibatches=2, lr=0.03, clip_low=0.02, clip_high=0.02, warmup_steps=0))
        metrics = learner.train_step(samples())
        self.results["several updates"] = {k: metrics[k] for k in ("updates", "clip_low_fraction", "clip_high_fraction", "ratio", "mismatch_abs")}
        single = self.learner(TRAIN).train_step(samples())
        self.results["several updates"]["first mismatch"] = single["mismatch_abs"]

    def fewer_samples_than_ranks(self):
        for stage in (2, 3):
            learner = self.learner(replace(PLAIN, zero_stage=stage))
            self.results[f"one sample {stage}"] = learner.train_step(samples()[:1])["loss"]


def main(folder: Path, rank: int, world_size: int, port: int, what: str):
    torch.set_num_threads(1)
    scenarios = Scenarios(folder, rank, world_size, port)
    getattr(scenarios, what)()
    (folder / f"{what}_{world_size}_{rank}.json").write_text(json.dumps(scenarios.results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  imported before the fork, once for all
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

    import learner.worker  # noqa: F401

    base, first_port = Path(sys.argv[1]), int(sys.argv[2])
    context = multiprocessing.get_context("fork")
    for wave, what in enumerate(("run", "elsewhere")):
        children = [context.Process(target=main, args=(base, r, n, first_port + 2 * wave + n, what)) for r, n in ((0, 1), (0, 2), (1, 2))]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            sys.exit(1)
