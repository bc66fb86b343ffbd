"""The toy policy's optimizer: Muon in float32 takes the steps of torch's own, which computes in bfloat16."""

import copy

import torch

from examples.toy.train_policy import Muon


def test_float32_muon_follows_torchs():
    torch.manual_seed(0)
    ours = [torch.randn(24, 40), torch.randn(40, 24), torch.randn(16, 16)]
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    optimizers = Muon(ours), torch.optim.Muon(theirs, lr=0.1, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for group in optimizers[0].param_groups:
        group["lr"] = 0.1
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, s in zip(ours, theirs, start):
        moved = (b - s).norm()
        assert moved > 0.03 * s.norm()
        assert (a - b).norm() < 0.02 * moved  # bfloat16 rounds to 0.4%
