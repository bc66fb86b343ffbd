"""The committed toy SAM2 segments toy shapes that it never saw."""

from pathlib import Path

import numpy as np
import pytest

from segmentation_service.segmenter import ObjectPrompt, Segmenter

TOY = Path(__file__).resolve().parents[2] / "examples/toy/models/sam2"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter(str(TOY), device="cpu")


def test_held_out_iou(segmenter):
    from examples.toy.train_sam2 import evaluate, held_out

    iou = evaluate(segmenter, held_out(25))
    assert iou["box_point"] >= 0.85 and iou["box_point_negative"] >= 0.85 and iou["box"] >= 0.8, iou


@pytest.mark.parametrize("hw", [(64, 160), (160, 64), (96, 128)])
def test_masks_lie_where_the_object_is_on_frames_of_any_shape(segmenter, hw):
    height, width = hw
    y, x = np.mgrid[0:height, 0:width]
    # Of the size, relative to the frame, that the toy world has; a mirrored or transposed coordinate would miss it.
    truth = ((x - 0.3 * width) / (0.13 * width)) ** 2 + ((y - 0.65 * height) / (0.17 * height)) ** 2 <= 1
    frame = np.full((height, width, 3), 55, np.uint8)
    frame[truth] = (225, 45, 45)
    frame[int(0.1 * height) : int(0.4 * height), int(0.6 * width) : int(0.85 * width)] = (60, 95, 235)
    box = (round(0.17 * width), round(0.48 * height), round(0.43 * width), round(0.82 * height))
    ((mask,),) = segmenter.segment_frame(frame, [[ObjectPrompt(box, ((round(0.3 * width), round(0.65 * height)),), (1,))]])
    assert mask.shape == hw
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8


def test_size_on_disk():
    assert sum(f.stat().st_size for f in TOY.iterdir()) < 4e6
