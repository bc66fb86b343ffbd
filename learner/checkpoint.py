"""Checkpoints of the learner (DeepSpeed's shards, counters, random states) and export to a Hugging Face folder.

Both are written under a temporary name and renamed when every rank is done.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .config import LearnerConfig
from .engine import import_deepspeed
from .lora import add_adapters
from .policy import PolicyModel, load_model
from .weights import iterate_weights

TAG = "deepspeed"
STATE_FILE = "learner.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
EXPORT_BUCKET_BYTES = 512 * 2**20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded here; the message says why and what to do."""


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def new_folder(folder: str | Path, rank: int, what: str = "a checkpoint") -> Iterator[Path]:
    """An empty folder for all ranks to write to, which gets the name `folder` when they are done. Raises CheckpointError if there is one."""
    folder = Path(folder)
    writing = folder.with_name(folder.name + ".writing")
    if rank == 0:
        if folder.exists():
            raise CheckpointError(f"{folder} exists already; {what} is never overwritten")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    _barrier()
    yield writing
    _barrier()
    if rank == 0:
        writing.rename(folder)
    _barrier()


def save_checkpoint(engine, folder: Path, rank: int, state: dict) -> None:
    """Write the weights that learn, optimiser, `state` (numbers and strings) and each rank's random states to `folder`.

    Frozen weights are those of the policy that the run began from, and are not written again.
    """
    engine.save_checkpoint(str(folder), tag=TAG, client_state={}, save_latest=False, exclude_frozen_parameters=True)
    torch.save(_random_states(), folder / f"random_rank{rank}.pt")
    if rank == 0:
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1, sort_keys=True))


def load_checkpoint(engine, folder: str | Path, rank: int, world_size: int, expected: dict) -> dict:
    """Load what `save_checkpoint` wrote -> its `state`. Random states are those of the same rank, where there was one.

    A checkpoint of another number of ranks is converted to DeepSpeed's universal format first, beside it and for as long as it
    takes. `expected`: entries of the state that must be equal here (ZeRO stage, type). Raises CheckpointError.
    """
    folder = Path(folder)
    state = read_state(folder)
    for key, value in expected.items():
        if state.get(key) != value:
            raise CheckpointError(f"{folder} was written with {key} = {state.get(key)}, this run has {value}; resume with the same {key}")
    if state["world_size"] == world_size or state["zero_stage"] == 0:  # without ZeRO any rank holds everything
        loaded, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)  # frozen weights are not in it
    else:
        loaded = _load_universal(engine, folder, rank)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load {folder / TAG}")
    if (file := folder / f"random_rank{rank}.pt").exists():
        _set_random_states(torch.load(file, weights_only=False))
    return state


def _load_universal(engine, folder: Path, rank: int) -> str | None:
    universal = folder.with_name(folder.name + ".universal")
    if rank == 0:
        from deepspeed.checkpoint import ds_to_universal

        shutil.rmtree(universal, ignore_errors=True)
        how = argparse.Namespace(
            input_folder=str(folder / TAG), output_folder=str(universal / TAG), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(how)
    _barrier()
    engine._config.load_universal_checkpoint = True
    try:
        loaded, _ = engine.load_checkpoint(str(universal), tag=TAG, load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
    _barrier()
    if rank == 0:
        shutil.rmtree(universal)
    return loaded


def _random_states() -> dict:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def export_policy(model: nn.Module, policy_path: str, folder: str | Path, rank: int) -> None:
    """Write `model` as a Hugging Face folder: safetensors under checkpoint names, every other file as in `policy_path`.

    All ranks take part (ZeRO-3 gathers); rank 0 writes and holds the whole model in CPU memory. `folder` must not exist.
    """
    with new_folder(folder, rank, "an export") as writing:
        weights = {}
        for bucket in iterate_weights(model, EXPORT_BUCKET_BYTES):
            if rank == 0:
                weights |= {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in bucket}
        if rank == 0:
            from huggingface_hub import save_torch_state_dict

            _copy_other_files(policy_path, writing)
            save_torch_state_dict(weights, writing, max_shard_size="5GB")
            config = json.loads((writing / "config.json").read_text())
            dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
            config |= {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}
            (writing / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def export_checkpoint(folder: str | Path, config: LearnerConfig, policy_path: str, out: str | Path) -> None:
    """`export_policy` of a checkpoint, in this process and on the CPU, whatever ranks and devices wrote it.

    config: the learner's settings in that run; policy_path: the policy that it began from. Raises CheckpointError.
    """
    folder = Path(folder)
    state = read_state(folder)
    policy = PolicyModel(load_model(policy_path, getattr(torch, state["dtype"])), (), 1.0, 1)
    policy.freeze(config.frozen_parts)
    if config.lora_rank:
        add_adapters(policy.model, config)
    trained = _trained_weights(folder, state["zero_stage"])
    wanted = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    wrong = sorted(name for name, p in wanted.items() if name not in trained or trained[name].shape != p.shape)
    if wrong:
        raise CheckpointError(f"{folder} and {policy_path} differ in {len(wrong)} weights, such as {wrong[0]}; export with the policy and the learner settings of the run")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(trained[name])
    export_policy(policy.model, policy_path, out, rank=0)


def read_state(folder: Path) -> dict:
    """The numbers that `save_checkpoint` was given. Raises CheckpointError where there is no such checkpoint."""
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(f"{folder} is no learner checkpoint: {STATE_FILE} is missing")
    return json.loads((folder / STATE_FILE).read_text())


def _trained_weights(folder: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """Name in PolicyModel -> whole weight; float32 with ZeRO, which keeps the weights that AdamW steps in float32."""
    if zero_stage == 0:
        return torch.load(folder / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)


def _copy_other_files(policy_path: str, target: Path) -> None:
    """Configuration, tokenizer and processor files of a local folder or of a hub id."""
    source = Path(policy_path)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(policy_path, ignore_patterns=[f"*{suffix}" for suffix in WEIGHT_SUFFIXES]))
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, target / path.name)
