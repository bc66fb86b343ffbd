"""TRL's side of ../whole_loop.py: `GRPOTrainer` with transformers' generation, on our prompts, pictures and rewards. Settings as JSON on stdin, times as JSON on the last line.

    {"overrides": settings of the debug recipe, "steps": N, "out": folder}
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import numpy as np
from PIL import Image

from cluster import config, config_files, config_resolve
from cluster.draws import Draws
from cluster.scoring import score_group
from reward_service import think_text
from rollout.completion import Completion
from rollout.prompts import IMAGE
from segmentation_service.segmenter import Segmenter

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
    draws = Draws.of_run(settings)[0]
    taken = {draw.position: draw for draw in draws.batch(range(asked["steps"] * rollout.prompts_per_step))}
    segmenter = Segmenter(s.checkpoint, s.backend, s.device, s.dtype, s.max_prompts_per_batch, s.propagation, s.model_config)
    tokenizer = draws.builder.tokenizer

    async def segment(frame, hypotheses):
        return segmenter.segment_group(frame, hypotheses)

    lengths: list[list[int]] = []
    objects: list[list[int]] = []

    def reward(prompts, completions, completion_ids, position, **_):
        """Group by group, as our loop scores them."""
        totals = []
        lengths.append([len(ids) for ids in completion_ids])
        objects.append([])
        for first in range(0, len(completions), rollout.group_size):
            texts = [c[0]["content"] for c in completions[first : first + rollout.group_size]]
            ids = completion_ids[first : first + rollout.group_size]
            group = [Completion(np.array(i, np.int32), np.zeros(len(i), np.float32), text, "stop", (("0", len(i)),), 0) for i, text in zip(ids, texts)]
            thoughts = [len(tokenizer(think_text(text), add_special_tokens=False)["input_ids"]) for text in texts]
            scored = asyncio.run(score_group(taken[position[first]], group, thoughts, settings.reward, segment))
            objects[-1] += [len(answer.objects) for answer in scored.answers]
            totals += scored.rewards.tolist()
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
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

    batch = rollout.prompts_per_step * rollout.group_size
    trainer = GRPOTrainer(
        model, reward, train_dataset=Dataset.from_list(rows), processing_class=processor, callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=asked["out"], max_steps=asked["steps"], per_device_train_batch_size=batch, num_generations=rollout.group_size, shuffle_dataset=False,
            max_completion_length=rollout.max_response_tokens, temperature=rollout.temperature, beta=learner.kl_coef, learning_rate=learner.lr,
            lr_scheduler_type="cosine", warmup_steps=learner.warmup_steps, weight_decay=learner.weight_decay, max_grad_norm=learner.max_grad_norm,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
        ),
    )  # fmt: skip
    begun = time.perf_counter()
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(json.dumps({"seconds": np.diff([begun, *ends]).tolist(), "reward": rewards, "tokens": lengths, "objects": objects}))


if __name__ == "__main__":
    main()
