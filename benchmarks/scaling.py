"""How the stages of a step grow with what is asked of them, each size doubled alone: real parts, toy models. JSON, and a table on the screen.

    videoseg bench scaling --json OUT

    completions  of a group           frames   of the video
    objects      that are asked for   shown    frames of the prompt, beside the target frame
    engines      that share a step's prompts: real ones, as many as there are cores and `--engines` allows; more of them in the simulator, with the costs measured here

Of every stage that a size touches: seconds at each size, and p of seconds ~ size^p by least squares on logarithms of the medians; of the two largest sizes too, where fixed costs count
least; and of CPU seconds, which change less when others use the machine, where the stage runs in this process. Nothing grows faster than the work where p is at most 1; with engines the
work stays the same, and p is -1 at best. `step` adds a group's stages up, those that the size leaves alone at their first time. The stages are the loop's own:

    prompt    episode, frames from the pool of decoders, prompt: a folder of pictures (`prompt`), a video file (`prompt_file`); every time a video that is not open yet
    generate  vLLM in its actor, answers of 48 tokens; every time a new prompt
    masks     SAM2: the objects of all answers on the target frame        tracks   XMem: masks of all answers through the video
    rewards   parsing, matching, terms, J over the video's frames         learn    the learner's step on one group, with the reference's KL
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image

from reward_growth import exponent
from segmentation import Moving
from side_by_side import in_turns, machine, publish
from cluster import config_files
from cluster.config import load
from cluster.draws import Draw, Draws
from cluster.placement import ENVIRONMENT
from cluster.rollout_rows import samples_of
from cluster.scoring import ScoredGroup, object_prompts, score_group
from cluster.sections import LoopConfig
from cluster.simulate import Costs, Sizes, simulate
from cluster.update import with_advantages
from learner.actor import LearnerActor
from reward_service import parse_answer
from rollout.actor import RolloutEngineActor
from rollout.completion import Completion
from rollout.decoding import Decoders
from rollout.episodes import Episode, TargetObject, annotate, write_episodes
from rollout.prompts import Prompt, PromptBuilder
from segmentation_service.masks import encode_rle
from segmentation_service.segmenter import Segmenter
from segmentation_service.video_writer import write_video

HW, TOKENS = (96, 128), 48
"""Of the toy world's frames; of a response."""


@dataclass(frozen=True)
class Size:
    """Of a group. The first of the sizes that are tried, about what the debug recipe has."""

    completions: int = 8
    frames: int = 8
    objects: int = 1
    shown: int = 4


TOUCHES = {
    "completions": ("generate", "masks", "tracks", "rewards", "learn"),
    "frames": ("prompt", "prompt_file", "tracks", "rewards"),
    "objects": ("masks", "tracks", "rewards"),
    "shown": ("prompt", "prompt_file", "generate", "learn"),
}
HERE = ("masks", "tracks", "rewards", "learn")
"""Stages that run in this process."""


class Stages:
    """A method of each stage: a size -> what to time, for which all else has been made."""

    def __init__(self, folder: Path, engines: int, rounds: int, shown: int) -> None:
        config = config_files.locate_models(load("debug"))
        self.folder, self.times, self.path = folder, rounds + 1, config.policy.path
        self.prompts_a_step = config.rollout.prompts_per_step
        self.builder = PromptBuilder(self.path, replace(config.prompt, max_tokens=1024))
        self.data, self.reward = config.data, replace(config.reward, accuracy_iou="video")
        self.decoders = Decoders(self.data.decoders, self.data.decode_seconds, cache_bytes=0)
        rollout = replace(config.rollout, max_images=shown + 1, max_model_len=self.builder.config.max_tokens + TOKENS)
        self.sampling = replace(rollout.sampling(), max_response_tokens=TOKENS, ignore_eos=True)
        ray.init(address="local", num_cpus=engines, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        actor = RolloutEngineActor.options(num_cpus=1, runtime_env={"env_vars": ENVIRONMENT})
        self.engines = [actor.remote(self.path, rollout) for _ in range(engines)]
        self.sequences = min(report["max_sequences"] for report in ray.get([engine.ready.remote() for engine in self.engines]))
        segmentation = config.segmentation
        self.segmenter = Segmenter(segmentation.checkpoint, propagation=segmentation.propagation)
        self.learner = LearnerActor()
        host, port = self.learner.address()
        self.learner.start(config=replace(config.learner, threads=1), policy_path=self.path, master_addr=host, master_port=port, total_steps=1000)

    def close(self) -> None:
        self.decoders.close()
        ray.get([engine.shutdown.remote() for engine in self.engines])
        ray.shutdown()

    def prompt(self, size: Size, file: bool = False) -> Callable[[], object]:
        draws, positions = self._draws(size, file), itertools.count()
        return lambda: draws.batch([next(positions)])

    def prompt_file(self, size: Size) -> Callable[[], object]:
        return self.prompt(size, file=True)

    def generate(self, size: Size) -> Callable[[], object]:
        return self.share(1, 1, size)

    def share(self, engines: int, groups: int, size: Size = Size()) -> Callable[[], object]:
        """So many groups, each of a prompt that no engine has seen, by the first so many engines."""
        prompts = iter([self._noise(size.shown) for _ in range(groups * self.times)])
        asked = lambda n: self.engines[n % engines].generate.remote(next(prompts), size.completions, self.sampling, range(size.completions))
        return lambda: ray.get([asked(n) for n in range(groups)])

    def masks(self, size: Size) -> Callable[[], object]:
        draw = self._draw(size.frames, size.objects)
        said = [parse_answer(c.text).to_frame(draw.prompt.units, draw.prompt.policy_hw, draw.prompt.frame_hw) for c in completions(draw, size.completions)]
        return lambda: self.segmenter.segment_group(draw.frame, [object_prompts(answer) for answer in said])

    def tracks(self, size: Size) -> Callable[[], object]:
        draw = self._draw(size.frames, size.objects)
        masks, frames = [track[draw.prompt.target_frame] for track in tracks_beside(draw, size.completions)], draw.episode.annotated_frames
        return lambda: self.segmenter.propagate_group(draw.video, draw.prompt.target_frame, masks, frames)

    def rewards(self, size: Size) -> Callable[[], object]:
        draw = self._draw(size.frames, size.objects)
        answers, tracks = completions(draw, size.completions), tracks_beside(draw, size.completions)

        async def segment(frame, prompts):
            return [track[draw.prompt.target_frame] for track in tracks]

        async def propagate(video, target_frame, masks, frames):
            return tracks

        return lambda: asyncio.run(score_group(draw, answers, [9] * len(answers), self.reward, segment, propagate))

    def learn(self, size: Size) -> Callable[[], object]:
        rng, draw = np.random.default_rng(0), Draw(0, None, self._noise(size.shown), None, None, None)
        answers = [Completion(rng.integers(10, 100, TOKENS).astype(np.int32), np.zeros(TOKENS, np.float32), "", "stop", (("0", TOKENS),), n) for n in range(size.completions)]
        samples = with_advantages([samples_of(ScoredGroup(draw, tuple(answers), (), (), None, "medium"))], [rng.choice([-1.0, 1.0], len(answers))])
        return lambda: self.learner.train_step(samples)

    @cache
    def _draw(self, frames: int, objects: int) -> Draw:
        return self._draws(Size(frames=frames, objects=objects)).batch([0])[0]

    def _draws(self, size: Size, file: bool = False) -> Draws:
        """Of a data set of its own: as many episodes as there are rounds, about one video under many names."""
        builder, folder = PromptBuilder(self.path, replace(self.builder.config, reference_frames=size.shown)), Path(tempfile.mkdtemp(dir=self.folder))
        write_data(folder, size, file, self.times)
        return Draws(str(folder), builder, self.data, seed=0, decoders=self.decoders)

    def _noise(self, shown: int) -> Prompt:
        """A prompt of pictures that there were none of before."""
        frames = dict(enumerate(np.random.default_rng().integers(0, 256, (shown + 1, *HW, 3), np.uint8)))
        return self.builder.build("episode", "the red square", frames, range(shown), shown)


def write_data(folder: Path, size: Size, file: bool, episodes: int) -> None:
    shown, video = folder / ("video.mp4" if file else "video"), Moving(size.frames, HW, size.objects)
    if file:
        write_video(shown, map(video.frame, range(size.frames)), 8)
    else:
        shown.mkdir()
        for t in range(size.frames):
            Image.fromarray(video.frame(t)).save(shown / f"{t:05d}.jpg", quality=92)
    seen = [[annotate(t, mask) for mask in video.masks(t)] for t in range(size.frames)]
    targets = tuple(TargetObject(str(n), tuple(at[n] for at in seen)) for n in range(size.objects))
    names = [f"{n}{shown.suffix}" for n in range(episodes)]
    for name in names:
        (folder / name).symlink_to(shown.name)
    asked = "the red square", 4.0, tuple(range(size.frames)), targets
    write_episodes((Episode(name, "moving", "train", name, name, *HW, size.frames, 8.0, *asked) for name in names), folder / "episodes.parquet")


def completions(draw: Draw, count: int) -> list[Completion]:
    """Answers that name all objects, each with boxes a few pixels off in its own way."""
    rng, scale = np.random.default_rng(0), np.tile(np.divide(draw.prompt.policy_hw, draw.prompt.frame_hw)[::-1], 2)
    found = []
    for n in range(count):
        boxes = (np.array(draw.target.boxes) * scale + rng.uniform(-3, 3, (len(draw.target.boxes), 4))).round().astype(int).tolist()
        said = [{"bbox_2d": b, "point_2d": [(b[0] + b[2]) // 2, (b[1] + b[3]) // 2], "negative_point_2d": [b[2] + 4, b[3] + 4]} for b in boxes]
        found.append(Completion(np.zeros(TOKENS, np.int32), np.zeros(TOKENS, np.float32), f"<think>It is here.</think><answer>{json.dumps(said)}</answer>", "stop", (("0", TOKENS),), n))
    return found


def tracks_beside(draw: Draw, count: int) -> list[dict[int, list[dict]]]:
    """Masks on all frames for so many answers: the truth some pixels away, no two alike."""
    truth = {t: draw.episode.masks(t) for t in draw.episode.annotated_frames}
    return [{t: [encode_rle(mask) for mask in np.roll(masks, (g % 8, g // 8), (1, 2))] for t, masks in truth.items()} for g in range(count)]


def grown(times: dict[str, dict], cpu: bool = False) -> dict:
    """Seconds by size, and how they grow."""
    sizes = [int(size) for size in times]
    p = lambda key, first=0: round(exponent(sizes[first:], [time[key] for time in times.values()][first:]), 3)
    found = {"times": times, "exponent": p("seconds"), "exponent_of_the_last_doubling": p("seconds", -2)}
    return found | ({"exponent_of_cpu_seconds": p("cpu_seconds")} if cpu else {})


def varied(stages: Stages, name: str, sizes: Sequence[int], rounds: int) -> dict:
    """The stages that this size touches, at each of the sizes in turns."""
    found, first = {}, Size(frames=max(Size.frames, 2 * sizes[-1])) if name == "shown" else Size()  # a video that has so many frames
    for stage in TOUCHES[name]:
        print(f"--- {stage} over {name}", file=sys.stderr, flush=True)
        found[stage] = grown(in_turns({str(n): getattr(stages, stage)(replace(first, **{name: n})) for n in sizes}, rounds), stage in HERE)
    return found


def add_steps(found: dict[str, dict]) -> None:
    """To each size's stages the sum over all of a group's."""
    first = {stage: next(iter(result["times"].values()))["seconds"] for stages in found.values() for stage, result in stages.items() if stage != "prompt_file"}
    for stages in found.values():
        sizes = next(iter(stages.values()))["times"]
        alone = sum(seconds for stage, seconds in first.items() if stage not in stages)
        stages["step"] = grown({n: {"seconds": round(alone + sum(stages[s]["times"][n]["seconds"] for s in stages if s in first), 4)} for n in sizes})


def line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds of each more, and of none, neither below 0."""
    each, none = np.polyfit(sizes, seconds, 1)
    return max(0.0, float(each)), max(0.0, float(none))


def engines(stages: Stages, found: dict[str, dict], most: int, rounds: int) -> dict:
    """A step's prompts by 1, 2, ... engines: real ones, and simulated with costs that follow from the growth over completions and from one real engine."""
    print("--- engines", file=sys.stderr, flush=True)
    groups = stages.prompts_a_step
    real = in_turns({str(n): stages.share(n, groups) for n in range(1, len(stages.engines) + 1)}, rounds)
    seconds = lambda stage: ([int(n) for n in found["completions"][stage]["times"]], [t["seconds"] for t in found["completions"][stage]["times"].values()])
    sequence, decoding = line(*seconds("generate"))
    completion, learn = line(*seconds("learn"))
    costs = Costs([TOKENS], decoding / TOKENS, sequence / TOKENS)
    simulated = lambda costs, n: simulate(costs, Sizes(engines=n, sequences=stages.sequences, groups=groups, completions=Size.completions), LoopConfig(steps=6)).step_seconds
    costs = replace(costs, prompt_seconds=max(0.0, (real["1"]["seconds"] - simulated(costs, 1)) / groups))
    score = sum(found["completions"][stage]["times"][str(Size.completions)]["seconds"] for stage in ("masks", "rewards"))
    whole = replace(costs, score_seconds=score, learn_seconds=learn, token_seconds=completion / TOKENS)
    sizes = [2**n for n in range(most)]
    result = {"generate": grown(real)} if len(real) > 1 else {}
    for what, of in (("generate, simulated", costs), ("step, simulated", whole)):
        result[what] = grown({str(n): {"seconds": round(simulated(of, n), 4)} for n in sizes})
    return {"groups": groups, "costs": {k: round(v, 6) for k, v in asdict(whole).items() if k != "lengths"}, "real": real, "stages": result}


def largest(found: dict[str, dict], key: str) -> dict:
    every = [(result[key], f"{stage} over {name}") for name, stages in found.items() for stage, result in stages.items() if key in result]
    return dict(zip(("value", "stage"), max(every)))


def table(record: dict) -> str:
    lines = [f"{'size':12} {'stage':20} {'p':>6} {'last doubling':>14} {'CPU':>6}   milliseconds by size"]
    for name, stages in (*record["sizes"].items(), ("engines", record["engines"]["stages"])):
        for stage, result in stages.items():
            times = "  ".join(f"{n}: {1000 * t['seconds']:,.1f}" for n, t in result["times"].items())
            lines.append(f"{name:12} {stage:20} {result['exponent']:6.2f} {result['exponent_of_the_last_doubling']:14.2f} {result.get('exponent_of_cpu_seconds', '-'):>6}   {times}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write; without it the JSON goes to the screen")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each stage and size (default 3)")
    parser.add_argument("--doublings", type=int, default=3, help="of each size (default 3: once, twice, four and eight times the first)")
    parser.add_argument("--engines", type=int, default=2, help="real engines, at most (default 2)")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all parts on the CPU, also where there is a GPU
    torch.set_num_threads(1)
    sizes = {name: [getattr(Size(), name) << n for n in range(args.doublings + 1)] for name in TOUCHES}
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(Path(folder), min(args.engines, os.cpu_count() or 1), args.rounds, sizes["shown"][-1])
        try:
            found = {name: varied(stages, name, of, args.rounds) for name, of in sizes.items()}
            together = engines(stages, found, args.doublings + 1, args.rounds)
        finally:
            stages.close()
    add_steps(found)
    record = {"machine": machine(1), "rounds": args.rounds, "first": asdict(Size()), "response_tokens": TOKENS}
    record |= {"largest": {key: largest(found, key) for key in ("exponent", "exponent_of_cpu_seconds")}, "sizes": found, "engines": together}
    publish(record, args.json)
    print(table(record), file=sys.stderr)


if __name__ == "__main__":
    main()
