"""Deterministic weights, synthetic videos and scenarios of XMem's test vectors (`vectors/`), the same bits on any machine.

All is integer arithmetic up to the last conversion to float. The vectors hold CRC-32 sums of weights and frames.
"""
import math
import zlib

import numpy as np
import torch

_MASK64 = (1 << 64) - 1

# convolution / linear gain by key prefix, longest match wins; every other >=2-d weight has sqrt(2)
GAINS = {
    'key_proj.key_proj': 0.7, 'key_proj.d_proj': 0.25, 'key_proj.e_proj': 0.5,
    'value_encoder.fuser': 0.8, 'value_encoder.hidden_reinforce': 0.7,
    'decoder': 0.8, 'decoder.hidden_update.g': 0.5, 'decoder.hidden_update.transform': 0.7,
    'decoder.up_16_8.skip': 0.2, 'decoder.up_8_4.skip': 0.2, 'decoder.pred': 4.0,
}


def unit(name, n, seed):
    """n numbers in [-1, 1), multiples of 2**-23: splitmix64 of the element index, keyed by crc32(name) and seed."""
    h = ((zlib.crc32(name.encode()) + (seed << 32)) * 0xBF58476D1CE4E5B9) & _MASK64
    with np.errstate(over='ignore'):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(h)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float64) * 2.0 ** -23 - 1.0


def fill(shapes, seed, gains=GAINS):
    """{key: shape} -> {key: tensor}.  Arithmetic in float64, one cast to float32 at the end."""
    out = {}
    for key, shape in shapes.items():
        shape = tuple(shape)
        leaf = key.rsplit('.', 1)[1]
        if leaf == 'num_batches_tracked':
            out[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        v = unit(key, int(np.prod(shape)), seed).reshape(shape)
        if leaf == 'running_mean' or leaf == 'bias':
            v = 0.1 * v
        elif leaf == 'running_var':
            v = 1.0 + 0.25 * v
        elif len(shape) == 1:                                  # batch-norm weight
            v = 0.75 + 0.25 * v
        else:
            gain = math.sqrt(2.0)
            best = -1
            for prefix, g in gains.items():
                if key.startswith(prefix) and len(prefix) > best:
                    gain, best = g, len(prefix)
            v = v * (gain * math.sqrt(3.0 / float(np.prod(shape[1:]))))
            if key == 'value_encoder.conv1.weight':
                v[:, 3:] *= 16.0                               # mask channels
            if key.endswith(('fuser.block1.conv1.weight', 'fuser.block1.downsample.weight')):
                v[:, :1024] *= 0.2                             # image part
                if key.startswith('decoder.'):
                    dv = shapes['value_encoder.fuser.block2.conv2.weight'][0]
                    v[:, 1024 + dv:] *= 4.0                    # sensory part
        out[key] = torch.from_numpy(v.astype(np.float32))
    return out


def tri(n, p):
    """triangle wave with values 0..p and period 2p (n >= 0, integers)"""
    return np.abs(n % (2 * p) - p)


def noise(a, b, c):
    """8 bit hash of three non-negative integers"""
    z = (a.astype(np.uint64) * np.uint64(0x9E3779B1) + b.astype(np.uint64) * np.uint64(0x85EBCA77)
         + np.uint64(c) * np.uint64(0xC2B2AE3D)) & np.uint64(0xFFFFFFFF)
    z ^= z >> np.uint64(15)
    z = (z * np.uint64(0x2C1B3C6D)) & np.uint64(0xFFFFFFFF)
    z ^= z >> np.uint64(12)
    z = (z * np.uint64(0x297A2D39)) & np.uint64(0xFFFFFFFF)
    z ^= z >> np.uint64(15)
    return (z & np.uint64(255)).astype(np.int64)


def video(frames, height, width, objects, seed):
    """uint8 RGB frames T,H,W,3 and index masks T,H,W (0 = background, 1..objects): textured moving ellipses."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    rgb = np.zeros((frames, height, width, 3), np.uint8)
    idx = np.zeros((frames, height, width), np.uint8)
    for t in range(frames):
        img = np.zeros((height, width, 3), np.int64)
        xb, yb = x + t, y + t // 2 + 1000
        for c in range(3):
            a = tri(3 * xb + (c + 1) * yb + 37 * seed, 50 + 20 * c) * 255 // (50 + 20 * c)
            b = tri((5 - c) * yb - 2 * xb + 100000 + 11 * seed, 40 + 10 * c) * 255 // (40 + 10 * c)
            img[..., c] = (2 * a + 2 * b + noise((xb + 2000) // 4, yb // 4, seed * 16 + c)) // 5
        for k in range(objects):
            ry, rx = max(6, height // (6 + k % 3)), max(6, width // (8 - k % 3))
            cy = ry + int(tri(2 * t + 23 * (k + 1) + 7 * seed, max(1, height - 2 * ry)))
            cx = rx + int(tri(3 * t + 61 * (k + 1) + 5 * seed, max(1, width - 2 * rx)))
            dy, dx = y - cy, x - cx
            inside = dy * dy * rx * rx + dx * dx * ry * ry <= rx * rx * ry * ry
            for c in range(3):
                w = 16 + 4 * c + 2 * k
                p = tri(7 * dx + (3 + 2 * c) * dy + 10000 + k * 50, w) * 120 // w
                q = noise((dx + 4096) // 3, (dy + 4096) // 3, seed * 16 + 8 + c + 100 * k)
                col = np.minimum(p + (k * 85 + c * 97 + 40) % 136 + q // 8, 255)
                img[..., c] = np.where(inside, col, img[..., c])
            idx[t][inside] = k + 1
        rgb[t] = np.clip(img, 0, 255).astype(np.uint8)
    return rgb, idx


MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def to_input(frame):
    """uint8 H,W,3 -> normalised float32 tensor 3,H,W"""
    v = (frame.astype(np.float32) / np.float32(255) - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(v.transpose(2, 0, 1)))


def one_hot(index_mask, total, labels):
    """float32 tensor total,H,W; only the channels in `labels` are filled from the index mask"""
    return torch.from_numpy(np.stack([(index_mask == i) & (i in labels) for i in range(1, total + 1)])
                            .astype(np.float32))


BASE = dict(mem_every=5, deep_update_every=-1, enable_long_term=True, enable_long_term_count_usage=True,
            max_mid_term_frames=10, min_mid_term_frames=5, max_long_term_elements=10000, num_prototypes=128,
            top_k=30)

# name: (config changes, weight seed, video (T,H,W,objects,seed), masks {frame: (total objects, labels given)})
SCENARIOS = {
    'one_object': (dict(), 7, (8, 112, 176, 1, 7), {0: (1, [1])}),
    'late_object': (dict(), 11, (14, 100, 150, 2, 11), {0: (1, [1]), 6: (2, [2])}),
    'long_term': (dict(mem_every=2, min_mid_term_frames=2, max_mid_term_frames=4, num_prototypes=24,
                       max_long_term_elements=80), 25, (40, 96, 144, 2, 25), {0: (2, [1, 2])}),
    'late_object_long_term': (dict(mem_every=1, min_mid_term_frames=2, max_mid_term_frames=5, num_prototypes=20),
                              24, (22, 96, 128, 3, 24), {0: (1, [1]), 1: (2, [2]), 5: (3, [3])}),
    'no_long_term_async_deep': (dict(enable_long_term=False, enable_long_term_count_usage=False, mem_every=3,
                                     deep_update_every=5, top_k=12), 24, (13, 90, 130, 2, 24),
                                {0: (2, [1, 2]), 7: (2, [1])}),
}


def play(make, scenario):
    """Drive an implementation through a scenario.

    make(config) -> object with .step(image, mask, labels) -> probabilities (1+objects),H,W.
    The total number of objects known so far is mask.shape[0].  Yields (frame number, probabilities).
    """
    change, _, vid, masks = SCENARIOS[scenario]
    engine = make({**BASE, **change})
    rgb, idx = video(*vid)
    for t in range(vid[0]):
        mask = labels = None
        if t in masks:
            total, labels = masks[t]
            mask = one_hot(idx[t], total, labels)
        yield t, engine.step(to_input(rgb[t]), mask, labels)
