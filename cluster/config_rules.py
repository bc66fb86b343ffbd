"""Rules between settings: combinations that cannot work, what this machine cannot do, what may change when a run is resumed."""

from __future__ import annotations

import dataclasses
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import learner.config
from cluster.config_check import Problem, named_key
from cluster.sinks import PACKAGES, not_installed

if TYPE_CHECKING:
    from cluster.config import RunConfig
    from cluster.config_resolve import Hardware

# Settings that do not change what is learned from the steps already made. A name ending in a dot stands for its section.
_MAY_CHANGE = (
    "run.sinks",
    "loop.steps",
    "loop.save_every",
    "loop.keep_checkpoints",
    "loop.keep_best",
    "loop.grace_seconds",
    "loop.learn_on_arrival",
    "loop.max_restarts",
    "loop.group_seconds",
    "loop.learn_seconds",
    "loop.score_seconds",
    "loop.score_tries",
    "loop.max_failure_rate",
    "loop.mismatch_warn",
    "loop.mismatch_stop",
    "loop.profile_step",
    "loop.log_masks_every",
    "learner.ranks",
    "learner.skip_above",
    "learner.max_skipped",
    "learner.collective_timeout_seconds",
    "learner.port",
    "learner.logprob_chunk_tokens",
    "learner.gradient_checkpointing",
    "rollout.sync_check_every",
    "rollout.sync_timeout_seconds",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_gb",
    "rollout.max_sequences",
    "rollout.log_level",
    "segmentation.replicas",
    "data.train",
    "data.evaluation",
    "data.train_frames",
    "data.evaluation_frames",
    "sft.answers",
    "sft.evaluation_answers",
    "run.dir",
    "eval.",
    "cluster.",
)


def combination_problems(config: RunConfig) -> list[Problem]:
    """Settings that are valid alone but cannot work together."""
    found: list[Problem] = []

    def refuse(wrong: bool, key: str, message: str, remedy: str) -> None:
        if wrong:
            found.append(Problem(key, message, remedy))

    rollout, learn, loop, prompt, data = config.rollout, config.learner, config.loop, config.prompt, config.data
    size, groups = rollout.group_size, rollout.prompts_per_step
    longest = prompt.max_tokens + rollout.max_response_tokens
    compares = learn.advantage != "reinforce++"
    refuse(
        compares and size < 2,
        "rollout.group_size",
        f"{size} with learner.advantage={learn.advantage}: completions are compared within their group",
        "use at least 2, or learner.advantage=reinforce++",
    )
    refuse(
        rollout.max_model_len < longest,
        "rollout.max_model_len",
        f"{rollout.max_model_len} is too small for prompt.max_tokens={prompt.max_tokens} + "
        f"rollout.max_response_tokens={rollout.max_response_tokens}",
        f"use at least {longest}, or lower one of them",
    )
    refuse(
        learn.tokens_per_microbatch < longest,
        "learner.tokens_per_microbatch",
        f"{learn.tokens_per_microbatch} cannot hold one longest sequence (prompt.max_tokens + rollout.max_response_tokens = {longest})",
        f"use at least {longest}",
    )
    refuse(
        rollout.max_images < prompt.reference_frames + 1,
        "rollout.max_images",
        f"{rollout.max_images} is less than the images of a prompt (prompt.reference_frames={prompt.reference_frames} and the target frame)",
        f"use {prompt.reference_frames + 1}",
    )
    refuse(
        rollout.top_p < 1,
        "rollout.top_p",
        f"{rollout.top_p}: the learner cannot compute the log-probs of a cut distribution",
        "use 1 for training",
    )
    for name in ("reference_size", "target_size"):
        pixels = getattr(prompt, name)
        refuse(
            len(pixels) != 2 or min(pixels) < 1, f"prompt.{name}", f"{list(pixels)} is not a height and a width in pixels", "for example [448, 448]"
        )
    refuse(
        prompt.frames_as == "video",
        "prompt.frames_as",
        "is video, which would merge frames in pairs and give Qwen2.5-VL evenly spaced times, but the frames shown are not evenly spaced and the target frame stands alone",
        "use images: every frame keeps its own time and size",
    )
    refuse(learn.minibatches > groups, "learner.minibatches", f"{learn.minibatches} is more than rollout.prompts_per_step={groups}", "lower it")
    refuse(
        learn.ranks > groups,
        "learner.ranks",
        f"{learn.ranks} ranks share the rollout.prompts_per_step={groups} groups of a step",
        "use fewer ranks or more prompts",
    )
    refuse(
        loop.deterministic and "bfloat16" in (config.policy.dtype, learn.dtype, config.segmentation.dtype),
        "loop.deterministic",
        "is promised for float32 only",
        "set policy.dtype, learner.dtype and segmentation.dtype to float32 (or auto on a CPU), or loop.deterministic=false",
    )
    refuse(
        loop.deterministic and (loop.max_staleness > 0 or loop.wait_for < 1),
        "loop.deterministic",
        f"is promised for synchronous steps that wait for all groups, not with loop.max_staleness={loop.max_staleness}, loop.wait_for={loop.wait_for:g}",
        "set loop.max_staleness=0 and loop.wait_for=1, or loop.deterministic=false",
    )
    early = loop.learn_on_arrival
    refuse(
        early and loop.deterministic, "loop.learn_on_arrival", "is true, but gradients are summed in the order in which groups arrive, and loop.deterministic=true promises one", "set one of them to false"
    )
    refuse(early and rollout.sleep, "loop.learn_on_arrival", "is true, but with rollout.sleep=true the learner works when the engines are done", "set one of them to false")
    refuse(
        early and not learn.one_update,
        "loop.learn_on_arrival",
        f"is true, but with learner.ppo_epochs={learn.ppo_epochs} and learner.minibatches={learn.minibatches} a step has several updates, the first of which needs all groups",
        "set it to false, or those to 1",
    )
    refuse(
        early and learn.advantage.startswith("reinforce++"),
        "loop.learn_on_arrival",
        f"is true, but learner.advantage={learn.advantage} compares the rewards of all groups",
        "set it to false, or use grpo, dr_grpo or rloo",
    )
    refuse(
        early and learn.kl_in_reward, "loop.learn_on_arrival", "is true, but learner.kl_in=reward needs the KL of all groups before their advantages", "set it to false, or use learner.kl_in=loss"
    )
    refuse(
        rollout.sleep and loop.max_staleness > 0,
        "rollout.sleep",
        f"is true, but with loop.max_staleness={loop.max_staleness} engines generate while the learner works",
        "set loop.max_staleness=0, or rollout.sleep=false and GPUs of their own for engines and learner",
    )
    refuse(
        loop.group_seconds <= rollout.sync_timeout_seconds,
        "loop.group_seconds",
        f"{loop.group_seconds:g} is not above rollout.sync_timeout_seconds={rollout.sync_timeout_seconds:g}, for which an engine may pause in the middle of a group",
        "raise it, or lower rollout.sync_timeout_seconds",
    )
    refuse(
        loop.late_groups == "next_step" and loop.max_staleness == 0,
        "loop.late_groups",
        "is next_step, in which late groups are one update behind, but loop.max_staleness=0 allows none",
        "set loop.max_staleness=1, or loop.late_groups=drop",
    )
    refuse(
        config.reward.weights.video_iou > 0,
        "reward.weights.video_iou",
        "needs answers that name their key frame, which training does not ask for",
        "set it to 0, or use reward.accuracy_iou=video with a formula that has it",
    )
    for term in config.reward.video_terms:
        by_accuracy = term == "accuracy_iou=video"
        refuse(
            config.segmentation.propagation.checkpoint is None,
            "reward.accuracy_iou" if by_accuracy else f"reward.weights.{term}",
            f"is {'video' if by_accuracy else 'above 0'}, which needs masks propagated through the video, and segmentation.propagation.checkpoint is null",
            f"set that to weights such as XMem.pth or examples/toy/models/xmem, or {'use reward.accuracy_iou=mask' if by_accuracy else 'set this to 0'}",
        )
    refuse(
        config.difficulty.is_online and config.difficulty.success == "mask_iou" and not (config.reward.needs_predicted_masks or config.reward.needs_video_masks),
        "difficulty.success",
        "is mask_iou, but no reward term needs masks, so training makes none",
        "use box_iou, or reward.accuracy_iou=mask or video, or a weight of mask_iou, video_quality or temporal_consistency above 0",
    )
    refuse(not data.train, "data.train", "names no data set", "for example data/toy/train")
    several = not isinstance(data.train, str)
    refuse(several and data.generate == "toy", "data.generate", "is toy, which makes one data set, but data.train is a list", "set data.generate=null")
    if data.generate == "toy" and not several:
        train, made = PurePath(data.train), PurePath(data.train).parent / "valid_u"
        refuse(train.name != "train", "data.train", f"'{train}' with data.generate=toy must end in /train", "for example data/toy/train")
        refuse(
            PurePath(data.evaluation) != made,
            "data.evaluation",
            f"'{data.evaluation}' is not the '{made}' that data.generate=toy makes",
            "use that, or data.generate=null",
        )
    refuse(
        (loop.profile_step or 0) > loop.steps, "loop.profile_step", f"is {loop.profile_step}, past the last step (loop.steps={loop.steps})", "name an earlier step, or null"
    )
    best = config.loop.keep_best
    refuse(best is not None and not config.eval.every, "loop.keep_best", f"is {best}, but nothing is evaluated during training", "set eval.every")
    refuse(
        best == "iou/video" and not (config.eval.propagate or config.reward.needs_video_masks), "loop.keep_best", "is iou/video, but no reward term propagates masks", "set eval.propagate=true, or use iou/mask"
    )
    refuse(best == "j_and_f" and not config.eval.propagate, "loop.keep_best", "is j_and_f, but eval.propagate is false", "set eval.propagate=true, or use iou/mask")
    refuse(
        config.eval.propagate and config.segmentation.propagation.checkpoint is None,
        "eval.propagate",
        "is true, and segmentation.propagation.checkpoint is null",
        "set that to weights such as XMem.pth or examples/toy/models/xmem, or this to false",
    )
    sft = config.run.task == "sft"
    measured, instead = ("the loss alone", "sft/loss") if sft else ("no such loss", "iou/box")
    refuse(
        best is not None and sft != (best == "sft/loss"), "loop.keep_best", f"is {best}, but with run.task={config.run.task} evaluations measure {measured}", f"use {instead} or null"
    )
    try:
        config.sft.thought.format(query="", count=0)
    except (KeyError, IndexError, ValueError) as error:
        found.append(Problem("sft.thought", f"{config.sft.thought!r} cannot be filled in ({type(error).__name__}: {error})", "write {query} and {count}, and other braces twice"))
    try:
        learner.config.check_config(learn)
    except ValueError as error:
        found.append(Problem(*named_key(str(error), type(config), "learner")))
    return found


def hardware_problems(config: RunConfig, hardware: Hardware, installed_build: str | None = None) -> list[Problem]:
    """What a resolved configuration asks of this machine that it does not have."""
    found: list[Problem] = []

    def refuse(wrong: bool, key: str, message: str, remedy: str) -> None:
        if wrong:
            found.append(Problem(key, message, remedy))

    cuda, gpus = config.cluster.device == "cuda", hardware.cuda_devices
    refuse(cuda and gpus == 0, "cluster.device", "is cuda, but there is no CUDA GPU here", "use cluster.device=cpu or auto")
    refuse(
        installed_build is not None and config.cluster.build != installed_build,
        "cluster.build",
        f"is {config.cluster.build}, but the {installed_build} build of vLLM is installed",
        f"run `make setup` on this machine, or set cluster.device={installed_build}",
    )
    missing = not_installed(config.run.sinks) if installed_build is not None else []
    refuse(bool(missing), "run.sinks", f"has {', '.join(missing)}, which is not installed", f"pip install {' '.join(PACKAGES[m] for m in missing)}, or leave it out")
    for term in config.reward.own_terms if config.run.task == "rl" else ():
        try:
            term.check()
        except ValueError as error:
            found.append(Problem("reward.own_terms", str(error), "or leave it out"))
    if cuda and gpus:
        c = config.cluster
        shares = config.learner.ranks * c.gpus_per_learner
        if config.run.task == "rl":
            shares += config.rollout.engines * max(c.gpus_per_engine, config.rollout.tensor_parallel if config.rollout.tensor_parallel > 1 else 0)
            shares += config.segmentation.replicas * c.gpus_per_segmenter
        refuse(config.learner.ranks > gpus, "learner.ranks", f"{config.learner.ranks} ranks need a GPU each, there are {gpus}", f"use {gpus}")
        refuse(
            shares > gpus + 1e-6,
            "cluster.gpus_per_engine",
            f"engines, segmenters and ranks reserve {shares:g} GPUs together, there are {gpus}",
            "lower cluster.gpus_per_* or rollout.engines, segmentation.replicas, learner.ranks",
        )
    return found


def weight_sync_problems(config: RunConfig) -> list[Problem]:
    """A way of syncing weights that the devices rule out (resolved configuration)."""
    method, engine_gpus = config.rollout.weight_sync, config.rollout.engines * config.rollout.tensor_parallel
    if config.cluster.device == "cpu" and method != "object_store":
        return [Problem("rollout.weight_sync", f"is {method}, which needs CUDA", "use object_store or auto on a CPU")]
    if method == "ipc" and config.rollout.tensor_parallel > 1:
        return [Problem("rollout.weight_sync", f"is ipc, which needs engines of one GPU each, but rollout.tensor_parallel={config.rollout.tensor_parallel}", "use nccl (or auto)")]
    if method == "nccl" and config.learner.ranks > 1 and config.cluster.gpus_per_learner <= 0.5:
        share = f"is {config.cluster.gpus_per_learner:g} with rollout.weight_sync=nccl and {config.learner.ranks} ranks, so two could sit on one GPU, which NCCL refuses"
        return [Problem("cluster.gpus_per_learner", share, "use 1")]
    if method == "ipc" and engine_gpus > config.learner.ranks:
        return [
            Problem(
                "rollout.weight_sync",
                f"is ipc, which needs a learner rank on every GPU of an engine: {engine_gpus} GPUs, learner.ranks={config.learner.ranks}",
                "use more ranks or fewer engines, or nccl with GPUs of their own",
            )
        ]
    return []


def may_change_on_resume(key: str) -> bool:
    """Whether a resumed run may differ from its beginning in this setting."""
    return any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in _MAY_CHANGE)


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of every setting in which two configurations differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(old):
        before, after, key = getattr(old, f.name), getattr(new, f.name), prefix + f.name
        if dataclasses.is_dataclass(before):
            found |= differences(before, after, f"{key}.")
        elif before != after:
            found[key] = (before, after)
    return found
