"""Weights that arrive as others than were sent, from GPU to GPU: found, and named. The transfer itself is played; no GPU is needed."""

import asyncio
from types import SimpleNamespace

import pytest

from cluster import config
from cluster.errors import RunFailed
from cluster.weight_sync import sync_weights


class Played:
    """An actor whose methods answer at once; `said` is what it was asked."""

    def __init__(self, **answers):
        self.answers, self.said = answers, []

    def __getattr__(self, name):
        async def call(*arguments):
            self.said.append((name, *arguments))
            return self.answers.get(name)

        return SimpleNamespace(remote=call)


SENT = {"model.embed_tokens.weight": "aa", "model.norm.weight": "bb"}


def synced(*received, checked=True):
    settings = config.load("debug", ["rollout.weight_sync=ipc"])
    engines, learners = [Played(hashed_weights=workers) for workers in received], [Played(send_weights=SENT), Played(send_weights={})]
    return asyncio.run(sync_weights(engines, learners, 3, settings, checked)), engines, learners


def test_all_workers_of_all_engines_must_have_what_rank_0_sent():
    values, engines, learners = synced([SENT, dict(SENT)], [SENT])
    assert values == {"sync/checked": 1.0}
    assert [said for said, *_ in engines[0].said] == ["begin_weight_sync", "hash_weights", "hashed_weights", "finish_weight_sync"]
    assert all(learner.said == [("send_weights", True)] for learner in learners)


@pytest.mark.parametrize(
    "received, named",
    [
        (SENT | {"model.norm.weight": "cc"}, "model.norm.weight, and 0 more"),
        ({"model.norm.weight": "bb"}, "model.embed_tokens.weight, and 0 more"),
        ({name + "x": digest for name, digest in SENT.items()}, "model.embed_tokens.weight, and 3 more"),
    ],
)
def test_a_weight_that_differs_is_named_and_the_version_is_not_served(received, named):
    with pytest.raises(RunFailed, match=rf"engine 1 received other weights than the learner sent \(weights 3\): {named}"):
        synced([SENT], [SENT, received])


def test_between_checks_nothing_is_hashed():
    values, engines, learners = synced([None], checked=False)
    assert values == {"sync/checked": 0.0} and learners[0].said == [("send_weights", False)]
    assert [said for said, *_ in engines[0].said] == ["begin_weight_sync", "finish_weight_sync"]
