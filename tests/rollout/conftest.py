"""One tiny policy and one vLLM engine for all rollout tests."""

import asyncio

import pytest

from tiny_policy import build_tiny_policy


class RunningEngine:
    """A started `RolloutEngine` and the event loop it lives in: `engine.run(engine.generate(...))`."""

    def __init__(self, folder, loop, **options):
        from rollout.config import RolloutConfig
        from rollout.engine import RolloutEngine

        self.folder, self._loop = folder, loop
        self.config = RolloutConfig(max_model_len=512, max_response_tokens=16, max_sequences=64, max_batched_tokens=512, kv_cache_gb=0.25, log_level="ERROR")
        self.engine = RolloutEngine(folder, self.config, **options)
        self.report = self.run(self.engine.ready())

    def run(self, coroutine):
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, 120))

    def __getattr__(self, name):
        return getattr(self.engine, name)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return build_tiny_policy(tmp_path_factory.mktemp("tiny") / "a", seed=0)


@pytest.fixture(scope="session")
def engine_loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder, engine_loop):
    """The engine of the session. A test that changes its weights puts those of `tiny_folder` back."""
    engine = RunningEngine(tiny_folder, engine_loop)
    yield engine
    engine.run(engine.shutdown())
