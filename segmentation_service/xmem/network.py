"""XMem's networks: an image becomes features and a key, an object's mask a value, and what memory answers a mask again.

Tensors are (N, C, height, width) with N objects of any number of hypotheses: to the networks they are all one batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .blocks import BasicBlock, Bottleneck, Fusion, GatedUpdate, ResidualBlock, SharedConv2d, WideConv2d, conv3x3, resnet_stage, upsample
from .config import XMemDims
from .reading import at_least_float32


@dataclass
class ImageFeatures:
    """What one image gives, for all objects: f16, f8, f4 at those strides, key and selection (C_k channels), shrinkage (one); N = 1."""

    f16: torch.Tensor
    f8: torch.Tensor
    f4: torch.Tensor
    key: torch.Tensor
    shrinkage: torch.Tensor
    selection: torch.Tensor


class KeyEncoder(nn.Module):
    """ResNet-50 without its last stage."""

    def __init__(self, dims: XMemDims) -> None:
        super().__init__()
        a, b, c = dims.key_planes
        self.conv1 = nn.Conv2d(3, a, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.res2 = resnet_stage(Bottleneck, a, a, dims.key_blocks[0], 1)
        self.layer2 = resnet_stage(Bottleneck, 4 * a, b, dims.key_blocks[1], 2)
        self.layer3 = resnet_stage(Bottleneck, 4 * b, c, dims.key_blocks[2], 2)

    def forward(self, image_N3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features at strides 16, 8 and 4, none of them negative."""
        x = self.bn1(self.conv1(image_N3HW)).relu_()
        f4 = self.res2(F.max_pool2d(x, 3, 2, 1))
        f8 = self.layer2(f4)
        return self.layer3(f8), f8, f4


class KeyProjection(nn.Module):
    """Key, shrinkage (at least 1) and selection (between 0 and 1) of every position at stride 16."""

    def __init__(self, inputs: int, key: int) -> None:
        super().__init__()
        self.key_proj = conv3x3(inputs, key)
        self.d_proj = conv3x3(inputs, 1)
        self.e_proj = conv3x3(inputs, key)

    def forward(self, f16: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.key_proj(f16), at_least_float32(self.d_proj(f16)).square() + 1, torch.sigmoid(self.e_proj(f16))


class ValueEncoder(nn.Module):
    """ResNet-18 without its last stage on image, mask and the other objects' masks, fused with f16."""

    def __init__(self, dims: XMemDims) -> None:
        super().__init__()
        a, b, c = dims.value_planes
        self.conv1 = SharedConv2d(3, 2, a, 7, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.layer1 = resnet_stage(BasicBlock, a, a, dims.value_blocks[0], 1)
        self.layer2 = resnet_stage(BasicBlock, a, b, dims.value_blocks[1], 2)
        self.layer3 = resnet_stage(BasicBlock, b, c, dims.value_blocks[2], 2)
        self.fuser = Fusion(4 * dims.key_planes[2], c, dims.value)
        if dims.hidden:
            self.hidden_reinforce = GatedUpdate(dims.value, dims.hidden)

    def shared_parts(self, image_13HW: torch.Tensor, f16: torch.Tensor) -> tuple:
        """What does not depend on the objects, computed once a frame."""
        return self.conv1.shared_part(image_13HW), self.fuser.block1.shared_part(f16)

    def forward(self, shared_parts: tuple, masks_N2HW: torch.Tensor, hidden_NChw: torch.Tensor, deep: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (N, C_v, h, w), and the sensory memory after a deep update if one is asked for. Masks: own, others."""
        stem, fuser = shared_parts
        x = F.max_pool2d(self.bn1(self.conv1(stem, masks_N2HW)), 3, 2, 1).relu_()
        value = self.fuser(fuser, self.layer3(self.layer2(self.layer1(x))))
        if deep and hidden_NChw.shape[1]:
            hidden_NChw = self.hidden_reinforce(value, hidden_NChw)
        return value, hidden_NChw


class SkipUpsample(nn.Module):
    """One step up the decoder: the coarse map doubled, plus the image feature of the finer scale."""

    def __init__(self, skip: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip_conv = WideConv2d(skip, inputs)
        self.out_conv = ResidualBlock(inputs, outputs, WideConv2d)

    def forward(self, skip_1Chw: torch.Tensor, coarse_NChw: torch.Tensor) -> torch.Tensor:
        """skip: the image feature after `skip_conv`, which all objects share."""
        return self.out_conv(upsample(coarse_NChw, 2) + skip_1Chw)


class LightUpdate(GatedUpdate):
    """Updates the sensory memory from the decoder's three scales and its logits."""

    def __init__(self, dims: XMemDims) -> None:
        super().__init__(dims.update, dims.hidden)
        self.g16_conv = nn.Conv2d(dims.decoder[0], dims.update, 1)
        self.g8_conv = nn.Conv2d(dims.decoder[1], dims.update, 1)
        self.g4_conv = nn.Conv2d(dims.decoder[2] + 1, dims.update, 1)

    def forward(self, g16: torch.Tensor, g8: torch.Tensor, g4: torch.Tensor, logits: torch.Tensor, hidden_NChw: torch.Tensor) -> torch.Tensor:
        fine = torch.cat([F.avg_pool2d(g4, 4), F.avg_pool2d(logits, 4)], 1)
        met = self.g16_conv(g16) + self.g8_conv(F.avg_pool2d(g8, 2)) + self.g4_conv(fine)
        return super().forward(met, hidden_NChw)


class Decoder(nn.Module):
    """From what memory answered, the sensory memory and the image to one mask an object."""

    def __init__(self, dims: XMemDims) -> None:
        super().__init__()
        f4, f8, f16 = (4 * planes for planes in dims.key_planes)
        a, b, c = dims.decoder
        self.fuser = Fusion(f16, dims.value + dims.hidden, a)
        if dims.hidden:
            self.hidden_update = LightUpdate(dims)
        self.up_16_8 = SkipUpsample(f8, a, b)
        self.up_8_4 = SkipUpsample(f4, b, c)
        self.pred = conv3x3(c, 1)

    def shared_parts(self, features: ImageFeatures) -> tuple:
        """What does not depend on the objects, computed once a frame."""
        return self.fuser.block1.shared_part(features.f16), self.up_16_8.skip_conv(features.f8), self.up_8_4.skip_conv(features.f4)

    def forward(self, shared_parts: tuple, readout_NChw: torch.Tensor, hidden_NChw: torch.Tensor, light: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, 1, 4h, 4w), and the sensory memory after a light update if one is asked for."""
        fuser, skip8, skip4 = shared_parts
        g16 = self.fuser(fuser, torch.cat([readout_NChw, hidden_NChw], 1))
        g8 = self.up_16_8(skip8, g16)
        g4 = self.up_8_4(skip4, g8)
        logits = self.pred(F.relu(g4))
        if light and hidden_NChw.shape[1]:
            hidden_NChw = self.hidden_update(g16, g8, g4, logits, hidden_NChw)
        return at_least_float32(logits), hidden_NChw


class XMem(nn.Module):
    """The four networks. Keys and shapes of its state dict are those of the published checkpoints, at the default dimensions."""

    def __init__(self, dims: XMemDims | None = None) -> None:
        super().__init__()
        self.dims = dims or XMemDims()
        self.folded = False
        self.key_encoder = KeyEncoder(self.dims)
        self.value_encoder = ValueEncoder(self.dims)
        self.key_proj = KeyProjection(4 * self.dims.key_planes[2], self.dims.key)
        self.decoder = Decoder(self.dims)

    def encode_image(self, image_N3HW: torch.Tensor) -> ImageFeatures:
        """image: normalised RGB, sides multiples of 16. Independent of all objects."""
        f16, f8, f4 = self.key_encoder(image_N3HW)
        return ImageFeatures(f16, f8, f4, *self.key_proj(f16))

    @torch.no_grad()
    def for_inference(self) -> XMem:
        """A network of the same answers, for trackers: batch norms folded into convolutions, the parts of shared ones taken apart.

        All other weights are shared with this network, which stays as it is. Of such a network it is the network itself.
        """
        if self.folded:
            return self
        network = copy.deepcopy(self, {id(tensor): tensor for tensor in chain(self.parameters(), self.buffers())}).eval()
        for module in list(network.modules()):
            for bn_name, bn in list(module.named_children()):
                if isinstance(bn, nn.BatchNorm2d):
                    conv_name = "0" if isinstance(module, nn.Sequential) else bn_name.replace("bn", "conv")
                    setattr(module, conv_name, fuse_conv_bn_eval(getattr(module, conv_name), bn))
                    setattr(module, bn_name, nn.Identity())
        for module in network.modules():
            if isinstance(module, SharedConv2d):
                module.split()
        network.folded = True
        return network
