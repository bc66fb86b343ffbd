"""Many hypotheses on one frame: equal to one at a time, decoded once, at the frame's own size, and never disturbed by a bad one."""

import math

import numpy as np
import pytest
import torch

from segmentation_service.device import resolve_device
from segmentation_service.masks import decode_rle
from segmentation_service.sam2_decoding import prompt_points
from segmentation_service.sam2_transformers import TransformersSam2
from segmentation_service.segmenter import ObjectPrompt, Segmenter

pytestmark = pytest.mark.usefixtures("one_thread")

BOX = ObjectPrompt((28, 18, 71, 46))
BOX_POINT = ObjectPrompt((28, 18, 71, 46), ((50, 30),), (1,))
BOX_BOTH = ObjectPrompt((10, 5, 40, 50), ((30, 30), (5, 5)), (1, 0))
POINT = ObjectPrompt(None, ((80, 50),), (1,))
HYPOTHESES = [[BOX, POINT], [], [BOX_POINT], [BOX, BOX_BOTH, ObjectPrompt((0, 0, 20, 20))]]


@pytest.fixture(scope="module")
def segmenter(tiny_sam2):
    return Segmenter(str(tiny_sam2), device="cpu")


@pytest.fixture
def fresh(segmenter):
    """The same weights with counters at zero."""
    return Segmenter("", segmenter.backend)


def nearly_equal(a, b):
    # Sums of another batch size round differently: a logit within 1e-5 of the threshold may flip.
    return a.shape == b.shape and np.mean(a != b) < 2e-3


def test_batch_equals_one_by_one(fresh, frame):
    together = fresh.segment_frame(frame, HYPOTHESES)
    assert [m.shape for m in together] == [(2, 60, 100), (0, 60, 100), (1, 60, 100), (3, 60, 100)]
    for hypothesis, masks in zip(HYPOTHESES, together):
        assert masks.dtype == bool
        for prompt, mask in zip(hypothesis, masks):
            (alone,) = fresh.segment_frame(frame, [[prompt]])
            assert nearly_equal(alone[0], mask)
    every = np.concatenate(together)
    assert 0.02 < every.mean() < 0.98, "the random model should draw something"
    assert len({mask.tobytes() for mask in every}) == 5, "different prompts should give different masks"


def test_equal_prompts_are_decoded_once_and_the_frame_encoded_once(fresh, frame):
    lists = ObjectPrompt([28, 18, 71, 46])
    masks = fresh.segment_frame(frame, [[BOX], [lists, BOX], [BOX_POINT]] * 2)
    assert all((m == masks[0][0]).all() for group in (masks[0], masks[1], masks[3], masks[4]) for m in group)
    stats = fresh.stats()
    assert stats["image_encodings"] == 1 and stats["prompts"] == 8
    assert (stats["decoded"], stats["deduplicated"], stats["empty"]) == (2, 6, 0)
    assert stats["encode_seconds"] > 0 and stats["decode_seconds"] > 0


def test_masks_of_equal_prompts_do_not_share_memory(fresh, frame):
    first, second = fresh.segment_frame(frame, [[BOX], [BOX]])
    before = second.copy()
    first[:] = ~first
    assert (second == before).all()


def test_prompts_with_nothing_in_the_frame_get_empty_masks_and_disturb_nobody(fresh, frame):
    broken = [ObjectPrompt((200, 0, 220, 10)), ObjectPrompt((math.nan, 0, 5, 5)), ObjectPrompt((9, 9, 3, 3)), ObjectPrompt(None)]
    masks = fresh.segment_frame(frame, [broken, [BOX, *broken, POINT]])
    assert not masks[0].any() and not masks[1][1:5].any()
    (alone,) = fresh.segment_frame(frame, [[BOX, POINT]])
    assert (masks[1][0] == alone[0]).all() and (masks[1][5] == alone[1]).all()


def test_nothing_to_decode_needs_no_image_encoding(fresh, frame):
    assert fresh.segment_frame(frame, []) == []
    assert [m.shape for m in fresh.segment_frame(frame, [[], [ObjectPrompt(None)]])] == [(0, 60, 100), (1, 60, 100)]
    assert fresh.stats()["image_encodings"] == 0


def test_degenerate_boxes_are_decoded_where_they_cover_a_pixel(fresh, frame):
    masks = fresh.segment_frame(frame, [[ObjectPrompt((50, 30, 50, 30)), ObjectPrompt((99, 59, 300, 300)), ObjectPrompt((-9, -9, 0, 0))]])
    assert masks[0].shape == (3, 60, 100) and fresh.stats()["decoded"] == 3


def test_small_batches_give_the_same_masks(segmenter, frame):
    prompts = [[ObjectPrompt((i, 2 * i, 40 + i, 30 + i)) for i in range(7)]]
    backend = TransformersSam2(segmenter.backend.model, segmenter.backend.image_processor, max_prompts_per_batch=3)
    assert nearly_equal(Segmenter("", backend).segment_frame(frame, prompts)[0], segmenter.segment_frame(frame, prompts)[0])


@pytest.mark.parametrize("hw", [(60, 100), (100, 60), (37, 131), (64, 64), (3, 5), (1, 1)])
def test_equals_the_processor_and_model_of_transformers(segmenter, hw):
    """An independent path: transformers' own processor scales the prompts and resizes the masks."""
    from transformers import Sam2Processor

    model, processor = segmenter.backend.model, Sam2Processor(image_processor=segmenter.backend.image_processor, target_size=64)
    frame_HW3 = np.random.default_rng(0).integers(0, 256, (*hw, 3), dtype=np.uint8)
    height, width = hw
    box = [width // 4, height // 4, width - 1, height - 1]
    point = [width // 2, height // 2]
    inputs = processor(
        images=frame_HW3, input_boxes=[[box]], input_points=[[[point]]], input_labels=[[[1]]], input_data_format="channels_last", return_tensors="pt"
    )
    with torch.inference_mode():
        output = model(**{k: v for k, v in inputs.items() if k != "original_sizes"}, multimask_output=False)
    expected = processor.post_process_masks(output.pred_masks, inputs["original_sizes"])[0][0, 0].numpy()
    ((mask,),) = segmenter.segment_frame(frame_HW3, [[ObjectPrompt(tuple(box), (tuple(point),), (1,))]])
    assert nearly_equal(mask, expected)


def test_segment_group_returns_rles_of_the_same_masks(fresh, frame):
    hypotheses = [*HYPOTHESES, [ObjectPrompt(None)]]
    masks = fresh.segment_frame(frame, hypotheses)
    rles = fresh.segment_group(frame, hypotheses)
    assert [len(group) for group in rles] == [2, 0, 1, 3, 1]
    for group, masks_NHW in zip(rles, masks):
        for rle, mask in zip(group, masks_NHW):
            assert rle["size"] == [60, 100] and (decode_rle(rle) == mask).all()


def test_frames_out_of_the_object_store_are_read_only(fresh, frame, recwarn):
    locked = frame.copy()
    locked.flags.writeable = False
    (a,), (b,) = fresh.segment_frame(locked, [[BOX]]), fresh.segment_frame(frame, [[BOX]])
    assert (a == b).all() and not [w for w in recwarn if "writ" in str(w.message)]


def test_same_group_twice_is_bit_equal(fresh, frame):
    for a, b in zip(fresh.segment_frame(frame, HYPOTHESES), fresh.segment_frame(frame, HYPOTHESES)):
        assert (a == b).all()


def test_bfloat16_keeps_coordinates_in_float32(tiny_sam2, frame, segmenter):
    low = Segmenter(str(tiny_sam2), device="cpu", dtype="bfloat16")
    assert low.backend.model.prompt_encoder.shared_embedding.positional_embedding.dtype == torch.float32
    assert low.backend.model.mask_decoder.conv_s0.weight.dtype == torch.bfloat16
    (a,), (b,) = low.segment_frame(frame, [[BOX, POINT]]), segmenter.segment_frame(frame, [[BOX, POINT]])
    assert np.mean(a != b) < 0.1


def test_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == ("cpu", "float32")
    assert resolve_device("cpu", "bfloat16") == ("cpu", "bfloat16")
    with pytest.raises(ValueError, match="segmentation.device is cuda.*auto or cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device() == ("cuda", "bfloat16")
    assert resolve_device("cpu") == ("cpu", "float32")


def test_boxes_are_two_labelled_points():
    points, labels = prompt_points([BOX_BOTH])
    assert points.tolist() == [[[10, 5], [40, 50], [30, 30], [5, 5]]] and labels.tolist() == [[2, 3, 1, 0]]


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.zeros((60, 100, 3), np.float32), "float32"),
        (np.zeros((60, 100), np.uint8), r"\(60, 100\)"),
        (np.zeros((60, 100, 4), np.uint8), r"\(60, 100, 4\)"),
        (np.zeros((0, 100, 3), np.uint8), r"\(0, 100, 3\)"),
        ("frame.jpg", "str"),
    ],
)
def test_bad_frames_are_named(fresh, bad, message):
    with pytest.raises(ValueError, match=message):
        fresh.segment_frame(bad, [[BOX]])


def test_prompts_of_another_type_are_refused(fresh, frame):
    with pytest.raises(TypeError, match="list.*28, 18"):
        fresh.segment_frame(frame, [[[28, 18, 71, 46]]])
    with pytest.raises(ValueError, match="segmentation.backend must be one of transformers, sam2; got 'sam'"):
        Segmenter("x", backend="sam")
