"""The learner's two savings, side by side with the plain way: logits in chunks (memory), and prompts once per group, without padding (time).

    videoseg bench learning --json docs/learner-benchmark.json

    logprobs   log-probs of 2,048 tokens over 152,064 words and their gradients: peak memory of a process of its own, beyond what it had before,
               and beyond the gradients that both must give; largest difference of the gradients
    packing    forward and backward over steps of real rollouts (rollout_lengths.json): the learner's micro-batches, against fixed batches of
               eight rows [prompt, completion], padded on the right, with transformers' own forward pass. Response tokens a second; share of
               padding; largest difference of the log-probs
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from side_by_side import in_turns, machine, publish, ratio
from cluster import config
from cluster.paths import resolve_path
from learner.batch import Sample, collate
from learner.logprobs import chunked_logprobs
from learner.patchify import PatchSpec, patchify
from learner.policy import PolicyModel, load_model
from learner.schedule import schedule
from rollout.prompts import PromptBuilder

TOKENS, VOCABULARY = 2048, 152_064
ROWS = 8  # of the padded learner's batches


def logprob_memory(way: str, width: int, chunk: int, file: Path) -> None:
    """In a process of its own: prints the peak in bytes beyond the inputs, and keeps a part of the gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, width, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, width, generator=generator) * width**-0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    before = resident()
    if way == "plain":
        logprobs = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None])[:, 0]
    else:
        logprobs, _ = chunked_logprobs(hidden, weight, targets, chunk=chunk)
    logprobs.sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    torch.save((hidden.grad, weight.grad[::997].clone()), file)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def logprobs(width: int, chunk: int, folder: Path) -> dict:
    peaks, gradients = {}, {}
    for way in ("plain", "chunked"):
        file = folder / f"{way}.pt"
        command = [sys.executable, __file__, "--way", way, "--width", str(width), "--chunk", str(chunk), "--file", str(file)]
        peaks[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        gradients[way] = torch.load(file)
    given = 4 * width * (TOKENS + VOCABULARY)  # the gradients themselves
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients["chunked"], gradients["plain"]))
    return {
        "width": width, "chunk_tokens": chunk, "peak_mib": {way: round(peak / 2**20) for way, peak in peaks.items()},
        "chunked_over_plain": round(peaks["chunked"] / peaks["plain"], 3),
        "chunked_over_plain_beyond_gradients": round((peaks["chunked"] - given) / (peaks["plain"] - given), 3),
        "largest_relative_difference": difference,
    }


def packing(rounds: int) -> dict:
    settings = config.load("debug")
    path = resolve_path(settings.policy.path, "policy.path")
    torch.set_num_threads(1)
    samples = rollouts(PromptBuilder(path, settings.prompt))
    spec, learn = PatchSpec.from_policy(path), settings.learner
    ours = PolicyModel(load_model(path, torch.float32), (), 1.0, learn.logprob_chunk_tokens)
    plain = load_model(path, torch.float32)
    plain.set_attn_implementation("sdpa")
    for model in (ours.model, plain):
        model.requires_grad_(True)

    (plan,) = schedule([s.size for s in samples], 1, learn.tokens_per_microbatch, 128)
    row_tokens = attention_rows = 0
    for indices in plan:
        batch = collate(samples, indices, spec, ours.rope_index)
        row_tokens, attention_rows = row_tokens + batch.input_ids.numel(), attention_rows + batch.layout.padded_to_packed.numel()
    padded = sum(ROWS * max(length(s) for s in samples[i : i + ROWS]) for i in range(0, len(samples), ROWS))

    def packed_step() -> list[torch.Tensor]:
        found = {}
        for indices in plan:
            batch = collate(samples, indices, spec, ours.rope_index)
            values, _ = ours(batch)
            values.sum().backward()
            found |= dict(zip(batch.indices, values.detach().split(batch.lengths.tolist())))
        return [found[i] for i in range(len(samples))]

    def padded_step() -> list[torch.Tensor]:
        found = []
        for start in range(0, len(samples), ROWS):
            found += padded_batch(plain, samples[start : start + ROWS], spec)
        return found

    difference = max(float((a - b).abs().max()) for a, b in zip(packed_step(), padded_step(), strict=True))
    times = in_turns({"packed": packed_step, "padded": padded_step}, rounds)
    tokens = sum(len(s.response_ids) for s in samples)
    return {
        "samples": len(samples), "response_tokens": tokens, "times": times,
        "response_tokens_per_second": {name: round(tokens / t["seconds"]) for name, t in times.items()},
        "padded_over_packed": ratio(times, "padded", "packed"),
        "padding": {"padded": round(1 - sum(map(length, samples)) / padded, 4), "packed, linear layers": 0.0, "packed, views of attention": round(1 - row_tokens / attention_rows, 4)},
        "tokens_computed": {"padded": padded, "packed": row_tokens}, "largest_difference": difference,
    }


def length(s: Sample) -> int:
    return len(s.prompt_ids) + len(s.response_ids) - 1


def rollouts(builder: PromptBuilder) -> list[Sample]:
    """One step of every kind: prompts of the debug recipe, completions of the recorded lengths."""
    rng, samples = np.random.default_rng(0), []
    steps = json.loads((Path(__file__).parent / "rollout_lengths.json").read_text())["steps"]
    for group, (_, lengths) in enumerate(g for step in steps for g in step["groups"][:5]):
        frames = {t: rng.integers(0, 256, (96, 128, 3), np.uint8) for t in range(5)}
        prompt = builder.build("episode", "the red circle", frames, range(4), 4)
        shared = (prompt.images, prompt.grid_thw, group, prompt.fingerprint)
        samples += [Sample(prompt.token_ids, rng.integers(10, 100, n).astype(np.int32), np.zeros(n, np.float32), *shared) for n in lengths]
    return samples


def padded_batch(model, samples: list[Sample], spec: PatchSpec) -> list[torch.Tensor]:
    """Log-probs of each sample's response, after a backward pass: right-padded rows, full logits, every row with its own pictures."""
    longest = max(length(s) for s in samples)
    ids, mask = np.zeros((len(samples), longest), np.int64), np.zeros((len(samples), longest), np.int64)
    for row, s in enumerate(samples):
        ids[row, : length(s)], mask[row, : length(s)] = np.concatenate([s.prompt_ids, s.response_ids[:-1]]), 1
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
    pixels, grid = patchify([image for s in samples for image in s.images], spec, "cpu", torch.float32)
    kinds = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, pixel_values=pixels, image_grid_thw=grid, use_cache=False).logits
    found = []
    for row, s in enumerate(samples):
        at = torch.log_softmax(logits[row, len(s.prompt_ids) - 1 : length(s)].float(), -1)
        found.append(at.gather(1, torch.from_numpy(s.response_ids.astype(np.int64))[:, None])[:, 0])
    torch.cat(found).sum().backward()
    return [values.detach() for values in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the packing benchmark (default 5)")
    for name, kind in (("way", str), ("width", int), ("chunk", int), ("file", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return logprob_memory(args.way, args.width, args.chunk, args.file)
    import tempfile

    chunk = config.RunConfig().learner.logprob_chunk_tokens
    with tempfile.TemporaryDirectory() as folder:
        memory = [logprobs(width, chunk, Path(folder)) for width in (256, 2048)]
    publish({"machine": machine(1), "logprobs": memory, "packing": packing(args.rounds)}, args.json)


if __name__ == "__main__":
    main()
