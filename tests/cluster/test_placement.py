"""Which process sits where, from the configuration alone."""

import pytest

from cluster import config, config_resolve
from cluster.errors import ConfigError
from cluster.placement import bundles, seats

NODE = config_resolve.Hardware(cuda_devices=8, cuda_memory_gib=80.0, cuda_capability=9.0, cores=128, ram_gib=1000.0)


def resolved(recipe, *overrides, hardware=NODE):
    return config_resolve.resolve(config.load(recipe, overrides), hardware)


def by_bundle(settings, **roles):
    found = {}
    for seat in seats(settings, **roles):
        found.setdefault(seat.bundle, []).append((seat.role, seat.number))
    return found


def test_colocated_parts_that_share_weights_share_a_gpu():
    settings = resolved("videoseg_r1_7b")
    assert settings.rollout.weight_sync == "ipc"
    together = by_bundle(settings)
    assert together[0] == [("engine", 0), ("segmenter", 0), ("learner", 0)]
    assert all(together[n] == [("engine", n), ("learner", n)] for n in range(1, 8)) and len(together) == 8
    assert all(bundle["GPU"] == 1 for bundle in bundles(settings))  # a whole one, or Ray would put two halves together
    assert all(sum(seat.gpus for seat in seats(settings) if seat.bundle == n) <= 1 for n in range(8))


def test_parts_with_gpus_of_their_own():
    own = ["rollout.engines=2", "rollout.tensor_parallel=2", "learner.ranks=3", "rollout.sleep=false", "cluster.gpus_per_learner=1", "cluster.gpus_per_segmenter=0.5", "segmentation.replicas=2"]
    settings = resolved("videoseg_r1_7b", *own)
    assert settings.rollout.weight_sync == "nccl"
    assert bundles(settings) == [{"CPU": 1.0, "GPU": 2}] * 2 + [{"CPU": 0.5, "GPU": 0.5}] * 2 + [{"CPU": 0.5, "GPU": 1.0}] * 3
    assert [len(parts) for parts in by_bundle(settings).values()] == [1] * 7


def test_a_laptop_reserves_no_gpu():
    settings = resolved("debug", "rollout.engines=2", hardware=config_resolve.Hardware(cores=2))
    assert bundles(settings) == [{"CPU": 1.0}] * 2 + [{"CPU": 0.5}] * 2
    assert by_bundle(settings, roles=("learner",)) == {0: [("learner", 0)]}


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["rollout.weight_sync=ipc", "rollout.tensor_parallel=2", "rollout.engines=4"], "needs engines of one GPU each"),
        (["rollout.weight_sync=nccl", "learner.ranks=4", "rollout.engines=2", "cluster.gpus_per_learner=0.4"], "two could sit on one GPU"),
    ],
)
def test_what_cannot_share_a_gpu_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        resolved("videoseg_r1_7b", "rollout.sleep=false", *overrides)
