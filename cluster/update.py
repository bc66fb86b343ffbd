"""One update of the policy: advantages from rewards, and the learner's step on the samples that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from learner.advantages import step_advantages
from learner.batch import Sample
from learner.config import LearnerConfig

from cluster.placement import gather


async def update(learners: Sequence[Any], config: LearnerConfig, rewards_BG: np.ndarray, groups: Sequence[Sequence[Sample]]) -> tuple[list[list], dict[str, float]]:
    """(advantages of each group's samples, the learner's metrics). Whatever advantages the samples have are replaced."""
    kls = await _reference_kls(learners, groups) if config.kl_in_reward else None
    advantages = step_advantages(config, rewards_BG, kls)
    samples = ray.put([replace(s, advantage=a) for group, own in zip(groups, advantages, strict=True) for s, a in zip(group, own, strict=True)])
    learned = (await gather([learner.train_step.remote(samples) for learner in learners]))[0]
    return advantages, learned | ({"kl": float(np.concatenate(kls).mean())} if kls else {})


async def _reference_kls(learners: Sequence[Any], groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
    """Per-token KL to the reference of every completion, for the reward."""
    samples = ray.put([s for group in groups for s in group])
    found = (await gather([learner.reference_kl.remote(samples) for learner in learners]))[0]
    return [kl.copy() for kl in found]  # what comes out of Ray's object store cannot be written to, of which torch warns
