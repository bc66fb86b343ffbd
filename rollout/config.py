"""Settings of the rollout engines: how completions are sampled, how vLLM is run, how weights reach it."""

from dataclasses import dataclass, field
from typing import Optional

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
WEIGHT_SYNCS = ("auto", "object_store", "ipc", "nccl")


@dataclass(frozen=True)
class SamplingConfig:
    """How one completion is drawn. `temperature` 0 is greedy decoding (evaluation).

    The log-probs returned with a completion are those of the distribution that was really sampled from; what a learner must
    do to compute the same numbers is written at `rollout.engine.Completion`. `top_logprobs` asks for those of the most likely
    tokens too, so many at each position.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0

    def greedy(self) -> "SamplingConfig":
        """The same limits and stops, decoded greedily."""
        return SamplingConfig(
            temperature=0.0,
            top_p=1.0,
            max_response_tokens=self.max_response_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            top_logprobs=self.top_logprobs,
        )


@dataclass
class RolloutConfig:
    """The `rollout` section of a run's configuration."""

    engines: int = field(default=1, metadata={"help": "number of vLLM engines (one actor each)", "min": 1, "max": 1024})
    group_size: int = field(default=8, metadata={"help": "completions per prompt (G)", "min": 1, "max": 256})
    prompts_per_step: int = field(default=16, metadata={"help": "prompts per training step, over all engines", "min": 1, "max": 65536})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature; the learner divides by the same number", "min": 0.01, "max": 2.0})
    top_p: float = field(
        default=1.0,
        metadata={"help": "nucleus sampling; below 1 the learner cannot match the log-probs, so keep 1 for training", "min": 0.01, "max": 1.0},
    )
    max_response_tokens: int = field(default=256, metadata={"help": "longest completion in tokens", "min": 1, "max": 131072})
    max_model_len: int = field(default=8448, metadata={"help": "longest prompt plus completion in tokens, visual tokens included", "min": 16, "max": 1048576})
    max_images: int = field(default=16, metadata={"help": "most images in one prompt", "min": 1, "max": 1024})
    stop: list[str] = field(
        default_factory=list,
        metadata={"help": "strings that end a completion, besides the model's own end tokens (kept in the text; detokenises every step)"},
    )
    stop_token_ids: list[int] = field(default_factory=list, metadata={"help": "token ids that end a completion, besides the model's own end tokens"})

    weight_sync: str = field(
        default="auto",
        metadata={"help": "how weights reach the engines: object_store on CPUs; ipc (same GPU) or nccl (other GPU) on CUDA", "choices": WEIGHT_SYNCS},
    )
    sync_check_every: int = field(
        default=50,
        metadata={"help": "by ipc and nccl, the SHA-256 of all weights is compared in the first sync and every so many after it (object_store: in all)", "min": 1, "max": 1000000},
    )
    sync_timeout_seconds: float = field(default=300.0, metadata={"help": "longest wait for one call of a weight update", "min": 1.0, "max": 86400.0})

    gpu_memory_utilization: float = field(default=0.5, metadata={"help": "share of a GPU's memory that vLLM may use (CUDA only)", "min": 0.05, "max": 0.98})
    kv_cache_gb: Optional[float] = field(
        default=None,
        metadata={"help": "size of the KV cache in GiB; none = 1 on a CPU, what gpu_memory_utilization leaves on a GPU", "min": 0.0625, "max": 4096.0},
    )
    max_sequences: Optional[int] = field(default=None, metadata={"help": "completions in flight per engine; none = 128 on a CPU, 256 on a GPU", "min": 1, "max": 4096})
    max_batched_tokens: int = field(default=4096, metadata={"help": "most tokens in one forward pass of an engine (on a CPU at least max_model_len); also caps the visual tokens of one image", "min": 64, "max": 262144})
    block_size: Optional[int] = field(default=None, metadata={"help": "tokens in a KV block, the grain of prefix sharing (a multiple of 32 on a CPU); none = 32 on a CPU, vLLM's own on a GPU", "min": 8, "max": 256})
    enforce_eager: Optional[bool] = field(default=None, metadata={"help": "no CUDA graphs or compilation; none = true on a CPU, false on a GPU"})
    tensor_parallel: int = field(default=1, metadata={"help": "GPUs per engine", "min": 1, "max": 64})
    cpu_threads: int = field(default=0, metadata={"help": "OpenMP threads of an engine on a CPU; 0 = 1, or half of the cores for models wider than 1024", "min": 0, "max": 1024})
    sleep: bool = field(default=False, metadata={"help": "let engines give their GPU memory back while the learner works (CUDA only)"})
    prefix_caching: bool = field(default=True, metadata={"help": "share the prompt's KV between the completions of a group"})
    mm_processor_cache_gb: float = field(
        default=0.0,
        metadata={"help": "vLLM's cache of processed images; 0 because it loses step with its copy in the engine core after resets", "min": 0.0, "max": 1024.0},
    )
    log_level: str = field(default="WARNING", metadata={"help": "vLLM's own log level", "choices": ("DEBUG", "INFO", "WARNING", "ERROR")})

    def sampling(self) -> SamplingConfig:
        """How training completions are drawn; `.sampling().greedy()` is the same for evaluation."""
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            max_response_tokens=self.max_response_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
        )


def resolve_device(device: str = "auto") -> str:
    """"cpu" or "cuda" for "auto|cpu|cuda", by what this process can see; ValueError for "cuda" without a GPU."""
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; use one of {', '.join(DEVICES)}")
    if device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ValueError("device is 'cuda', but this process sees no CUDA GPU; use device=cpu, or give the engine's actor num_gpus")
    return "cpu"


def resolve_dtype(dtype: str, device: str) -> str:
    """"float32" or "bfloat16" for "auto|float32|bfloat16": auto is float32 on a CPU and bfloat16 on a GPU."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    if dtype == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    return dtype


def resolve_weight_sync(weight_sync: str, device: str, *, shares_gpu_with_learner: bool = True) -> str:
    """"object_store", "ipc" or "nccl" for `RolloutConfig.weight_sync`.

    `ipc` works only where every GPU of an engine also holds a learner rank (it finds the tensors by the GPU's UUID), so "auto"
    on CUDA is `ipc` for engines that share their GPU with the learner and `nccl` for the others.
    """
    if weight_sync not in WEIGHT_SYNCS:
        raise ValueError(f"weight_sync is {weight_sync!r}; use one of {', '.join(WEIGHT_SYNCS)}")
    if weight_sync == "auto":
        if device == "cpu":
            return "object_store"
        return "ipc" if shares_gpu_with_learner else "nccl"
    if device == "cpu" and weight_sync != "object_store":
        raise ValueError(f"weight_sync is {weight_sync!r}, which needs CUDA; on a CPU use object_store (or auto)")
    if weight_sync == "ipc" and not shares_gpu_with_learner:
        raise ValueError("weight_sync is 'ipc', which needs a learner rank on every GPU of an engine; use nccl (or auto)")
    return weight_sync
