"""vLLM logits processor that bans an engine's token ids in every step of every request.

One index fill per step, with no state per request. The alternatives cost more: `logit_bias` rebuilds Python lists of
(requests x banned ids) whenever a request comes or goes, `allowed_token_ids` ships the rest of the vocabulary with each
request and masks the whole logits matrix, and `bad_words` loops over requests and words in Python in each step.
"""

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from rollout.banned_tokens import CONFIG_KEY


class BannedTokens(LogitsProcessorV1, LogitsProcessorV2):
    """Both interfaces at once: vLLM's first model runner (CPUs) and its second (GPUs) hand over different arguments."""

    def __init__(self, vllm_config, device_or_states, is_pin_memory: bool = False):
        device = getattr(device_or_states, "device", device_or_states)
        self.ids = torch.tensor(vllm_config.additional_config[CONFIG_KEY], dtype=torch.long, device=device)

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        pass

    def apply(self, logits: torch.Tensor, ctx=None) -> torch.Tensor:
        return logits.index_fill_(1, self.ids, float("-inf"))
