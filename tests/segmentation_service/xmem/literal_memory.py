"""XMem's memory word for word: all columns concatenated anew, dense weights. Slow and plain, to compare ours with."""

import math

import torch


class LiteralMemory:
    """One video; keys (C, N), values of each object group (objects, C_v, N)."""

    def __init__(self, config):
        self.c = config
        self.work = self.long = None  # key, shrinkage, selection, use, life
        self.values, self.long_values = [], []

    def similarity(self, memory_key, shrinkage, key, selection):
        difference = (memory_key[:, :, None] - key[:, None, :]) ** 2
        return -(shrinkage[0][:, None] / math.sqrt(len(key))) * (selection[:, None, :] * difference).sum(0)

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
        if self.long is not None and self.long[0].shape[1] >= c.max_long_term_elements - c.num_prototypes:
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
        size = self.long[0].shape[1]
        target = self.c.max_long_term_elements - self.c.num_prototypes
        if size == target:
            return
        read = (self.long[3] / self.long[4])[0]
        threshold = read.sort().values[size - target - 1]
        keep = [i for i in range(size) if read[i] > threshold]
        self.long = [None if x is None else x[:, keep] for x in self.long]
        for g, values in enumerate(self.long_values):
            if values is not None:
                first = size - values.shape[2]
                self.long_values[g] = values[:, :, [i - first for i in keep if i >= first]]
