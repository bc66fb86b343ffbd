"""What an engine gives back for a prompt."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    `logprobs[t]` is the log-probability of `token_ids[t]` under the distribution that was sampled from:
    `log_softmax(logits.float().masked_fill(banned, -inf) / temperature)`. Banned ids (`fingerprints()["banned_token_ids"]`)
    are out of the normalisation, so a learner matches these numbers by masking the same ids to -inf, dividing by the same
    temperature and taking the log-softmax in float32. Greedy completions (temperature 0) carry log-probs at temperature 1.
    With top_p < 1 the normalisation also leaves out the cut tokens, which a learner cannot repeat.
    """

    token_ids: np.ndarray  # int32 (R,), the end token included if there is one
    logprobs: np.ndarray  # float32 (R,)
    text: str  # without the end token; other special tokens stay visible
    finish_reason: str  # "stop", "length" or "abort"
    weight_versions: tuple[tuple[str, int], ...]  # (version, number of tokens) spans, in order
    seed: int | None
    top_logprobs: np.ndarray | None = None  # float32 (R, SamplingConfig.top_logprobs), the most likely token first; None: not asked for
