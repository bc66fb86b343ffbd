"""The settings that belong to no package: the run, its policy and data, the loop, the evaluations, the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

KEEP_BEST = ("reward/mean", "iou/box", "iou/mask", "iou/video", "j_and_f", "sft/loss")
TASKS = ("rl", "sft")
SINKS = ("tensorboard", "prometheus", "wandb", "mlflow")
CONTROLS = ("none", "shuffled_queries", "blank_frames")


@dataclass
class RunSection:
    task: str = field(
        default="rl",
        metadata={"help": "What the run does: rl, or sft (`videoseg sft`), supervised fine-tuning on answers to the same prompts.", "choices": TASKS},
    )
    name: str = field(default="auto", metadata={"help": "Name of the run's folder; auto: recipe, date and time."})
    dir: str = field(default="runs", metadata={"help": "Folder that holds the runs, relative to the current folder."})
    sinks: list[str] = field(
        default_factory=lambda: ["tensorboard", "prometheus"],
        metadata={"help": "Where numbers go besides metrics.jsonl; wandb and mlflow read their own environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI).", "choices": SINKS},
    )
    recipe: str = field(default="auto", metadata={"help": "Where the settings came from; auto: the recipe's file name."})
    seed: int = field(
        default=0, metadata={"help": "Seed of everything random: order of episodes, target frames, sampling.", "min": 0, "max": 2**31 - 1}
    )


@dataclass
class PolicyConfig:
    path: str = field(default="Qwen/Qwen2.5-VL-7B-Instruct", metadata={"help": "Policy to train: a Hugging Face folder or a hub id."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the policy in the engines; auto: bfloat16 on a GPU that has it, else float32.",
            "choices": ("auto", "float32", "bfloat16"),
        },
    )


@dataclass
class WeightedData:
    """One of the data sets that training draws from."""

    path: str = field(metadata={"help": "Episodes: a folder with Parquet shards, or one file."})
    weight: float = field(default=1.0, metadata={"help": "Its share of the draws, relative to the other weights.", "above": 0.0, "max": 1e9})


@dataclass
class DataConfig:
    """Where the episodes are."""

    train: str | list[WeightedData] = field(
        default="data/train",
        metadata={"help": "Training episodes: a folder with Parquet shards, or one file; or several, as [{path: A, weight: 2}, {path: B, weight: 1}]."},
    )
    evaluation: str = field(default="data/valid", metadata={"help": "Held-out episodes, of the same form."})
    generate: Optional[str] = field(
        default=None,
        metadata={"help": "toy: make the toy world where `train` is missing, as OUT/train and OUT/valid_u; null: none.", "choices": ("toy",)},
    )
    min_target_share: float = field(
        default=0.001, metadata={"help": "Target frames are those that the targets cover by at least this share.", "min": 0.0, "max": 1.0}
    )
    train_frames: Optional[str] = field(
        default=None,
        metadata={
            "help": "File of `videoseg sample-frames` for `train`: the frames shown and the target frame; null: reference frames evenly, the "
            "target frame drawn from those in which the target can be seen."
        },
    )
    evaluation_frames: Optional[str] = field(default=None, metadata={"help": "The same for `evaluation`."})
    snap_target_frame: bool = field(
        default=True,
        metadata={"help": "Move a sampled target frame to the nearest annotated frame in which the target can be seen; false: it must be annotated."},
    )
    check_seconds: float = field(
        default=5.0, metadata={"help": "Longest look through each data set's videos before a run starts.", "min": 0.0}
    )
    max_broken_share: float = field(
        default=0.2,
        metadata={"help": "No run starts when more than this share of the videos looked at is broken; the episodes of fewer are left out.", "min": 0.0, "max": 1.0},
    )
    decoders: int = field(default=2, metadata={"help": "Processes that decode the frames of the next step's episodes.", "min": 1, "max": 256})
    decode_seconds: float = field(
        default=60.0, metadata={"help": "Longest that the frames of one episode may take to decode; past it the episode is left out.", "above": 0.0}
    )
    frame_cache_gb: float = field(default=0.5, metadata={"help": "Decoded frames to keep for the next epoch or evaluation, GiB; 0: none.", "min": 0.0})
    control: str = field(
        default="none",
        metadata={"help": "Negative control: ask for a random target of the same video, or show grey frames, in training and evaluation.", "choices": CONTROLS},
    )


@dataclass
class SftConfig:
    """What supervised fine-tuning learns (run.task=sft)."""

    answers: Optional[str] = field(
        default=None,
        metadata={
            "help": "JSON lines or Parquet with episode_id, response and target_frame: the answers to learn, to the episodes that have one; null: "
            "answers made from the truth."
        },
    )
    evaluation_answers: Optional[str] = field(default=None, metadata={"help": "The same for `data.evaluation`."})
    thought: str = field(
        default='I look for "{query}". Objects in the target frame that fit it: {count}.',
        metadata={"help": "Text between the <think> tags of answers made from the truth; {query} and {count} (of the objects) are filled in."},
    )


@dataclass
class LoopConfig:
    steps: int = field(default=500, metadata={"help": "Training steps.", "min": 1})
    deterministic: bool = field(default=False, metadata={"help": "Fixed order and fresh caches each step; bit-equal on a CPU in float32."})
    save_every: int = field(default=25, metadata={"help": "Steps between checkpoints; the last step always has one.", "min": 1})
    keep_checkpoints: int = field(default=3, metadata={"help": "Newest checkpoints to keep.", "min": 1})
    keep_best: Optional[str] = field(
        default=None,
        metadata={"help": "Also keep the checkpoint of the evaluation (eval.every) that is best by this; null: none.", "choices": KEEP_BEST},
    )
    grace_seconds: float = field(
        default=30.0,
        metadata={"help": "After Ctrl-C or a stopped job, how long rollouts may take to complete their step; then they are dropped.", "min": 0.0},
    )
    max_staleness: int = field(
        default=0,
        metadata={
            "help": "How many updates the weights that a group was begun with may be behind those that it trains. 0: synchronous; 1: one step off, the next groups are "
            "generated while the learner works; more: asynchronous.",
            "min": 0,
            "max": 64,
        },
    )
    learn_on_arrival: bool = field(
        default=False,
        metadata={"help": "The learner computes gradients of groups that are scored while others of the step are not; the update is the same but for rounding."},
    )
    wait_for: float = field(default=1.0, metadata={"help": "Share of a step's groups that the update waits for; the others are late.", "above": 0.0, "max": 1.0})
    late_groups: str = field(
        default="drop",
        metadata={"help": "Late groups: drop, or next_step, in which they go on under newer weights (within max_staleness, else they are dropped).", "choices": ("drop", "next_step")},
    )
    max_refills: int = field(
        default=0,
        metadata={"help": "Groups of a step whose rewards are all equal that are replaced by others, at most (the dynamic sampling of DAPO); 0: none.", "min": 0},
    )
    max_restarts: int = field(
        default=3,
        metadata={"help": "How often, between two checkpoints, engines that died or hang are started again, how often segmenters, and how often all parts, from the last checkpoint, where a learner did.", "min": 0},
    )
    group_seconds: float = field(default=1800.0, metadata={"help": "An engine that finishes no group for so long, while some wait for it, counts as hung.", "above": 0.0})
    learn_seconds: float = field(default=3600.0, metadata={"help": "Longest wait for an update or a checkpoint, after which the learner counts as hung.", "above": 0.0})
    score_seconds: float = field(default=120.0, metadata={"help": "A segmenter that finishes no group for so long, while some wait for it, counts as hung.", "above": 0.0})
    score_tries: int = field(
        default=3, metadata={"help": "Tries, with growing pauses, before a group counts as not scored.", "min": 1, "max": 100}
    )
    max_failure_rate: float = field(
        default=0.2, metadata={"help": "The run stops when more than this share of a step's completions cannot be scored.", "min": 0.0, "max": 1.0}
    )
    mismatch_warn: float = field(
        default=0.01, metadata={"help": "Warn when the rollout/learner mismatch KL (nats per token) exceeds this.", "min": 0.0}
    )
    mismatch_stop: Optional[float] = field(default=None, metadata={"help": "Stop the run when it exceeds this; null: never.", "min": 0.0})
    profile_step: Optional[int] = field(
        default=None,
        metadata={"help": "Record this step with a profiler in all processes: profile-STEP.json.gz in the run's folder, for ui.perfetto.dev (`videoseg train --profile`: 3); null: none.", "min": 1},
    )
    log_masks_every: int = field(
        default=0,
        metadata={"help": "Make masks for the rollouts of every n-th step also where the reward needs none; 0: never.", "min": 0},
    )


@dataclass
class EvalConfig:
    ends: bool = field(
        default=True, metadata={"help": "Evaluate before the first and after the last step, greedily, on the same episodes."}
    )
    every: int = field(default=0, metadata={"help": "Also evaluate after every n-th step; 0: not.", "min": 0})
    propagate: bool = field(default=False, metadata={"help": "Carry the masks of held-out answers through their videos: J&F, as `videoseg eval` counts it."})
    episodes: int = field(default=64, metadata={"help": "Held-out episodes, spread evenly over the data set (all, if it has fewer).", "min": 1})


@dataclass
class ClusterConfig:
    """The Ray cluster, what the models run on, what each part reserves, and how long its start may take."""

    address: Optional[str] = field(
        default=None,
        metadata={"help": "Ray address to join; null: the cluster of this job or this machine if there is one, else a local one is started."},
    )
    device: str = field(
        default="auto", metadata={"help": "What the models run on; auto: CUDA where there is a GPU.", "choices": ("auto", "cpu", "cuda")}
    )
    build: str = field(
        default="auto",
        metadata={"help": "Build of vLLM and torch, installed by `make setup`; auto: the one for the device.", "choices": ("auto", "cpu", "cuda")},
    )
    cpus_per_engine: float = field(default=1.0, metadata={"help": "CPUs that an engine's actor reserves.", "min": 0.0})
    cpus_per_learner: float = field(default=0.5, metadata={"help": "CPUs that a learner rank reserves.", "min": 0.0})
    cpus_per_segmenter: float = field(default=0.5, metadata={"help": "CPUs that a segmenter reserves.", "min": 0.0})
    gpus_per_engine: float = field(default=0.5, metadata={"help": "Share of a GPU (or whole GPUs) per engine, where there are GPUs.", "min": 0.0})
    gpus_per_learner: float = field(
        default=0.4, metadata={"help": "Share of a GPU per learner rank, where there are GPUs.", "min": 0.0, "max": 1.0}
    )
    gpus_per_segmenter: float = field(default=0.1, metadata={"help": "Share of a GPU per segmenter, where there are GPUs.", "min": 0.0, "max": 1.0})
    object_store_gb: float = field(default=1.0, metadata={"help": "Object store of a cluster started here, GiB.", "min": 0.1})
    start_seconds: float = field(default=600.0, metadata={"help": "Longest wait for all parts to be ready.", "min": 1.0})
