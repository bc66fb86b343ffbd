"""How OpenMP's threads wait for each other, and what it costs a learner's step: idle, and beside one process that is busy.

    videoseg bench openmp_waiting --json openmp-waiting.json

The setting is read when a process starts, so each candidate is a process of its own that is told when to run; they take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from side_by_side import in_turns, machine, publish, ratio

SETTINGS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "ours": None,  # cluster.placement.ENVIRONMENT
}


def worker(threads: int) -> None:
    """Forward and backward of a micro-batch of the debug recipe's size, once for each line read."""
    import numpy as np
    import torch

    from cluster import config
    from cluster.paths import resolve_path
    from learner.batch import Sample, collate
    from learner.patchify import PatchSpec
    from learner.policy import PolicyModel, load_model
    from rollout.prompts import PromptBuilder

    torch.set_num_threads(threads)
    settings = config.load("debug")
    path, rng = resolve_path(settings.policy.path, "policy.path"), np.random.default_rng(0)
    builder, samples = PromptBuilder(path, settings.prompt), []
    for group in range(8):
        frames = {t: rng.integers(0, 256, (96, 128, 3), np.uint8) for t in range(5)}
        prompt = builder.build("episode", "the red circle", frames, range(4), 4)
        shared = (prompt.images, prompt.grid_thw, group, prompt.fingerprint)
        samples += [Sample(prompt.token_ids, rng.integers(10, 100, 40).astype(np.int32), np.zeros(40, np.float32), *shared) for _ in range(8)]
    policy = PolicyModel(load_model(path, torch.float32), (), 1.0, settings.learner.logprob_chunk_tokens)
    policy.freeze(settings.learner.frozen_parts)
    batch = collate(samples, range(len(samples)), PatchSpec.from_policy(path), policy.rope_index)
    print("ready", flush=True)
    for _ in sys.stdin:
        logprobs, _ = policy(batch, entropy=True)
        logprobs.sum().backward()
        print("done", flush=True)


@contextmanager
def workers(threads: int):
    """Name of each setting -> a function that has its process compute the micro-batch once."""
    from cluster.placement import ENVIRONMENT

    running = {}
    for name, setting in SETTINGS.items():
        environment = {**{k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}, **(ENVIRONMENT if setting is None else setting)}
        command = [sys.executable, __file__, "--worker", "--threads", str(threads)]
        running[name] = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def once(process):
        process.stdin.write("\n")
        process.stdin.flush()
        said(process, "done")

    def said(process, word):
        if process.stdout.readline() != f"{word}\n":
            raise RuntimeError("a worker has ended; its reason stands above")

    try:
        for process in running.values():
            said(process, "ready")
        yield {name: lambda process=process: once(process) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a learner (default 2)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.threads)
    record = {"machine": machine(args.threads), "micro_batch": "8 prompts of the debug recipe with 8 completions of 40 tokens, forward and backward"}
    with workers(args.threads) as candidates:
        for name in ("idle", "beside_a_busy_process"):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if name != "idle" else None
            try:
                times = in_turns(candidates, args.rounds)
            finally:
                if busy:
                    busy.kill()
                    busy.wait()
            record[name] = {"times": times, "default_over_ours": ratio(times, "default", "ours"), "passive_over_ours": ratio(times, "passive", "ours")}
    publish(record, args.json)


if __name__ == "__main__":
    main()
