"""How far each stage of a synchronous step is from what the machine can do: matrix products, bytes of weights and KV read, bytes copied. JSON, and a table on the screen.

    videoseg bench limits --json OUT

`videoseg train` runs for some steps; what each stage took is in its metrics and timeline. What it needs at least is counted: operations of the learner as it counts them
itself (learner/flops.py), of SAM2 by torch's counter; of the engine, for each decoding step, the weights and the KV of all sequences read once, and the operations of
prompts and tokens. The machine's limits are measured just before: products of 1024 x 1024 float32 matrices, and a copy of 512 MiB, by as many threads as the stage has.
A stage at 10 times its limit would take a tenth of the time if nothing but that work were done, at the speed of large matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from side_by_side import machine, publish
from small_policy import SMALL, save_small_policy
from whole_loop import toy_data, watched
from cluster import rollout_log, timeline
from cluster.config import RunConfig, load
from cluster.metrics import read_metrics
from cluster.paths import resolve_path
from cluster.run_folder import RunFolder
from learner.flops import ModelSize, step_flops
from learner.policy import PolicyModel, load_model
from learner.schedule import SampleSize
from segmentation_service.prompts import ObjectPrompt
from segmentation_service.segmenter import Segmenter

FLOAT = 4  # bytes
WARM_UP = 3  # first steps that are left out


def speed_of(threads: int) -> dict[str, float]:
    """FLOP/s of matrix products and bytes/s read and written by a copy, the best of several tries."""
    torch.set_num_threads(threads)
    a, big = torch.randn(1024, 1024), torch.empty(2**27)
    other = big.clone()
    best = lambda work, tries: min(_seconds(work) for _ in range(tries))
    return {"flops": 2 * 1024**3 / best(lambda: a @ a, 20), "bytes": 2 * FLOAT * 2**27 / best(lambda: other.copy_(big), 5)}


def _seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def sam2_flops(config: RunConfig, frame_HW: tuple[int, int]) -> tuple[float, float]:
    """Operations for a frame, and for one prompt on it."""
    segmenter = Segmenter(resolve_path(config.segmentation.checkpoint, "segmentation.checkpoint"), config.segmentation.backend, "cpu", "float32", 1)
    frame = np.zeros((*frame_HW, 3), np.uint8)
    with FlopCounterMode(display=False) as encoding:
        embedding = segmenter.backend.encode(frame)
    with FlopCounterMode(display=False) as decoding:
        segmenter.backend.decode(embedding, [ObjectPrompt(box=(4.0, 4.0, 40.0, 40.0), points=[(20.0, 20.0)], labels=[1])])
    return float(encoding.get_total_flops()), float(decoding.get_total_flops())


def engine_work(model: ModelSize, config, rows: list[rollout_log.RolloutRow]) -> dict[str, float]:
    """Operations and bytes of a step's rollouts: prompts once for a group, and a decoding step for each token of the longest completion."""
    text = config.get_text_config()
    kv_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) * FLOAT
    sizes = [SampleSize(row.group, len(row.prompt_token_ids), len(row.response_token_ids), int(np.prod(row.grid_thw, axis=1).sum())) for row in rows]
    forward = step_flops(model, [sizes], reference=True) - step_flops(model, [sizes], reference=False)  # a reference's pass is a policy's pass forward
    vision = 0.0 if model.vision_learns else 2.0 * model.vision * sum({size.group: size.patches for size in sizes}.values())
    longest = max(size.response_tokens for size in sizes)
    weights = (model.decoder + model.head) * FLOAT * longest
    kv = kv_bytes * sum(size.prompt_tokens * size.response_tokens + size.response_tokens**2 / 2 for size in sizes)
    return {"flops": forward + vision, "bytes": weights + kv}


def stages(folder: RunFolder, speeds: dict[int, dict[str, float]]) -> dict[str, dict]:
    config = load(folder.config)
    path = resolve_path(config.policy.path, "policy.path")
    policy = PolicyModel(load_model(path, torch.float32), (), 1.0, config.learner.logprob_chunk_tokens)
    model = ModelSize.of(policy)
    records = {r["step"]: r for r in read_metrics(folder.metrics) if "seconds/step" in r}
    spans, found = timeline.spans(folder.path / timeline.FILE), defaultdict(list)
    sam2 = None
    for step in sorted(records)[WARM_UP:]:
        (whole,) = [s for s in spans if (s.track, s.name) == ("loop", "rollout") and s.details["version"] == step - 1]
        calls = lambda name: timeline.busy_seconds(s for s in spans if s.name == name and whole.begin <= s.begin <= whole.end)
        rows = rollout_log.read_rollouts(rollout_log.file_of(folder.rollouts, step))
        sam2 = sam2 or sam2_flops(config, tuple(rows[0].frame_hw))
        prompts = sum(len(json.loads(row.answer_json or "[]")) for row in rows)
        record, engine = records[step], engine_work(model, policy.model.config, rows)
        at = lambda threads, flops=0.0, bytes_=0.0: flops / speeds[threads]["flops"] + bytes_ / speeds[threads]["bytes"]
        found["engine"].append((calls("generate"), at(config.rollout.cpu_threads or 1, engine["flops"], engine["bytes"])))
        found["segmenter"].append((calls("segment_group"), at(config.segmentation.cpus_per_replica, len({row.group for row in rows}) * sam2[0] + prompts * sam2[1])))
        found["learner"].append((record["seconds/train"], at(config.learner.threads or 1, record["learner/tflops_per_second"] * 1e12 * record["seconds/train"])))
        found["sync"].append((record["seconds/sync"], at(1, bytes_=2 * record["sync/bytes"])))
        found["step"].append((record["seconds/step"], 0.0))
    medians = {name: [statistics.median(values) for values in zip(*both)] for name, both in found.items()}
    (step, _) = medians.pop("step")
    found = {name: {"seconds": round(seconds, 4), "share_of_step": round(seconds / step, 3), "limit_seconds": round(limit, 5), "times_its_limit": round(seconds / limit, 1)} for name, (seconds, limit) in medians.items()}
    return {"step_seconds": round(step, 4), "completions": len(rows), "stages": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--sizes", nargs="+", choices=("toy", "small"), default=["toy", "small"], help="toy: the debug recipe; small: 22 M weights, small_policy.py (default: both)")
    parser.add_argument("--steps", type=int, default=8, help=f"of each run, the first {WARM_UP} not counted (default 8)")
    parser.add_argument("--prompts", type=int, default=2, help="of a step (default 2)")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} do not count")
    speeds = {threads: speed_of(threads) for threads in (1, 2)}
    record = {"machine": machine(2), "limits": {threads: {name: round(value / 1e9, 1) for name, value in speed.items()} for threads, speed in speeds.items()}, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = toy_data(Path(folder) / "data")
        for size in args.sizes:
            asked = [f"loop.steps={args.steps}", f"rollout.prompts_per_step={args.prompts}", "eval.ends=false", "loop.save_every=100000", *data]
            if size == "small":
                save_small_policy(Path(folder) / "policy")
                asked += [*SMALL, f"policy.path={Path(folder) / 'policy'}"]
            watched([sys.executable, "-m", "cluster.cli", "train", "debug", *asked, f"run.dir={folder}", f"run.name={size}"])
            record["sizes"][size] = found = stages(RunFolder(Path(folder) / size), speeds)
            print(f"{size}: {found['completions']} completions, {found['step_seconds']:.2f} s a step", file=sys.stderr)
            for name, stage in found["stages"].items():
                print(f"  {name:10} {stage['seconds']:8.3f} s {stage['share_of_step']:6.0%} of the step {stage['times_its_limit']:7.1f} times its limit", file=sys.stderr)
    publish(record, args.json)


if __name__ == "__main__":
    main()
