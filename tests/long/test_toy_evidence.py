"""The toy run learns, by its evidence: three seeds rise, as do runs whose groups are begun ahead; learning rate 0 and the controls stay (an hour; resumable)."""

import pytest

from examples.toy import evidence
from tests.conftest import ROOT


@pytest.mark.long
def test_the_toy_run_learns_and_its_controls_do_not(monkeypatch):
    monkeypatch.chdir(ROOT)
    record = evidence.main([])
    runs = record["runs"]
    seeds = [runs[name]["gain"] for name in runs if name.startswith("seed")]
    assert min(gain["iou/box"] for gain in seeds) >= 0.10
    assert min(gain["iou/mask"] for gain in seeds) > 0
    spread = max(gain["reward/mean"] for gain in seeds) - min(gain["reward/mean"] for gain in seeds)
    assert min(gain["reward/mean"] for gain in seeds) > spread
    assert runs["lr-0"]["gain"]["iou/box"] == 0
    assert abs(runs["shuffled-in-video"]["gain"]["iou/box"]) <= 0.03
    assert abs(runs["blank-frames"]["gain"]["iou/box"]) <= 0.03
    ahead = ("one-step-off", "asynchronous")  # whose rollouts are of older weights than those that they train
    for name in ahead:
        assert runs[name]["gain"]["reward/mean"] >= min(gain["reward/mean"] for gain in seeds) - spread
    for name in runs.keys() - ahead:
        assert max(runs[name]["curves"]["mismatch/kl"]) < 0.01
        assert max(runs[name]["curves"]["mismatch/logprob_diff"]) < 1e-3
