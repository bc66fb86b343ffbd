"""Coverage-guided fuzzing of the answer parser and of `score`, with every preset: does any text raise, or earn more than the maximum?

    pip install atheris; videoseg bench fuzz_rewards --seconds 600 --json OUT

Atheris (libFuzzer for Python; not in the lock files) mutates completions towards lines of reward_service that no input has reached yet. Its
own corpus starts from a few proper answers. JSON: inputs tried, crashes, the CPU time of the slowest. A crash ends the run and keeps its input.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("this needs atheris, which is not among the project's packages: pip install atheris")

with atheris.instrument_imports(include=["reward_service"]):
    import reward_service.labels  # noqa: F401
    import reward_service.matching  # noqa: F401
    import reward_service.presets  # noqa: F401
    from reward_service.config import FORMULAS, RewardConfig, TermWeights
    from reward_service.parsing import parse_answer
    from reward_service.scoring import maximum, score
    from reward_service.target import FrameTarget, Target

import numpy as np
import scipy.optimize  # noqa: F401 (else the first answer that is matched waits for it)
import scipy.spatial  # noqa: F401 (else the first negative point does)

MASK = np.zeros((1, 84, 84), bool)
MASK[0, 10:20, 10:20] = True
TARGETS = (
    Target((84, 84), [[10, 10, 19, 19]], [[[15, 15], [12, 12]]], masks=MASK, frames={0: FrameTarget([[10, 10, 19, 19]], MASK), 3: FrameTarget([None], [None])}),
    Target((84, 84), [[10, 10, 19, 19], [40, 40, 60, 60]], [[[15, 15]], [[50, 50]]], masks=np.concatenate([MASK, MASK[:, ::-1]]),
           frames={0: FrameTarget([[10, 10, 19, 19], None], [MASK[0], None])}),
    Target((84, 84), [], [], frames={0: FrameTarget([], [])}),
)  # fmt: skip
PARTS = (
    "<think>", "</think>", "<answer>", "</answer>", '"bbox_2d": [10, 10, 19, 19]', '"point_2d": [15, 15]', '"negative_point_2d": [70, 70]', "[{", "}]", "},{", "NaN", "1e999",
    "Infinity", "-1", "null", "true", "```json", "```", "\\ud800", "keyframe_timestamp", "frame_idx", "points_1", "bbox_2d_list", "<|im_end|>",
)  # fmt: skip
ONE_OBJECT = ("seg_zero", "pixelthink")
SEEDS = (
    '<think>a. b.</think><answer>[{"bbox_2d": [10, 10, 19, 19], "point_2d": [15, 15], "negative_point_2d": [70, 70]}]</answer>',
    "<think></think><answer>[]</answer>",
    '<think>x</think>\n<answer>{"bbox": [10,10,19,19], "points_1": [15,15], "points_2": [12,12]}</answer>',
    '<think>x</think><keyframe_timestamp>0</keyframe_timestamp><answer>```json\n[{"bbox_2d_list": [[1,2,3,4]]}]\n```</answer>',
)


class Tally:
    """What was tried; `one` is the fuzz target."""

    def __init__(self, configs: dict[str, RewardConfig], seconds: float, write) -> None:
        self.seconds, self.write = seconds, write
        # Two of the presets are defined for one object.
        self.cases = [(name, c, t) for name, c in configs.items() for t in TARGETS if len(t) < 2 or c.formula not in ONE_OBJECT]
        self.inputs, self.slowest, self.longest = 0, 0.0, 0
        self.start = time.monotonic()

    def one(self, data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        name, config, target = self.cases[provider.ConsumeIntInRange(0, len(self.cases) - 1)]
        text = provider.ConsumeUnicode(sys.maxsize)
        begun = time.process_time()
        objects = len(parse_answer(text).objects)
        masks = None
        if config.needs_video_masks:
            masks = {frame: [MASK[0]] * objects for frame in target.frames}
        elif config.needs_predicted_masks:
            masks = np.repeat(MASK, objects, axis=0)
        found = score(text, target, config, None, None, len(text), masks)
        if not (math.isfinite(found.total) and 0 <= found.total <= maximum(config) + 1e-9):
            raise AssertionError(f"{name}: total {found.total} of {maximum(config)}")
        self.slowest, self.longest = max(self.slowest, time.process_time() - begun), max(self.longest, len(text))
        self.inputs += 1
        if time.monotonic() - self.start > self.seconds:
            self.write(self, 0)
            os._exit(0)  # libFuzzer knows no other end that lets us speak first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--max-length", type=int, default=4096, help="bytes of an input, at most")
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    args = parser.parse_args()

    def write(tally: Tally, crashes: int) -> None:
        record = {
            "inputs": tally.inputs,
            "crashes": crashes,
            "seconds": round(time.monotonic() - tally.start),
            "presets": list(configs),
            "slowest_input_cpu_seconds": round(tally.slowest, 4),
            "longest_input_characters": tally.longest,
            "atheris": importlib.metadata.version("atheris"),
        }
        text = json.dumps(record, indent=1) + "\n"
        if args.json:
            args.json.with_suffix(".partial").write_text(text)
            os.replace(args.json.with_suffix(".partial"), args.json)
        print(text, flush=True)

    configs = {name: RewardConfig.preset(name) for name in FORMULAS}
    configs["videoseg_r1, masks, graded"] = RewardConfig(accuracy_iou="mask", iou_grading="graded", box_l1_grading="graded", point_grading="graded")
    configs["videoseg_r1, video"] = RewardConfig(
        accuracy_iou="video", iou_grading="graded", weights=TermWeights(video_quality=1, temporal_consistency=1)
    )
    tally = Tally(configs, args.seconds, write)

    def target(data: bytes) -> None:
        try:
            tally.one(data)
        except Exception:
            write(tally, 1)
            raise

    with tempfile.TemporaryDirectory() as folder:
        corpus, words = Path(folder) / "corpus", Path(folder) / "words"
        corpus.mkdir()
        for i, seed in enumerate(SEEDS):
            for choice in range(len(tally.cases)):
                # FuzzedDataProvider takes numbers from the end, and its text's first byte says how wide characters are.
                (corpus / f"{i}_{choice}").write_bytes(b"\x01" + seed.encode() + bytes([choice]))
        words.write_text("".join('"' + "".join(f"\\x{b:02x}" for b in part.encode()) + '"\n' for part in PARTS))
        atheris.Setup([sys.argv[0], f"-max_len={args.max_length}", f"-dict={words}", "-len_control=20", str(corpus)], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
