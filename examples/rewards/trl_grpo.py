"""A short real GRPO run with TRL and the reward service, on one CPU core: a tiny language model learns where four things are.

    pip install 'trl>=1.16,<1.17'
    videoseg serve reward &                                     # or leave out --url, and the rewards are computed in the process
    python examples/rewards/trl_grpo.py --url http://127.0.0.1:8001

The model has one word a token and reads no image: each prompt is a name, and a name is always at the same place. Supervised steps teach it
the format of an answer and places that are up to 16 of 64 pixels off; the exact ones are left to GRPO. Prints one JSON line every twenty steps.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from reward_service.adapters.trl import trl_reward

BOXES = {"cat": (8, 8, 24, 32), "dog": (32, 8, 56, 24), "cup": (8, 40, 24, 56), "car": (40, 32, 56, 56)}
NUMBERS = [str(n) for n in range(0, 64, 8)]
BEFORE, BETWEEN, AFTER = '<think> here </think> <answer> [{"bbox_2d": [', '], "point_2d": [', "]}] </answer>"
REWARD = {
    "weights": {"negative_point": 0.0},
    "length": {"penalty": False},
    "iou_grading": "graded",
    "box_l1_grading": "graded",
    "point_grading": "graded",
    "space": "raw",  # distances in pixels of the 64x64 image: a first guess, 20 pixels off, earns something
}


def truth(name: str) -> list[int]:
    """Corners of the box, and the point in its middle."""
    x1, y1, x2, y2 = BOXES[name]
    return [x1, y1, x2, y2, (x1 + x2) // 16 * 8, (y1 + y2) // 16 * 8]


def target(name: str) -> str:
    return json.dumps({"image_size": [64, 64], "boxes": [truth(name)[:4]], "points": [[truth(name)[4:]]]})


def roughly(name: str) -> list[str]:
    return [str(min(56, max(0, n + random.choice((-16, -8, 0, 8, 16))))) for n in truth(name)]


def answer(numbers: list[str]) -> str:
    return f"{BEFORE} {' , '.join(numbers[:4])} {BETWEEN} {' , '.join(numbers[4:])} {AFTER}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *BOXES, ",", *NUMBERS, *dict.fromkeys(f"{BEFORE} {BETWEEN} {AFTER}".split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def teach_format(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int = 200) -> float:
    """Returns the last loss: near the entropy of six numbers a text, which is all that is left to be unsure of."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        texts = [f"{name} {answer(roughly(name))} </s>" for name in random.choices(list(BOXES), k=32)]
        ids = tokenizer(texts, return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, 0] = -100  # the prompt
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


class Printed(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            shown = {name.removeprefix("videoseg/"): round(logs[name], 3) for name in logs if name == "reward" or name.startswith("videoseg/")}
            print(json.dumps({"step": state.global_step, **shown}), flush=True)


def grpo_trainer(url: str | None, steps: int, out: str, format_steps: int = 200, **settings: Any) -> GRPOTrainer:
    """TRL's trainer of a model that knows the format; settings: of `GRPOConfig`, in place of those here."""
    set_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(json.dumps({"format_loss": round(teach_format(model, tokenizer, format_steps), 3)}), flush=True)
    rows = [{"prompt": name, "target": target(name)} for name in BOXES] * 256
    defaults = dict(
        output_dir=out, max_steps=steps, per_device_train_batch_size=128, num_generations=32, max_completion_length=24,
        learning_rate=5e-4, lr_scheduler_type="constant", beta=0.0, temperature=1.0, logging_steps=20, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    reward = trl_reward(url=url, preset="videoseg_r1", reward=REWARD)
    config = GRPOConfig(**{**defaults, **settings})
    return GRPOTrainer(model, reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Printed()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a reward service; without it, rewards are computed in this process")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="runs/trl_grpo", help="folder of the trainer")
    options = parser.parse_args()
    grpo_trainer(options.url, options.steps, options.out).train()


if __name__ == "__main__":
    main()
