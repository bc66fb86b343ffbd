"""Masks drawn over a frame: where the colours are, and that they tell objects apart."""

import numpy as np
import pytest
from PIL import Image

from segmentation_service.masks import encode_rle
from segmentation_service.overlay import draw_overlay, draw_points, save_overlay
from segmentation_service.service_request import Rle


@pytest.fixture
def mask():
    mask = np.zeros((60, 100), dtype=bool)
    mask[20:40, 30:60] = True
    return mask


@pytest.mark.parametrize("grey", [0, 127, 255])
def test_only_the_mask_and_its_outline_change_and_stand_out(mask, grey):
    frame = np.full((60, 100, 3), grey, np.uint8)
    drawn = draw_overlay(frame, [mask])
    difference = np.abs(drawn.astype(int) - grey).max(-1)
    assert (difference[mask] > 40).all()
    assert (difference[19, 30:60] > 100).all() or (difference[18, 30:60] > 100).all(), "the outline is seen on any background"
    far = np.ones_like(mask)
    far[18:42, 28:62] = False
    assert not difference[far].any() and (frame == grey).all(), "the rest of the frame, and the frame given, stay as they are"


def test_every_object_has_its_own_colour_and_rles_do_as_well(mask):
    masks = [np.zeros_like(mask) for _ in range(12)]
    for i, stripe in enumerate(masks):
        stripe[5 * i + 1 : 5 * i + 3, 10:90] = True
    frame = np.full((60, 100, 3), 200, np.uint8)
    drawn = draw_overlay(frame, masks)
    colours = np.array([drawn[5 * i + 1, 50] for i in range(12)]).astype(int)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(12, dtype=int)
    assert distances.min() > 25
    rles = [encode_rle(m) for m in masks]
    assert (draw_overlay(frame, rles) == drawn).all() and (draw_overlay(frame, [Rle(**rle) for rle in rles]) == drawn).all()


def test_boxes_are_drawn_where_they_are_even_if_they_leave_the_frame(mask):
    frame = np.full((60, 100, 3), 90, np.uint8)
    empty = np.zeros_like(mask)
    changed = (draw_overlay(frame, [empty, empty], [(10.2, 5, 20, 15), None]) != 90).any(-1)
    assert changed[5, 10:21].all() and changed[15, 10:21].all() and changed[5:16, 10].all() and changed[5:16, 20].all() and not changed[8:13, 13:18].any()
    assert changed[:4].sum() == 0 and changed[17:].sum() == 0
    assert (draw_overlay(frame, [empty], [(-50, -50, 500, 500)]) == 90).all()
    assert (draw_overlay(frame, [empty], [(-50, 20, 500, 500)])[20] != 90).any(-1).all()


def test_points_are_drawn_where_they_are_and_left_out_elsewhere():
    frame = np.full((60, 100, 3), 90, np.uint8)
    drawn = draw_points(frame, [(50, 30), (1e12, 5), (-3, 5)])
    changed = (drawn != 90).any(-1)
    assert (drawn[30, 50] == 255).all() and changed[27:34, 47:54].sum() == changed.sum() > 4 and (frame == 90).all()


def test_saved_as_png_and_nothing_else_left(mask, tmp_path):
    frame = np.full((60, 100, 3), 90, np.uint8)
    path = save_overlay(tmp_path / "overlay.png", frame, [mask], [None])
    assert (np.asarray(Image.open(path)) == draw_overlay(frame, [mask])).all() and [f.name for f in tmp_path.iterdir()] == ["overlay.png"]


def test_what_does_not_match_is_refused(mask):
    frame = np.zeros((60, 100, 3), np.uint8)
    with pytest.raises(ValueError, match=r"mask 0 is \(60, 99\), the frame \(60, 100\)"):
        draw_overlay(frame, [mask[:, :99]])
    with pytest.raises(ValueError, match="1 masks and 2 boxes"):
        draw_overlay(frame, [mask], [None, None])
    with pytest.raises(ValueError, match="RGB uint8"):
        draw_overlay(frame.astype(float), [mask])
