"""What our layer costs: the rollout engine as the loop asks it (a Ray actor, group by group, with log-probs) against vLLM alone, without Ray. JSON, and a table.

    videoseg bench generation --json OUT
    videoseg bench generation --size small --prompts 2 --json OUT

    AsyncLLM    what our engine is made of, so that the difference is our layer: its core is a process beside the one that asks
    LLM         `vllm.LLM.generate`, engine and requests in one process, which is fastest where there is little to compute

All have the same policy, options, environment, prompts with their pictures, sampling parameters and seeds, and answer the same steps in turns, each of prompts that were not asked before;
vLLM alone makes a group by its own `n`. Who waits is asleep. What is compared is the time for a token, which is the same token but where sums of another batch were rounded otherwise:
`equal_completions` says how many were the same. CPU seconds, of all processes of a side (the loop's among them), change less when others use the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from side_by_side import in_turns, machine, publish, ratio, spread
from small_policy import SMALL, save_small_policy
from cluster import config_files, config_resolve
from cluster.config import RunConfig, load
from cluster.draws import Draws
from cluster.placement import ENVIRONMENT, gather
from cluster.ray_cluster import joined_cluster
from cluster.replicas import Replicas
from cluster.timeline import Timeline
from rollout import vllm_options
from rollout.actor import RolloutEngineActor
from rollout.config import SamplingConfig
from rollout.fingerprints import policy_fingerprints
from rollout.prompts import Prompt, PromptBuilder
from rollout.toy_data import ToyDataConfig, write_toy_data

Asked = list[tuple[Prompt, int]]
"""The prompts of a step, each with the seed of its first completion; those of the others follow it."""


def settings(size: str, folder: Path) -> RunConfig:
    """The debug recipe's on this machine, with its policy, or one that is saved in the folder."""
    if size == "small":
        save_small_policy(folder / "policy")
    overrides = [*SMALL, f"policy.path={folder / 'policy'}"] if size == "small" else []
    return config_files.locate_models(config_resolve.resolve(load("debug", ["cluster.address=local", *overrides]), config_resolve.detect_hardware()))


def steps_of(config: RunConfig, folder: Path, count: int, prompts: int) -> list[Asked]:
    write_toy_data(folder / "toy", ToyDataConfig(train=max(16, count * prompts // 2), valid_u=0, valid=0), progress=lambda line: None)
    draws = Draws(str(folder / "toy/train"), PromptBuilder(config.policy.path, config.prompt), config.data, seed=0)
    try:
        found = draws.batch(range(count * prompts))
    finally:
        draws.close()
    return [[(draw.prompt, 1000 * draw.position) for draw in found[n : n + prompts]] for n in range(0, len(found), prompts)]


def vllm_alone(kind: str, asked: Connection, steps: list[Asked], count: int, sampling: SamplingConfig, options: dict) -> None:
    """In a process of its own: receives the number of a step, and sends the tokens of its groups."""
    from PIL import Image
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    generate, close = ALONE[kind](options)
    same = dict(n=count, temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_response_tokens, logprobs=0, flat_logprobs=True, detokenize=False)
    asked.send("ready")
    for number in iter(asked.recv, None):
        prompts = [
            {"prompt_token_ids": list(prompt.vllm_token_ids), "multi_modal_data": {"image": [Image.fromarray(image) for image in prompt.images]}, "mm_processor_kwargs": {"do_resize": False}}
            for prompt, _ in steps[number]
        ]
        outputs = generate(prompts, [SamplingParams(seed=seed, output_kind=RequestOutputKind.FINAL_ONLY, **same) for _, seed in steps[number]])
        asked.send([[list(one.token_ids) for one in output.outputs] for output in outputs])
    close()


def through_llm(options: dict) -> tuple[Callable, Callable]:
    from vllm import LLM

    llm = LLM(**{name: value for name, value in options.items() if name != "enable_log_requests"})  # which it has not
    return partial(llm.generate, use_tqdm=False), lambda: None


def through_async_llm(options: dict) -> tuple[Callable, Callable]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm, loop, numbers = AsyncLLM.from_engine_args(AsyncEngineArgs(**options)), asyncio.new_event_loop(), itertools.count()

    async def one(prompt: dict, params) -> object:
        return [output async for output in llm.generate(prompt, params, f"request {next(numbers)}")][-1]

    async def every(prompts: list[dict], params: list) -> list:
        return await asyncio.gather(*map(one, prompts, params))

    async def close() -> None:
        llm.output_handler.cancel()  # else it logs the end of its core as a failure
        llm.shutdown()

    return lambda prompts, params: loop.run_until_complete(every(prompts, params)), lambda: loop.run_until_complete(close())


ALONE = {"AsyncLLM": through_async_llm, "LLM": through_llm}


def measure(config: RunConfig, steps: list[Asked], count: int, rounds: int, against: list[str]) -> dict:
    import ray

    rollout, path = config.rollout, config.policy.path
    sampling, device, sync = rollout.sampling(), config.cluster.device, rollout.weight_sync
    options = vllm_options.engine_options(path, rollout, device, config.policy.dtype, config.run.seed, sync, policy_fingerprints(path)["banned_token_ids"])
    engine = RolloutEngineActor.options(num_cpus=1, num_gpus=float(device == "cuda"), runtime_env={"env_vars": ENVIRONMENT})
    actor = engine.remote(path, rollout, dtype=config.policy.dtype, device=device, seed=config.run.seed)
    replicas = Replicas("engine", [actor], kill=None, start=None, join=None, seconds=600.0, restarts=0, note=print, timeline=Timeline(os.devnull))
    loop, tokens, cpu, pipes, processes = asyncio.new_event_loop(), defaultdict(list), defaultdict(list), {}, {}
    for kind in against:
        pipes[kind], theirs = get_context("spawn").Pipe()
        alone = get_context("spawn").Process(target=vllm_alone, args=(kind, theirs, steps, count, sampling, options))
        with vllm_options.applied(ENVIRONMENT | vllm_options.environment(rollout, device, sync, rollout.cpu_threads)):
            alone.start()  # OpenMP reads them as soon as it is loaded
        theirs.close()
        pipes[kind].recv()
        processes[kind] = tree(alone.pid)
    loop.run_until_complete(gather([actor.ready.remote()]))
    processes["ours"] = [psutil.Process(), *tree(ray.get(actor.__ray_call__.remote(lambda engine: os.getpid())))]

    async def answered(asked: Asked) -> list:
        return await asyncio.gather(*(replicas.call(i, "generate", prompt, count, sampling, [seed + k for k in range(count)]) for i, (prompt, seed) in enumerate(asked)))

    def through_ours(number: int) -> list:
        groups = loop.run_until_complete(answered(steps[number]))
        return [[c.token_ids.tolist() for c in group] for group in groups]

    def through_vllm(kind: str, number: int) -> list:
        pipes[kind].send(number)
        return pipes[kind].recv()

    def counted(name: str, through: Callable[[int], list]) -> None:
        before = cpu_seconds(processes[name])
        tokens[name].append(through(len(tokens[name])))
        cpu[name].append(cpu_seconds(processes[name]) - before)

    times = in_turns({"ours": partial(counted, "ours", through_ours)} | {kind: partial(counted, kind, partial(through_vllm, kind)) for kind in against}, rounds)
    for pipe in pipes.values():
        pipe.send(None)
    ray.get(actor.shutdown.remote())
    return record_of({name: found["each"] for name, found in times.items()}, {name: seconds[1:] for name, seconds in cpu.items()}, tokens)


def tree(pid: int) -> list[psutil.Process]:
    return [root := psutil.Process(pid), *root.children(recursive=True)]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def record_of(times: dict[str, list[float]], cpu: dict[str, list[float]], tokens: dict[str, list]) -> dict:
    """times, cpu: seconds of each step but the first, which is to warm up; tokens: of all steps."""
    counts = {name: [sum(len(one) for group in step for one in group) for step in of_side[1:]] for name, of_side in tokens.items()}
    flat = {name: [one for step in of_side for group in step for one in group] for name, of_side in tokens.items()}
    others = [name for name in tokens if name != "ours"]

    def a_token(seconds: dict[str, list[float]]) -> dict[str, dict]:
        return {name: {"each": [s / count for s, count in zip(seconds[name], counts[name], strict=True)]} for name in counts}

    return {
        "tokens_per_second": {name: spread([1 / s for s in found["each"]], 1) for name, found in a_token(times).items()},
        "seconds_of_ours_over": {name: ratio(a_token(times), "ours", name) for name in others},
        "cpu_seconds_of_ours_over": {name: ratio(a_token(cpu), "ours", name) for name in others},
        "tokens": counts,
        "equal_completions": {name: round(sum(a == b for a, b in zip(flat["ours"], flat[name], strict=True)) / len(flat["ours"]), 4) for name in others},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side that count, after one that does not (default 5)")
    parser.add_argument("--size", choices=("toy", "small"), default="toy", help="the debug recipe's policy and prompts, or larger ones, small_policy.py")
    parser.add_argument("--prompts", type=int, default=24, help="of a step (default 24)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt (default 8)")
    parser.add_argument("--against", nargs="+", choices=list(ALONE), default=list(ALONE), help="ways of vLLM alone (default: both)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(args.size, Path(folder))
        steps = steps_of(config, Path(folder), args.rounds + 1, args.prompts)
        with joined_cluster(config.cluster):
            found = measure(config, steps, args.group_size, args.rounds, args.against)
    publish({"machine": machine(config.rollout.cpu_threads), "size": vars(args) | {"json": None}} | found, args.json)
    for name, rate in found["tokens_per_second"].items():
        print(f"{name:9} {rate['median']:9.1f} tokens/s ({rate['min']:.1f} to {rate['max']:.1f})", file=sys.stderr)
    for name, equal in found["equal_completions"].items():
        print(f"ours over {name}: seconds {found['seconds_of_ours_over'][name]}, CPU seconds {found['cpu_seconds_of_ours_over'][name]}; {equal:.1%} of completions equal", file=sys.stderr)


if __name__ == "__main__":
    main()
