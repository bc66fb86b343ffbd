"""The rewards of answers by OpenRLHF's own code, as its trainer gets them."""

import asyncio
from types import SimpleNamespace

import torch
from openrlhf.utils.agent import SingleTurnAgentExecutor
from transformers import AutoTokenizer


class Engine:
    """In the place of vLLM: writes the answer that it is given."""

    def __init__(self, tokenizer, completion):
        self.tokens = tokenizer.encode(completion) + [tokenizer.eos_token_id]

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.tokens, finish_reason="stop", logprobs=None)])


def plain(value):
    """The number that OpenRLHF's trainer makes of a reward, of a score or of a value to log; None stays None."""
    return None if value is None else torch.tensor([value]).item()


async def rewards(given):
    tokenizer = AutoTokenizer.from_pretrained(given["policy"])
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": given["question"]}], tokenize=False, add_generation_prompt=True)

    async def one(executor, item):
        parameters = SimpleNamespace(max_tokens=None, logprobs=None)
        found = await executor.execute(prompt, item["label"], parameters, 4096, tokenizer, Engine(tokenizer, item["completion"]))
        return {"reward": plain(found["reward"]), "score": plain(found["scores"]), "logs": {name: plain(v) for name, v in found["extra_logs"].items()}}

    executors = [SingleTurnAgentExecutor(endpoint) for endpoint in given["endpoints"]]
    return await asyncio.gather(*(asyncio.gather(*(one(executor, item) for item in given["items"])) for executor in executors))


def main(given):
    """given: {"endpoints", "policy", "question", "items": [{"completion", "label"}]}; an endpoint is what a user gives as --reward.remote_url.

    Returns of each endpoint, of each item {"reward", "score", "logs"}.
    """
    return asyncio.run(rewards(given))
