"""XMem as its description reads, for one hypothesis: the measure of what our implementation gains, and a second opinion in tests.

No batch norm is folded, no part shared between objects, memory concatenated anew on every frame, and attention weights dense.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class PlainNetwork:
    """The networks as functions of a state dict."""

    def __init__(self, weights):
        self.w = weights

    def conv(self, name, x, stride=1):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), stride, weight.shape[2] // 2)

    def norm(self, name, x):
        w = self.w
        return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def resnet_block(self, name, x, stride):
        last = 3 if f"{name}.conv3.weight" in self.w else 2
        strided = 2 if last == 3 else 1
        y = x
        for i in range(1, last + 1):
            y = self.norm(f"{name}.bn{i}", self.conv(f"{name}.conv{i}", y, stride if i == strided else 1))
            if i < last:
                y = F.relu(y)
        if f"{name}.downsample.0.weight" in self.w:
            x = self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride))
        return F.relu(y + x)

    def stage(self, name, x, stride):
        i = 0
        while f"{name}.{i}.conv1.weight" in self.w:
            x = self.resnet_block(f"{name}.{i}", x, stride if i == 0 else 1)
            i += 1
        return x

    def residual(self, name, x):
        y = self.conv(f"{name}.conv2", F.relu(self.conv(f"{name}.conv1", F.relu(x))))
        return y + (self.conv(f"{name}.downsample", x) if f"{name}.downsample.weight" in self.w else x)

    def attention(self, name, x):
        def mlp(v):
            v = F.relu(F.linear(v, self.w[f"{name}.ChannelGate.mlp.1.weight"], self.w[f"{name}.ChannelGate.mlp.1.bias"]))
            return F.linear(v, self.w[f"{name}.ChannelGate.mlp.3.weight"], self.w[f"{name}.ChannelGate.mlp.3.bias"])

        x = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[:, :, None, None]
        both = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(f"{name}.SpatialGate.spatial.conv", both))

    def fuse(self, name, image, objects):
        y = self.residual(f"{name}.block1", torch.cat([image.expand(len(objects), -1, -1, -1), objects], 1))
        return self.residual(f"{name}.block2", y + self.attention(f"{name}.attention", y))

    def gated(self, name, x, h):
        f, u, n = self.conv(f"{name}.transform", torch.cat([x, h], 1)).chunk(3, 1)
        return torch.sigmoid(f) * h * (1 - torch.sigmoid(u)) + torch.sigmoid(u) * torch.tanh(n)

    def encode_image(self, image):
        x = F.max_pool2d(F.relu(self.norm("key_encoder.bn1", self.conv("key_encoder.conv1", image, 2))), 3, 2, 1)
        f4 = self.stage("key_encoder.res2", x, 1)
        f8 = self.stage("key_encoder.layer2", f4, 2)
        f16 = self.stage("key_encoder.layer3", f8, 2)
        key, shrinkage = self.conv("key_proj.key_proj", f16), self.conv("key_proj.d_proj", f16) ** 2 + 1
        return f16, f8, f4, key, shrinkage, torch.sigmoid(self.conv("key_proj.e_proj", f16))

    def encode_value(self, image, f16, h, masks, deep):
        others = torch.stack([sum((m for j, m in enumerate(masks) if j != o), torch.zeros_like(masks[0])) for o in range(len(masks))])
        x = torch.cat([image.expand(len(masks), -1, -1, -1), masks[:, None], others[:, None]], 1)
        x = F.relu(F.max_pool2d(self.norm("value_encoder.bn1", self.conv("value_encoder.conv1", x, 2)), 3, 2, 1))
        for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
            x = self.stage(f"value_encoder.{stage}", x, stride)
        value = self.fuse("value_encoder.fuser", f16, x)
        return value, self.gated("value_encoder.hidden_reinforce", value, h) if deep and h.shape[1] else h

    def decode(self, f16, f8, f4, readout, h, light):
        g16 = self.fuse("decoder.fuser", f16, torch.cat([readout, h], 1))
        up = [g16]
        for name, skip in (("decoder.up_16_8", f8), ("decoder.up_8_4", f4)):
            coarse = F.interpolate(up[-1], scale_factor=2, mode="bilinear", align_corners=False)
            up.append(self.residual(f"{name}.out_conv", self.conv(f"{name}.skip_conv", skip) + coarse))
        _, g8, g4 = up
        logits = self.conv("decoder.pred", F.relu(g4))
        if light and h.shape[1]:
            name = "decoder.hidden_update"
            x = self.conv(f"{name}.g16_conv", g16) + self.conv(f"{name}.g8_conv", F.interpolate(g8, scale_factor=1 / 2, mode="area"))
            x = x + self.conv(f"{name}.g4_conv", F.interpolate(torch.cat([g4, logits], 1), scale_factor=1 / 4, mode="area"))
            h = self.gated(name, x, h)
        return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)[:, 0], h


class PlainMemory:
    """Keys (C, N) of one video, and values (objects, C_v, N) of each object group, aligned to the end of the keys."""

    def __init__(self, config):
        self.c = config
        self.work = self.long = None  # key, shrinkage, selection, use, life
        self.values, self.long_values = [], []

    def similarity(self, memory_key, shrinkage, key, selection):
        square = memory_key.square().T @ selection - 2 * memory_key.T @ (selection * key) + (selection * key.square()).sum(0, keepdim=True)
        return -square * shrinkage.T / math.sqrt(len(key))

    def write(self, key, shrinkage, selection, values):
        n = key.shape[1]
        columns = [key, shrinkage, selection, key.new_zeros(1, n), key.new_full((1, n), 1e-7)]
        self.work = columns if self.work is None else [torch.cat(pair, 1) for pair in zip(self.work, columns)]
        done = 0
        for g, group in enumerate(self.values):
            self.values[g] = torch.cat([group, values[done : done + len(group)]], 2)
            done += len(group)
        if done < len(values):
            self.values.append(values[done:])
            self.long_values.append(None)
        if self.c.enable_long_term and self.work[0].shape[1] >= self.c.max_mid_term_frames * n:
            self.consolidate(n)

    def read(self, key, selection):
        working = self.work[0].shape[1]
        long = 0 if self.long is None else self.long[0].shape[1]
        memory_key, shrinkage = (self.work[i] if not long else torch.cat([self.long[i], self.work[i]], 1) for i in (0, 1))
        scores = self.similarity(memory_key, shrinkage, key, selection)
        readouts = []
        for g, values in enumerate(self.values):
            own = scores[long + working - values.shape[2] :]
            if long and self.long_values[g] is not None:
                count = self.long_values[g].shape[2]
                own = torch.cat([scores[long - count : long], own])
                values = torch.cat([self.long_values[g], values], 2)
            best = own.topk(min(self.c.top_k, len(own)), dim=0)
            weights = torch.zeros_like(own).scatter(0, best.indices, best.values.softmax(0))
            readouts.append(values @ weights)
            if g == 0 and self.c.enable_long_term:
                usage = weights.sum(1)
                self.work[3] += usage[long:]
                self.work[4] += 1
                if long and self.c.enable_long_term_count_usage:
                    self.long[3] += usage[:long]
                    self.long[4] += 1
        return torch.cat(readouts)

    def consolidate(self, frame):
        c = self.c
        if self.long is not None and self.long[0].shape[1] > c.max_long_term_elements - c.num_prototypes:
            self.evict()
        total, a = self.work[0].shape[1], c.min_mid_term_frames * frame
        n = total - a
        key, shrinkage, selection, use, life = (x[:, frame : frame + n] for x in self.work)
        order = sorted(range(n), key=lambda i: -(use / life)[0, i].item())[: c.num_prototypes]
        scores = self.similarity(key, shrinkage, key[:, order], selection[:, order])
        for g, values in enumerate(self.values):
            size = values.shape[2]
            new = None
            if size == total:
                new = values[:, :, frame : size - a + frame] @ scores.softmax(0)
            elif size > a + frame:
                mine = size - a
                qualified = [p for p, i in enumerate(order) if i >= n - mine]
                if qualified:
                    new = values[:, :, frame : size - a + frame] @ scores[n - mine :, qualified].softmax(0)
            if new is not None:
                self.long_values[g] = new if self.long_values[g] is None else torch.cat([self.long_values[g], new], 2)
            if size >= a + frame:
                self.values[g] = torch.cat([values[:, :, :frame], values[:, :, size - a + frame :]], 2)
        p = len(order)
        prototypes = [key[:, order], shrinkage @ scores.softmax(0), None, key.new_zeros(1, p), key.new_full((1, p), 1e-7)]
        self.long = prototypes if self.long is None else [None if x is None else torch.cat([x, y], 1) for x, y in zip(self.long, prototypes)]
        self.work = [torch.cat([x[:, :frame], x[:, frame + n :]], 1) for x in self.work]

    def evict(self):
        size, target = self.long[0].shape[1], self.c.max_long_term_elements - self.c.num_prototypes
        read = (self.long[3] / self.long[4])[0]
        threshold = read.sort().values[size - target - 1]
        keep = [i for i in range(size) if read[i] > threshold]
        self.long = [None if x is None else x[:, keep] for x in self.long]
        for g, values in enumerate(self.long_values):
            if values is not None:
                first = size - values.shape[2]
                self.long_values[g] = values[:, :, [i - first for i in keep if i >= first]]


class PlainXMem:
    """`XMemTracker` for one hypothesis, from a state dict and an `XMemConfig`."""

    def __init__(self, weights, config):
        self.network, self.c = PlainNetwork(weights), config
        self.memory = PlainMemory(config)
        update = weights.get("decoder.hidden_update.transform.weight")
        self.hidden_channels = 0 if update is None else len(update) // 3
        self.t, self.last_memory, self.last_deep, self.h = -1, 0, -max(0, config.deep_update_every), None

    @staticmethod
    def aggregate(probs):
        p = torch.cat([(1 - probs).prod(0, keepdim=True), probs]).clamp(1e-7, 1 - 1e-7)
        return torch.log(p / (1 - p)).softmax(0)

    @torch.no_grad()
    def step(self, image, mask=None, labels=None, end=False):
        self.t += 1
        c, t, (height, width) = self.c, self.t, image.shape[1:]
        dy, dx = -height % 16, -width % 16
        margins = (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2)
        image = F.pad(image, margins)[None]
        is_memory = (t - self.last_memory >= c.mem_every or mask is not None) and not end
        segment = t > 0 and (labels is None or len(labels) != len(mask))
        deep = not end and (is_memory if c.deep_update_every < 0 else t - self.last_deep >= c.deep_update_every)
        light = not end and (c.deep_update_every >= 0 or not deep)
        f16, f8, f4, key, shrinkage, selection = self.network.encode_image(image)
        prob = None
        if segment:
            readout = self.memory.read(key[0].flatten(1), selection[0].flatten(1)).unflatten(2, key.shape[2:])
            logits, self.h = self.network.decode(f16, f8, f4, readout, self.h, light)
            prob = self.aggregate(torch.sigmoid(logits))
        if mask is not None:
            mask = F.pad(mask, margins)
            if segment and labels is not None:
                inside = mask.sum(0) > 0.5
                mask = torch.stack([m if o + 1 in labels or o >= len(prob) - 1 else prob[o + 1] * ~inside for o, m in enumerate(mask)])
            prob = self.aggregate(mask)
            known = 0 if self.h is None else len(self.h)
            zeros = key.new_zeros(len(mask) - known, self.hidden_channels, *key.shape[2:])
            self.h = zeros if self.h is None else torch.cat([self.h, zeros])
        if is_memory:
            value, self.h = self.network.encode_value(image, f16, self.h, prob[1:], deep)
            self.memory.write(key[0].flatten(1), shrinkage[0].flatten(1), selection[0].flatten(1), value.flatten(2))
            self.last_memory = t
            if deep:
                self.last_deep = t
        left, _, top, _ = margins
        return prob[:, top : top + height, left : left + width]
