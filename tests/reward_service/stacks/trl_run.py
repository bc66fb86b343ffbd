"""The example with TRL's own trainer, shortened."""

import sys

sys.modules["vllm"] = None  # TRL would import it, for ten seconds; the example's model generates with transformers

from datasets import Dataset
from examples.rewards.trl_grpo import BOXES, REWARD, grpo_trainer, target

SETTINGS = dict(per_device_train_batch_size=64, num_generations=16, learning_rate=1e-3, logging_steps=1, log_completions=True, num_completions_to_print=1)


def main(given):
    """given: {"url", "steps", "out"}. Two runs, in folders of `out`, where TRL leaves a table of completions of each step.

    `short`: of a model that half knows the format. `unscorable`: one step, in which the label of one of the four prompts is no target.
    Returns what TRL logged of both, and {"reward": the settings, "targets": by prompt}.
    """
    runs = {name: grpo_trainer(given["url"], steps, f"{given['out']}/{name}", format_steps=30, **SETTINGS) for name, steps in (("short", given["steps"]), ("unscorable", 1))}
    runs["unscorable"].train_dataset = Dataset.from_list([{"prompt": name, "target": "a car" if name == "car" else target(name)} for name in BOXES])
    for trainer in runs.values():
        trainer.train()
    return {"reward": REWARD, "targets": {name: target(name) for name in BOXES}, **{name: trainer.state.log_history for name, trainer in runs.items()}}
