"""The small examples, run as their docstrings say."""

import subprocess
import sys

import numpy as np
from PIL import Image

from reward_service.measures import jaccard
from rollout.toy_world import make_video
from segmentation_service.video_writer import write_video
from tests.conftest import ROOT


def run(module, *arguments):
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_score_completions():
    header, *rows = run("examples.rewards.score_completions").splitlines()
    totals = {row[:16].strip(): float(row[16:24]) for row in rows}
    assert header.split()[0] == "total" and "negative_point" in header
    assert totals == {"right": 8.0, "box too large": 6.0, "another object": 4.0, "no answer": 1.0}


def test_own_term():
    header, *rows = run("examples.rewards.own_term").splitlines()
    assert header.split() == ["without", "with", "right_count"]
    found = {row[:16].strip(): [float(x) for x in row[16:].split()] for row in rows}
    assert found == {"right": [8.0, 8.5, 1.0], "box too large": [6.0, 6.5, 1.0], "another object": [4.0, 4.5, 1.0], "no answer": [1.0, 1.25, 0.5]}


def test_propagate_mask(tmp_path):
    video, t = make_video(502), 5
    write_video(tmp_path / "clip.mp4", map(video.frame, range(video.num_frames)), 10)
    (mask_HW,) = video.masks(t)
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    printed = run("examples.propagate_mask", tmp_path / "clip.mp4", "--frame", t, "--box", columns[0], rows[0], columns[-1], rows[-1], "--out", tmp_path / "masks")
    assert printed.strip() == f"{tmp_path / 'masks'}: {video.num_frames} masks"
    found = [np.asarray(Image.open(tmp_path / f"masks/{i:05d}.png")) for i in range(video.num_frames)]
    ious = [jaccard(m == 1, video.masks(i)[0]) for i, m in enumerate(found)]
    assert ious[t] > 0.95 and np.mean(ious) > 0.7
