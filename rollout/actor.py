"""The rollout engine as a Ray actor: `RolloutEngineActor.options(num_cpus=1).remote(model, config)`, then `await ready()`."""

import ray

from rollout.engine import RolloutEngine

# Async actor: every coroutine of RolloutEngine becomes a method; `generate` calls overlap and vLLM batches them.
RolloutEngineActor = ray.remote(max_concurrency=1000)(RolloutEngine)
