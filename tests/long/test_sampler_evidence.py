"""HTFS finds frames that show the target in toy videos, by its evidence (a model is trained first: a quarter of an hour and more; resumable)."""

import pytest

from examples.toy import sampler_evidence
from tests.conftest import ROOT


@pytest.mark.long
def test_htfs_finds_the_target_more_often_than_samplers_that_ask_nothing(monkeypatch):
    monkeypatch.chdir(ROOT)
    samplers = sampler_evidence.main([])["samplers"]
    low, _ = samplers["htfs"]["interval"]
    for name in ("uniform", "middle", "first", "random", "htfs, untrained", "htfs, asked about another shape"):
        assert samplers[name]["interval"][1] < low, name
    assert samplers["oracle"]["shows_target"] == 1
