"""Run-length encoding, tight boxes, inner points and IoU of masks."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from segmentation_service import masks

any_mask = hnp.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@settings(max_examples=100, deadline=None)
@given(any_mask)
def test_rle_round_trip_through_json(mask):
    rle = json.loads(json.dumps(masks.encode_rle(mask)))
    assert rle["size"] == list(mask.shape)
    decoded, by_columns = masks.decode_rle(rle), masks.decode_rle(rle, order="F")
    assert (decoded == by_columns).all() and decoded.flags.c_contiguous and by_columns.flags.f_contiguous
    assert decoded.dtype == bool and decoded.flags.c_contiguous
    assert (decoded == mask).all()
    assert int(coco.area({"size": rle["size"], "counts": rle["counts"].encode()})) == mask.sum()


def test_long_runs_and_uncompressed_counts():
    mask = np.zeros((1500, 1400), bool)
    mask[700:, 3:1200] = True
    mask[10, 10] = True
    assert (masks.decode_rle(masks.encode_rle(mask)) == mask).all()
    plain = {"size": [2, 3], "counts": [1, 2, 3]}
    assert masks.decode_rle(plain).tolist() == [[False, True, False], [True, False, False]]
    assert not masks.decode_rle({"size": [2, 3], "counts": [6]}).any()
    assert masks.decode_rle({"size": [2, 3], "counts": [0, 6]}).all()


@pytest.mark.parametrize(
    "rle, message",
    [
        ({"size": [4, 4]}, "counts"),
        ({"size": [4, 4], "counts": [3, 4]}, "add up to 7 pixels.*4x4 needs 16"),
        ({"size": [4, 4], "counts": ""}, "add up to 0"),
        ({"size": [0, 4], "counts": []}, "positive size"),
        ({"size": [4, 4], "counts": "\x01"}, "cannot stand"),
        ({"size": [4, 4], "counts": "P"}, "break off"),
        ({"size": [4, 4], "counts": 5}, "int"),
        ({"size": [4, 4], "counts": [20, -4]}, "add up"),
        (None, "run-length mask"),
    ],
)
def test_broken_rle_is_an_error_and_not_memory_contents(rle, message):
    with pytest.raises(ValueError, match=message):
        masks.decode_rle(rle)


@settings(max_examples=100, deadline=None)
@given(any_mask)
def test_tight_box_and_inner_point(mask):
    box, point = masks.mask_to_box(mask), masks.mask_to_point(mask)
    if not mask.any():
        assert box is None and point is None
        return
    x1, y1, x2, y2 = box
    inside = np.zeros_like(mask)
    inside[y1 : y2 + 1, x1 : x2 + 1] = True
    assert not (mask & ~inside).any()
    assert mask[:, x1].any() and mask[:, x2].any() and mask[y1].any() and mask[y2].any()
    assert mask[point[1], point[0]]


def test_point_is_the_deepest_pixel():
    mask = np.zeros((20, 30), bool)
    mask[2:9, 3:10] = True
    mask[5, 10:28] = True  # a thin tail, which drags the centroid and the box's centre outside the square
    assert masks.mask_to_point(mask) == [6, 5]
    # The frame's border counts as outside: the deepest pixel of a full frame is its middle.
    assert masks.mask_to_point(np.ones((9, 9), bool)) == [4, 4]


def test_iou():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert masks.mask_iou(a, b) == 1.0
    a[:2] = True
    assert masks.mask_iou(a, b) == 0.0
    b[1:3] = True
    assert masks.mask_iou(a, b) == pytest.approx(1 / 3)
    assert masks.mask_iou(a.astype(np.uint8) * 255, a) == 1.0
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(4, 5\)"):
        masks.mask_iou(a, np.zeros((4, 5)))
    with pytest.raises(ValueError, match="two-dimensional"):
        masks.mask_to_box(np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match="one row"):
        masks.encode_rle(np.zeros((0, 4)))


def test_leaves_do_not_import_torch():
    code = "import sys, segmentation_service.geometry, segmentation_service.masks; print(sorted({'torch', 'transformers', 'ray', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
