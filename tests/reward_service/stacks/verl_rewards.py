"""The rewards of answers by verl's own code.

The settings are verl's with what a user adds on the command line. The worker is the one that verl runs on Ray, here without it: it loads the reward
function and the policy's tokenizer and makes verl's reward manager, which decodes an answer and calls the function.
"""

import asyncio
from pathlib import Path

import numpy as np
import torch
import verl
from hydra import compose, initialize_config_dir
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopWorker


def settings(policy, reward_file):
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        reward = [f"reward.custom_reward_function.path={reward_file}", "reward.custom_reward_function.name=compute_score"]
        return compose("ppo_trainer", [f"actor_rollout_ref.model.path={policy}", *reward])


def batch(items, tokenizer):
    """As verl's rollout leaves it: a prompt (here of one token), the answers with their end, padded on the right, and the columns of the data set."""
    answers = [tokenizer.encode(item["completion"]) + [tokenizer.eos_token_id] for item in items]
    length = max(map(len, answers))
    tensors = {
        "prompts": torch.full((len(items), 1), tokenizer.eos_token_id),
        "responses": torch.tensor([answer + [tokenizer.pad_token_id] * (length - len(answer)) for answer in answers]),
        "attention_mask": torch.tensor([[1] * (1 + len(answer)) + [0] * (length - len(answer)) for answer in answers]),
    }
    columns = {
        "data_source": ["revos"] * len(items),
        "reward_model": [{"style": "rule", "ground_truth": item["label"]} for item in items],
        "extra_info": [item["extra_info"] for item in items],
    }
    return DataProto.from_dict(tensors, {name: np.array(values, dtype=object) for name, values in columns.items()})


async def rewards(given):
    worker = RewardLoopWorker(settings(given["policy"], given["reward_file"]))
    data = batch(given["items"], worker.input_tokenizer)
    found = await asyncio.gather(*(worker.compute_score(data[i : i + 1]) for i in range(len(data))), return_exceptions=True)
    items = [{"failed": f"{type(f).__name__}: {f}"} if isinstance(f, Exception) else f for f in found]
    return {"manager": type(worker.reward_manager).__name__, "items": items}


def main(given):
    """given: {"reward_file", "policy", "items": [{"completion", "label", "extra_info"}]}.

    Returns of each item what verl's reward manager returns, or {"failed": the exception that it raises}, and the manager's name.
    """
    return asyncio.run(rewards(given))
