"""What the tests of propagation share: a short video with three objects, one that counts how it is read, and all masks of a run."""

import sys
import weakref
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent / "xmem"))  # tiny_xmem.py, xmem_recipe.py

import xmem_recipe as recipe

FRAMES, HEIGHT, WIDTH, TARGET = 10, 44, 60, 4


def make_clip():
    """Frames uint8 (T, H, W, 3), and labels (T, H, W) of three objects."""
    return recipe.video(FRAMES, HEIGHT, WIDTH, 3, 9)


def objects_of(clip, frame=TARGET):
    """True masks (3, H, W) on one frame."""
    return clip[1][frame] == np.arange(1, 4)[:, None, None]


class CountingVideo:
    """Notes which frames were read, and how many of them were alive at a time."""

    def __init__(self, frames):
        self.frames, self.read, self.alive, self.most_alive = frames, [], 0, 0

    def __len__(self):
        return len(self.frames)

    def frame(self, i):
        frame_HW3 = self.frames[i].copy()
        self.read.append(i)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(frame_HW3, self._freed)
        return frame_HW3

    def _freed(self):
        self.alive -= 1


def collect(propagator, video, hypotheses, frames=None, target=TARGET, progress=None):
    """hypothesis -> {frame: masks}; each pair must come once."""
    found = [{} for _ in hypotheses]
    for frame, g, masks_NHW in propagator.propagate(video, target, hypotheses, frames, progress):
        assert frame not in found[g] and masks_NHW.dtype == bool and masks_NHW.shape == (len(hypotheses[g]), HEIGHT, WIDTH)
        found[g][frame] = masks_NHW
    return found


def nearly_equal(a, b):
    # Objects add up in another order in another hypothesis, which can decide a tie.
    return a.shape == b.shape and np.mean(a != b) < 1e-3


def all_nearly_equal(a, b):
    return a.keys() == b.keys() and all(nearly_equal(a[t], b[t]) for t in a)
