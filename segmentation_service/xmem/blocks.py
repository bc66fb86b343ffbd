"""Building blocks of XMem's networks. Attribute names are those of the published weights' keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def upsample(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear, pixel corners not aligned."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


NNPACK_FROM = {1: 1024, 2: 4096}
"""Positions from which NNPACK, which has one thread, beats that many threads of torch's own convolution; more always win."""


class WideConv2d(nn.Conv2d):
    """A 3x3 convolution of large maps. Inference on one or two CPU threads leaves it to NNPACK where torch has it built in.

    NNPACK's Winograd transform needs a fraction of the multiplications. Its error, some 1e-4 of the outputs' deviation, is ten
    times that of the direct way, so it may stand only where no memory element is chosen by the result: in the decoder.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._suits_nnpack(x):
            return super().forward(x)
        # One object at a time: for batches NNPACK takes another, slower way.
        return torch.cat([torch._nnpack_spatial_convolution(one.contiguous(), self.weight, self.bias, self.padding) for one in x.split(1)])

    def _suits_nnpack(self, x: torch.Tensor) -> bool:
        positions = x.shape[2] * x.shape[3]
        if x.device.type != "cpu" or self.in_channels < 64 or positions < NNPACK_FROM.get(torch.get_num_threads(), positions + 1):
            return False
        if x.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        return hasattr(torch, "_nnpack_spatial_convolution") and torch.backends.nnpack.is_available()


class SharedConv2d(nn.Conv2d):
    """A convolution whose first `shared` input channels are the same for every object of the batch.

    It is linear in its input channels, so that those are convolved once (`shared_part`, with the bias) and the objects' own
    channels once an object; `forward` adds the two. Its weight is that of the plain convolution over both.
    """

    def __init__(self, shared: int, own: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(shared + own, outputs, kernel, stride, kernel // 2, bias=bias)
        self.shared = shared
        self.register_buffer("shared_weight", None, persistent=False)
        self.register_buffer("own_weight", None, persistent=False)

    def split(self) -> None:
        """Keep the two parts of the weight as tensors of their own, for a weight that changes no more."""
        layout = torch.channels_last if self.weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        self.shared_weight, self.own_weight = (part.contiguous(memory_format=layout) for part in (self.weight[:, : self.shared], self.weight[:, self.shared :]))

    def shared_part(self, shared_1Chw: torch.Tensor) -> torch.Tensor:
        weight = self.weight[:, : self.shared] if self.shared_weight is None else self.shared_weight
        return F.conv2d(shared_1Chw, weight, self.bias, self.stride, self.padding)

    def forward(self, shared_part: torch.Tensor, own_NChw: torch.Tensor) -> torch.Tensor:
        weight = self.weight[:, self.shared :] if self.own_weight is None else self.own_weight
        return F.conv2d(own_NChw, weight, None, self.stride, self.padding) + shared_part


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in ResNet-18."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _projection(inputs, planes, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions and a shortcut, as in ResNet-50."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = _projection(inputs, 4 * planes, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The shortcut where a block changes the shape; none where it does not."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def resnet_stage(block: type[BasicBlock | Bottleneck], inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    outputs = planes * block.expansion
    return nn.Sequential(block(inputs, planes, stride), *(block(outputs, planes, 1) for _ in range(blocks - 1)))


class ResidualBlock(nn.Module):
    """Pre-activation, no normalisation; the shortcut, a 3x3 convolution where the width changes, sees the un-activated input."""

    def __init__(self, inputs: int, outputs: int, conv: Callable[[int, int], nn.Conv2d] = conv3x3) -> None:
        super().__init__()
        self.downsample = conv(inputs, outputs) if inputs != outputs else None
        self.conv1 = conv(inputs, outputs)
        self.conv2 = conv(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(self.conv1(F.relu(x)).relu_())
        return y + (x if self.downsample is None else self.downsample(x))


class SharedResidualBlock(nn.Module):
    """A residual block on [image feature, object tensor], with the image's part of its convolutions computed once."""

    def __init__(self, image: int, own: int, outputs: int) -> None:
        super().__init__()
        self.downsample = SharedConv2d(image, own, outputs, 3)
        self.conv1 = SharedConv2d(image, own, outputs, 3)
        self.conv2 = conv3x3(outputs, outputs)

    def shared_part(self, image_1Chw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For an image feature that is not negative (it comes out of a ReLU): the activation would change nothing in it."""
        return self.conv1.shared_part(image_1Chw), self.downsample.shared_part(image_1Chw)

    def forward(self, shared_part: tuple[torch.Tensor, torch.Tensor], own_NChw: torch.Tensor) -> torch.Tensor:
        y = self.conv1(shared_part[0], F.relu(own_NChw)).relu_()
        return self.conv2(y) + self.downsample(shared_part[1], own_NChw)


class ChannelGate(nn.Module):
    """Scales channels by what their mean and maximum over all positions say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 16)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        return x * torch.sigmoid(gate)[:, :, None, None]


class SpatialGate(nn.Module):
    """Scales positions by what the maximum and the mean over their channels say."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 1, 7, padding=3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.spatial(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1))
        return x * torch.sigmoid(gate)


class ChannelSpatialAttention(nn.Module):
    """CBAM: the channel gate, then the spatial gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ChannelGate = ChannelGate(channels)
        self.SpatialGate = SpatialGate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.SpatialGate(self.ChannelGate(x))


class Fusion(nn.Module):
    """Joins one image feature with the objects' tensors: residual block, attention added to its own input, residual block."""

    def __init__(self, image: int, own: int, outputs: int) -> None:
        super().__init__()
        self.block1 = SharedResidualBlock(image, own, outputs)
        self.attention = ChannelSpatialAttention(outputs)
        self.block2 = ResidualBlock(outputs, outputs)

    def forward(self, shared_part: tuple[torch.Tensor, torch.Tensor], own_NChw: torch.Tensor) -> torch.Tensor:
        y = self.block1(shared_part, own_NChw)
        return self.block2(y + self.attention(y))


class GatedUpdate(nn.Module):
    """A new sensory state h from (x, h). Unlike a GRU's, the candidate does not see h gated, and what stays of h passes two gates."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.transform = conv3x3(inputs + hidden, 3 * hidden)

    def forward(self, x_NChw: torch.Tensor, hidden_NChw: torch.Tensor) -> torch.Tensor:
        forget, update, candidate = self.transform(torch.cat([x_NChw, hidden_NChw], 1)).chunk(3, 1)
        forget, update = torch.sigmoid(forget), torch.sigmoid(update)
        return forget * hidden_NChw * (1 - update) + update * torch.tanh(candidate)
