"""The policy in the engine and in the learner: log-probs of the same tokens, and what falling asleep and waking up cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from colocated_loop import RECIPES
from memory import peak, used_gib
from cluster import config
from learner.batch import Sample, collate
from learner.grpo import multiplicative_error, rollout_mismatch
from learner.patchify import PatchSpec
from learner.policy import PolicyModel, load_model
from learner.schedule import schedule
from rollout.completion import Completion
from rollout.engine import RolloutEngine
from rollout.prompts import Prompt, PromptBuilder
from random_models import HW
from segmentation import Moving


def numerics(size: str, device: str, path: Path) -> Iterator[tuple[str, dict]]:
    """A group's completions by vLLM, and their log-probs by the learner: in the engine's precision, and in float32, which tells whose rounding a difference is."""
    settings = config.load(RECIPES[size])
    prompt = shown(settings, path, size)
    engine = RolloutEngine(str(path), settings.rollout, device=device)
    completions, banned, figures = asyncio.run(generated(engine, prompt, settings, device))
    tokens = sum(len(c.token_ids) for c in completions)
    yield "engine", figures | {"prompt_tokens": len(prompt.token_ids), "response_tokens": tokens, "tokens_per_second": round(tokens / figures["seconds"]["generate"], 1)}
    samples = [Sample(prompt.token_ids, c.token_ids, c.logprobs, prompt.images, prompt.grid_thw, 0, prompt.fingerprint) for c in completions]
    sampled, own = torch.from_numpy(np.concatenate([s.rollout_logprobs for s in samples])), {}
    for dtype in dict.fromkeys((engine.dtype, "float32")):
        start = time.perf_counter()
        own[dtype] = learner_logprobs(settings, path, samples, banned, device, getattr(torch, dtype))
        yield f"learner {dtype} against engine {engine.dtype}", apart(own[dtype], sampled) | {"seconds": round(time.perf_counter() - start, 2)} | peak(device)
    if len(own) > 1:
        yield f"learner {engine.dtype} against learner float32", apart(own[engine.dtype], own["float32"])


def shown(settings: config.RunConfig, path: Path, size: str) -> Prompt:
    """The recipe's prompt about a video of squares."""
    count = settings.prompt.reference_frames
    video = Moving(count + 1, HW[size])
    return PromptBuilder(str(path), settings.prompt).build("episode", "the red square", {t: video.frame(t) for t in range(count + 1)}, range(count), count, 8.0)


async def generated(engine: RolloutEngine, prompt: Prompt, settings: config.RunConfig, device: str) -> tuple[list[Completion], list[int], dict]:
    """The group, the ids that are never sampled, and how long each call took and left how much memory in use."""
    seconds, gib = {}, {}

    async def timed(name: str, call):
        start = time.perf_counter()
        result = await call
        seconds[name] = round(time.perf_counter() - start, 3)
        gib[name] = used_gib(device)
        return result

    group = settings.rollout.group_size
    try:
        report = await timed("start", engine.ready())
        banned = (await engine.fingerprints())["banned_token_ids"]
        sampling = settings.rollout.sampling()
        await engine.generate(prompt, group, replace(sampling, max_response_tokens=8))  # what the first request alone takes does not count
        await engine.reset_caches()
        completions = await timed("generate", engine.generate(prompt, group, sampling, range(group)))
        if await timed("sleep", engine.sleep(2)):
            await timed("wake weights", engine.wake_up(["weights"]))
            await timed("wake cache", engine.wake_up(["kv_cache"]))
    finally:
        await engine.shutdown()
    return completions, banned, {"seconds": seconds, "memory_gib": gib, "kv_cache_tokens": report["kv_cache_tokens"]}


def learner_logprobs(settings: config.RunConfig, path: Path, samples: list[Sample], banned: list[int], device: str, dtype: torch.dtype) -> torch.Tensor:
    """float32 (all response tokens), by the learner's micro-batches."""
    learn = settings.learner
    policy = PolicyModel(load_model(str(path), dtype), banned, settings.rollout.temperature, learn.logprob_chunk_tokens).to(device)
    spec, found = PatchSpec.from_policy(str(path)), {}
    (plan,) = schedule([s.size for s in samples], 1, learn.tokens_per_microbatch, policy.model.config.get_text_config().hidden_size)
    with torch.no_grad():
        for indices in plan:
            batch = collate(samples, indices, spec, policy.rope_index, device, dtype)
            values, _ = policy(batch)
            found |= dict(zip(batch.indices, values.cpu().split(batch.lengths.tolist())))
    return torch.cat([found[i] for i in range(len(samples))])


def apart(logprobs: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """As a run's `mismatch/*`: nats a token."""
    terms = rollout_mismatch(logprobs, others)
    mean = float(terms["mismatch_abs"].mean())
    values = {"kl": float(terms["mismatch_kl"].mean()), "mean": mean, "largest": float(terms["mismatch_abs"].max()), "factor": multiplicative_error(mean)}
    return {name: float(f"{value:.4g}") for name, value in values.items()}
