"""The Ray shell: two ranks as actors, samples through the object store, weights out as a stream."""

from __future__ import annotations

from tiny_learner import BANNED, random_samples, save_policy

from learner.actor import LearnerActor
from learner.config import LearnerConfig


def test_two_actors_train_and_stream_weights(ray_session, tmp_path):
    import ray

    policy = save_policy(tmp_path / "policy")
    remote = ray.remote(LearnerActor).options(num_cpus=1)
    ranks = [remote.remote() for _ in range(2)]
    host, port = ray.get(ranks[0].address.remote())
    config = LearnerConfig(ranks=2, zero_stage=3, lr=1e-3, kl_coef=0.0, threads=1)
    common = dict(config=config, policy_path=policy, world_size=2, master_addr=host, master_port=port, total_steps=2, banned_token_ids=BANNED)
    assert ray.get([a.start.remote(rank=r, **common) for r, a in enumerate(ranks)]) == ["cpu torch.float32"] * 2

    samples = ray.put(random_samples())
    first, second = ray.get([a.train_step.remote(samples) for a in ranks])
    assert first["loss"] == second["loss"] and first["grad_norm"] > 0

    streams = [a.weight_buckets.options(num_returns="streaming").remote(40_000) for a in ranks]
    names = []
    for sent, followed in zip(*streams, strict=True):
        bucket = ray.get(sent)
        names += [name for name, tensor in bucket.tensors() if tensor.numel()]
        assert ray.get(followed).data is None
    assert len(names) == len(set(names)) == 57
    for actor in ranks:
        ray.kill(actor)
