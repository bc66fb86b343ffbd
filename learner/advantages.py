"""A step's advantages from its rewards, as the configuration says; with the KL as part of the reward, from both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .config import LearnerConfig
from .grpo import group_advantages, penalised_returns, penalised_rewards


def step_advantages(config: LearnerConfig, rewards_BG: np.ndarray, kls: Sequence[np.ndarray] | None = None) -> list[list[float | np.ndarray]]:
    """For each group its completions' advantages: numbers, or arrays (R,) of one a token.

    rewards_BG: G completions of B groups. kls: of every completion, in row order, what `LearnerWorker.reference_kl` gives;
    needed if `kl_in` is "reward". REINFORCE++ then has one return, and so one advantage, a token; all others one a completion.
    """
    if not config.kl_in_reward:
        return group_advantages(rewards_BG, method=config.advantage, eps=config.advantage_eps).tolist()
    if config.advantage != "reinforce++":
        return group_advantages(penalised_rewards(rewards_BG, kls, config.kl_coef), method=config.advantage, eps=config.advantage_eps).tolist()
    returns = penalised_returns(rewards_BG, kls, config.kl_coef)
    flat = group_advantages(torch.cat(returns)[None], method=config.advantage, eps=config.advantage_eps)[0]
    pieces = [piece.numpy() for piece in flat.split([len(r) for r in returns])]
    size = rewards_BG.shape[1]
    return [pieces[start : start + size] for start in range(0, len(pieces), size)]
