"""The policy of 22 million weights that benchmarks at the small size train: prompts of 950 tokens from six frames, answers of 60 to 250 tokens that name objects.

The toy policy is taught prompts and answers of that size by `videoseg sft` (some minutes, once: it is kept in data/small-policy), and then becomes a corner of a larger network.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from cluster.policies import SETTINGS
from examples.toy.runs import run_to_its_end, videoseg
from examples.toy.teacher import answer
from rollout.episodes import read_episodes
from rollout.toy_data import ToyDataConfig, video_of, write_toy_data

ROOT = Path(__file__).resolve().parent.parent
TOY, KEPT = ROOT / "examples/toy/models/policy", ROOT / "data/small-policy"
TARGET = (560, 560)
SMALL = [
    "prompt.reference_frames=5", "prompt.reference_size=[280,280]", f"prompt.target_size={list(TARGET)}", "prompt.max_tokens=1024", "rollout.max_response_tokens=256", "rollout.max_model_len=1280",
    "rollout.max_images=6", "rollout.cpu_threads=2", "learner.tokens_per_microbatch=4096",
]  # fmt: skip
"""Settings that go with it."""
STEPS, BATCH, MOST = 120, 16, 5
TEXT = dict(hidden_size=384, intermediate_size=1152, num_hidden_layers=8, layer_types=["full_attention"] * 8, num_attention_heads=12, num_key_value_heads=6)
VISION = dict(hidden_size=240, intermediate_size=768, depth=8, num_heads=10, out_hidden_size=384, fullatt_block_indexes=[0, 1, 2, 7])


def save_small_policy(folder: Path) -> None:
    """A copy of it, made first where there is none yet."""
    if not KEPT.exists():
        work = KEPT.with_name(f"{KEPT.name}.work")
        work.mkdir(parents=True, exist_ok=True)
        teach(work)
        grow(work / "taught", work / "grown")
        os.replace(work / "grown", KEPT)
        shutil.rmtree(work)
    shutil.copytree(KEPT, folder)


def teach(work: Path) -> None:
    """To `work/taught`, which goes on where it was cut short."""
    data = work / "data"
    if not data.exists():
        with tempfile.TemporaryDirectory(dir=work) as partial:
            write_answers(Path(partial) / "data")
            os.replace(Path(partial) / "data", data)
    settings = [*SMALL, f"policy.path={TOY}", f"data.train={data / 'train'}", f"data.evaluation={data / 'valid_u'}", "data.generate=null", f"sft.answers={data / 'answers.jsonl'}"]
    learner = ["learner.lr=5e-4", "learner.min_lr_ratio=0.1", "learner.warmup_steps=5"]
    run_to_its_end(work / "run", "sft", "debug", *settings, *learner, f"rollout.prompts_per_step={BATCH}", f"loop.steps={STEPS}", "loop.save_every=20", "eval.ends=false")
    videoseg("export", str(work / "run"), str(work / "taught"))
    (work / "taught" / SETTINGS).unlink()


def write_answers(folder: Path) -> None:
    """Toy videos, and of each episode an answer of the toy teacher whose thought is said once to MOST times."""
    config, rng = ToyDataConfig(train=STEPS * BATCH // 4, valid_u=4, valid=0, seed=3), np.random.default_rng(3)
    write_toy_data(folder, config, progress=lambda line: None)
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as lines:
        for episode in read_episodes(folder / "train"):
            video, query = video_of(episode, config.world)
            t = int(rng.choice(episode.target_frames(0.0)))
            said = answer(video, query, t, TARGET, rng, hedged=0.5)
            thought = said[len("<think>") : said.index("</think>")]
            text = said.replace(thought, " ".join([thought] * rng.integers(1, MOST + 1)), 1)
            lines.write(json.dumps({"episode_id": episode.episode_id, "response": text, "target_frame": t}) + "\n")


def grow(policy: Path, out: Path) -> None:
    """A policy of 22 million weights that says what the given one says, with its 1.5 million.

    These are a corner of the larger matrices. What is beside them computes as much as any weights do, and writes nothing until it learns.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    taught, config = AutoModelForImageTextToText.from_pretrained(policy), AutoConfig.from_pretrained(policy)
    for part, sizes in ((config.text_config, TEXT), (config.vision_config, VISION)):
        for key, value in sizes.items():
            setattr(part, key, value)
    large, learned = AutoModelForImageTextToText.from_config(config), dict(taught.named_parameters())
    with torch.no_grad():
        for name, weight in large.named_parameters():
            if any(part in name for part in ("embed", "o_proj", "attn.proj", "down_proj", "merger.mlp.2")):
                weight.zero_()  # into the residual stream goes what the given policy writes
            if name in learned:
                corner = learned[name]
                rows, columns = 3 if "attn.qkv" in name else 1, 4 if "merger.mlp.0.weight" in name else 1  # of which each has a corner of its own
                whole, own = (w.view(rows, len(w) // rows, columns, -1) for w in (weight, corner))
                whole[:, : own.shape[1], :, : own.shape[3]] = own * (len(corner) / len(weight)) ** (0.5 * ("norm" in name or "ln_q" in name))  # means over more numbers
    shutil.copytree(policy, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "training.json"), dirs_exist_ok=True)
    large.save_pretrained(out)
