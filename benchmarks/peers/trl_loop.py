"""TRL's side of ../whole_loop.py and ../time_to_reward.py: `GRPOTrainer` with transformers' generation, on our prompts, pictures and rewards. Settings as JSON on stdin, times as JSON on the last line.

    {"overrides": settings of the debug recipe, "steps": N, "out": folder, "every": steps from one evaluation to the next; without it there is none}
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import numpy as np
import torch
from PIL import Image

from cluster import config, config_files, config_resolve
from cluster.draws import Draws
from cluster.scoring import score_group
from reward_service import think_text
from rollout.completion import Completion
from rollout.prompts import IMAGE
from segmentation_service.segmenter import Segmenter

EVALUATED = 64
"""Held-out episodes of a batch."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def messages(draw, render) -> list[dict]:
    """The prompt as TRL takes it: its text and its pictures in turns."""
    prompt, parts = draw.prompt, []
    text = render(draw.episode.query, prompt.frame_ids, prompt.target_frame, draw.episode.fps).split("user\n", 1)[1].rsplit("<|im_end|>", 1)[0]
    for n, piece in enumerate(text.split(IMAGE)):
        parts += [{"type": "image", "text": None}] * bool(n) + [{"type": "text", "text": piece}] * bool(piece)
    return [{"role": "user", "content": parts}]


def main() -> None:
    asked = json.load(sys.stdin)
    settings = config_files.locate(config_resolve.resolve(config.load("debug", asked["overrides"]), config_resolve.detect_hardware()))
    rollout, learner, s = settings.rollout, settings.learner, settings.segmentation
    draws, held_out = Draws.of_run(settings)
    taken = {draw.position: draw for draw in draws.batch(range(asked["steps"] * rollout.prompts_per_step))}
    segmenter = Segmenter(s.checkpoint, s.backend, s.device, s.dtype, s.max_prompts_per_batch, s.propagation, s.model_config)
    tokenizer = draws.builder.tokenizer

    async def segment(frame, hypotheses):
        return segmenter.segment_group(frame, hypotheses)

    lengths: list[list[int]] = []
    objects: list[list[int]] = []

    def scored(draw, ids, texts):
        """A group, as our loop scores it."""
        group = [Completion(np.array(i, np.int32), np.zeros(len(i), np.float32), text, "stop", (("0", len(i)),), 0) for i, text in zip(ids, texts)]
        thoughts = [len(tokenizer(think_text(text), add_special_tokens=False)["input_ids"]) for text in texts]
        return asyncio.run(score_group(draw, group, thoughts, settings.reward, segment))

    def reward(prompts, completions, completion_ids, position, **_):
        totals = []
        lengths.append([len(ids) for ids in completion_ids])
        objects.append([])
        for first in range(0, len(completions), rollout.group_size):
            of_group = slice(first, first + rollout.group_size)
            group = scored(taken[position[first]], completion_ids[of_group], [c[0]["content"] for c in completions[of_group]])
            objects[-1] += [len(answer.objects) for answer in group.answers]
            totals += group.rewards.tolist()
        return totals

    sys.modules["vllm"] = None  # TRL would import it
    from datasets import Dataset
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor.from_pretrained(settings.policy.path), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    tokenizer.padding_side = "left"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(settings.policy.path, dtype="float32")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "visual" not in name  # vision_lr and projector_lr are 0 in the debug recipe
    rows = [{"prompt": messages(d, draws.builder.render), "images": [Image.fromarray(i) for i in d.prompt.images], "position": n} for n, d in sorted(taken.items())]
    for n, row in enumerate(rows):  # both sides see the same tokens
        assert processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) == taken[n].prompt.text
        assert processor(text=[taken[n].prompt.text], images=[row["images"]])["input_ids"][0] == taken[n].prompt.token_ids.tolist()

    def evaluate() -> float:
        """Mean reward of a greedy answer to each held-out episode, a batch at a time."""
        model.eval()
        draws, rewards = held_out.held_out(settings.eval.episodes)[0], []
        for few in (draws[n : n + EVALUATED] for n in range(0, len(draws), EVALUATED)):
            inputs = processor(text=[d.prompt.text for d in few], images=[[Image.fromarray(i) for i in d.prompt.images] for d in few], padding=True, return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(**inputs, do_sample=False, max_new_tokens=rollout.max_response_tokens)[:, inputs["input_ids"].shape[1] :].tolist()
            for draw, said in zip(few, ids):
                said = said[: said.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in said else said
                rewards += scored(draw, [said], [tokenizer.decode(said, skip_special_tokens=True)]).rewards.tolist()
        model.train()
        return float(np.mean(rewards))

    every, ends, evaluations = asked.get("every"), [], []  # ends: of steps, by a clock that stands still in evaluations

    class Clock(TrainerCallback):
        behind = 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.on_step_end(args, state, control)

        def on_step_end(self, args, state, control, **kwargs):
            begun = time.perf_counter()
            ends.append(begun - self.behind)
            if every and (state.global_step % every == 0 or state.global_step == asked["steps"]):
                evaluations.append([state.global_step, ends[-1] - ends[0], evaluate()])
                self.behind += time.perf_counter() - begun

    batch = rollout.prompts_per_step * rollout.group_size
    trainer = GRPOTrainer(
        model, reward, train_dataset=Dataset.from_list(rows), processing_class=processor, callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=asked["out"], max_steps=asked["steps"], per_device_train_batch_size=batch, num_generations=rollout.group_size, shuffle_dataset=False,
            max_completion_length=rollout.max_response_tokens, temperature=rollout.temperature, beta=learner.kl_coef, learning_rate=learner.lr,
            lr_scheduler_type="cosine", warmup_steps=learner.warmup_steps, weight_decay=learner.weight_decay, max_grad_norm=learner.max_grad_norm,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=settings.run.seed,
        ),
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(json.dumps({"seconds": np.diff(ends).tolist(), "reward": rewards, "tokens": lengths, "objects": objects, "held_out": evaluations}))


if __name__ == "__main__":
    main()
