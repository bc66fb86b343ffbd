"""How vLLM is started: its engine arguments and its environment, for a configuration and a device."""

import contextlib
import os
import tempfile
from collections.abc import Sequence

from rollout import weight_transfer
from rollout.banned_tokens import CONFIG_KEY
from rollout.config import RolloutConfig


def environment(config: RolloutConfig, device: str, weight_sync: str, threads: int) -> dict[str, str]:
    """Variables for the processes that vLLM starts; `threads` of OpenMP on a CPU."""
    variables = {"VLLM_LOGGING_LEVEL": config.log_level, weight_transfer.EXIT_WITH_PARENT: "1"}
    if config.tensor_parallel == 1:
        variables[weight_transfer.KEEP_IMAGE_DATA] = "1"
    if device == "cpu":
        # With multiprocessing "on" the CPU platform swaps the in-process executor for one more process; AsyncLLM's
        # engine core is a child process either way.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        variables["OMP_NUM_THREADS"] = str(threads)
        if is_eager(config, device):
            # The sampler's helpers are compiled even in eager mode: 15 s of C++ compiler at the first request.
            variables["TORCHDYNAMO_DISABLE"] = "1"
    elif weight_sync == "ipc":
        variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # IPC handles reach the engine core by pickle
    return variables


def profile_folder() -> str:
    """Where vLLM's workers write what the profiler saw."""
    return os.path.join(tempfile.gettempdir(), f"videoseg-profile-{os.getpid()}")


def is_eager(config: RolloutConfig, device: str) -> bool:
    """Whether vLLM runs without compilation and graphs."""
    return device == "cpu" if config.enforce_eager is None else config.enforce_eager


def engine_options(model: str, config: RolloutConfig, device: str, dtype: str, seed: int, weight_sync: str, banned: Sequence[int]) -> dict:
    """Arguments of vLLM's `AsyncEngineArgs`."""
    cpu = device == "cpu"
    kv_cache_gb = config.kv_cache_gb or (1.0 if cpu else None)
    options = dict(
        model=model,
        dtype=dtype,
        seed=seed,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_sequences or (128 if cpu else 256),
        max_num_batched_tokens=max(config.max_batched_tokens, config.max_model_len) if cpu else config.max_batched_tokens,
        enforce_eager=is_eager(config, device),
        enable_prefix_caching=config.prefix_caching,
        mm_processor_cache_gb=config.mm_processor_cache_gb,
        limit_mm_per_prompt={"image": config.max_images, "video": 0},
        skip_mm_profiling=cpu,
        logprobs_mode="processed_logprobs",
        logits_processors=["rollout.banned_logits:BannedTokens"],
        additional_config={CONFIG_KEY: list(banned)},
        weight_transfer_config={"backend": weight_sync},
        worker_extension_cls=f"{weight_transfer.__name__}.{weight_transfer.ReceivedWeights.__qualname__}",
        tensor_parallel_size=config.tensor_parallel,
        distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
        # Only where `RolloutEngine.start_profile` asks for it.
        profiler_config={"profiler": "torch", "torch_profiler_dir": profile_folder(), "torch_profiler_with_stack": False, "ignore_frontend": True},
        enable_log_requests=False,
        disable_log_stats=True,
    )
    if kv_cache_gb:
        options["kv_cache_memory_bytes"] = int(kv_cache_gb * 2**30)
    if cpu and config.block_size and config.block_size % 32:
        raise ValueError(f"rollout.block_size = {config.block_size}: on a CPU it must be a multiple of 32")
    if config.block_size or cpu:
        options["block_size"] = config.block_size or 32
    if cpu:
        # vLLM's CPU runner dies at a seeded request whose prompt is computed in parts: it turns the generator back by an
        # offset, which CPU generators do not have.
        options["enable_chunked_prefill"] = False
    else:
        options["gpu_memory_utilization"] = config.gpu_memory_utilization
        options["enable_sleep_mode"] = config.sleep
    return options


def register_classes(architectures: Sequence[str]) -> None:
    """Gives vLLM the classes of these models, which this process needs anyway. At its first start vLLM would else ask another process what they can do, which has to import all of it again.

    Not for a process that will use a GPU: vLLM says that the import may initialise it.
    """
    from vllm import ModelRegistry

    for name in set(architectures) & set(ModelRegistry.models):
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def check_plugin() -> None:
    """Raises RuntimeError where vLLM would not find the weight-transfer plugin: the project is not installed."""
    from importlib.metadata import entry_points

    if not any(point.value.startswith(weight_transfer.__name__ + ":") for point in entry_points(group="vllm.general_plugins")):
        raise RuntimeError(
            "vLLM does not see the plugin of videoseg-r1 (entry point videoseg_weight_transfer): install the project, e.g. pip install -e ."
        )


def version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


@contextlib.contextmanager
def applied(variables: dict[str, str]):
    """Set variables for the processes started inside, then put the environment back (vLLM itself adds LD_PRELOAD and more)."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
