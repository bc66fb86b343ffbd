"""Masks through a video by SAM2's memory, by both programs: the same contract as XMem's, and memory that does not grow."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from propagating import FRAMES, TARGET, CountingVideo, all_nearly_equal, collect, make_clip, nearly_equal, objects_of
from segmentation_service.checkpoint import CheckpointError
from segmentation_service.config import PropagationConfig
from segmentation_service.masks import decode_rle, encode_rle
from segmentation_service.propagation import Propagator
from segmentation_service.resizing import to_input_masks
from segmentation_service.sam2_transformers import processed
from segmentation_service.segmenter import ObjectPrompt, Segmenter
from segmentation_service.video import FramesInMemory, VideoError
from tiny_sam2 import TINY_SIZE, edit_json, save_tiny_sam2

pytestmark = pytest.mark.usefixtures("one_thread")

POINTERS = 6  # that the tiny model looks back to; it looks at fewer memories


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_sam2(tmp_path_factory.mktemp("video") / "tiny", video=True))


@pytest.fixture(scope="module")
def by_transformers(folder):
    return Propagator.load(PropagationConfig(method="sam2", checkpoint=folder))


@pytest.fixture(scope="module")
def by_meta(by_transformers, tmp_path_factory):
    pytest.importorskip("sam2")
    from meta_sam2 import save_as_meta

    checkpoint, model_config = save_as_meta(by_transformers.method.model, tmp_path_factory.mktemp("meta"))
    return Propagator.load(PropagationConfig(method="sam2", checkpoint=checkpoint, model_config=model_config))


@pytest.fixture(params=["transformers", "meta"])
def propagator(request):
    return request.getfixturevalue(f"by_{request.param}")


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture
def video(clip):
    return CountingVideo(clip[0])


@pytest.fixture(scope="module")
def objects(clip):
    return objects_of(clip)


def with_limit(propagator, max_objects):
    return Propagator(propagator.method, PropagationConfig(method="sam2", max_objects=max_objects))


def test_both_directions_and_everything_drawn(propagator, video, clip, objects):
    (found,) = collect(propagator, video, [objects])
    assert sorted(found) == list(range(FRAMES)) and (found[TARGET] == objects).all()
    others = [masks for t, masks in found.items() if t != TARGET]
    assert all(0.02 < masks.any(0).mean() < 0.98 for masks in others), "the random network should draw something"
    assert not any((masks.sum(0) > 1).any() for masks in others), "objects compete for pixels"
    backwards = collect(propagator, FramesInMemory(clip[0][::-1]), [objects], target=FRAMES - 1 - TARGET)[0]
    assert all((backwards[FRAMES - 1 - t] == masks).all() for t, masks in found.items()), "backwards is forwards through the reversed video"
    assert sorted(video.read) == list(range(FRAMES)) and video.most_alive == 2 and video.alive == 0


def test_grouped_equals_separate(propagator, video, clip, objects):
    one, two, three = objects
    hypotheses = [objects[:1], objects, objects[1:], np.stack([one | two]), objects[[2, 0]], np.stack([one, one | three])]
    together = collect(propagator, video, hypotheses)
    for hypothesis, found in zip(hypotheses, together):
        (alone,) = collect(propagator, FramesInMemory(clip[0]), [hypothesis])
        # Memory is kept in bfloat16: where a sum of another batch size rounds the other way, a pixel can flip some frames on.
        assert all(np.mean(found[t] != alone[t]) < 0.01 for t in found) and all(nearly_equal(found[t], alone[t]) for t in (TARGET - 1, TARGET + 1))
    assert len({masks[TARGET + 2].tobytes() for masks in together}) == len(hypotheses), "the random network should tell objects apart"


def test_an_object_of_several_hypotheses_is_tracked_once(propagator, clip, objects):
    tracker = propagator.method.start(clip[0][TARGET], [objects[:1], objects, objects[1:]])
    assert tracker.members == [[0], [0, 1, 2], [1, 2]]
    first, every, later = tracker.step(clip[0][TARGET + 1])
    assert torch.equal(first[1], every[1]) and torch.equal(later[1:], every[2:]) and not first[0].any()


def test_order_and_repetition_do_not_matter(propagator, video, objects):
    nothing = np.zeros_like(objects[:1])
    rles = [encode_rle(mask) for mask in objects]
    hypotheses = [objects[:2], objects[[1, 0]], [rles[0], rles[1], rles[0]], np.concatenate([nothing, objects[:2]]), nothing, []]
    found = propagator.propagate_rle(video, TARGET, hypotheses)
    empty = encode_rle(nothing[0])
    for t in range(FRAMES):
        a, b = found[0][t]
        assert [f[t] for f in found[1:]] == [[b, a], [a, b, a], [empty, a, b], [empty], []]
        assert a != b and (t != TARGET or [a, b] == rles[:2])


def test_a_subset_of_frames_equals_the_full_run_and_reads_no_further(propagator, clip, objects):
    hypotheses = [objects[:1], objects[1:]]
    full = collect(propagator, FramesInMemory(clip[0]), hypotheses)
    for frames, read in [([3, 6], {3, 4, 5, 6}), ([9], set(range(4, 10))), ([0, 2, 2], set(range(5))), ([4], {4}), ([], {4})]:
        video = CountingVideo(clip[0])
        some = collect(propagator, video, hypotheses, frames)
        assert set(video.read) == read and len(video.read) == len(read)
        assert all(found.keys() == set(frames) and all((found[t] == whole[t]).all() for t in found) for found, whole in zip(some, full))


def test_many_objects_go_in_turns(propagator, video, clip, objects):
    hypotheses = [objects[:1], objects, objects[1:2]]
    told = []
    found = collect(with_limit(propagator, 2), video, hypotheses, [2, 6], progress=lambda *n: told.append(n))
    for in_turn, at_once in zip(found, collect(propagator, FramesInMemory(clip[0]), hypotheses, [2, 6])):
        assert all_nearly_equal(in_turn, at_once)
    assert told == [(i, 12) for i in range(1, 13)] and len(video.read) == 1 + 12


def parts(value):
    """What an object holds, whatever it keeps it in: (tensors, number of items), networks left out."""
    if isinstance(value, torch.Tensor):
        return [value], 0
    if isinstance(value, (torch.nn.Module, str)) or not isinstance(value, (dict, list, tuple, set)) and not hasattr(value, "__dict__"):
        return [], 0
    inner = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple, set)) else list(vars(value).values())
    tensors, items = zip(*map(parts, inner)) if inner else ((), ())
    return sum(tensors, []), len(inner) + sum(items)


def held(tracker):
    """(bytes of all tensors, number of items) in a tracker."""
    tensors, items = parts({name: value for name, value in vars(tracker).items() if name != "method"})
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()), items


def test_memory_does_not_grow_with_the_video(propagator, clip, objects):
    tracker = propagator.method.start(clip[0][0], [objects[:2]])
    kept = []
    for t in range(1, 25):
        tracker.step(clip[0][t % FRAMES])
        kept.append(held(tracker))
    assert kept[0][0] > 10_000 and kept[0] < kept[POINTERS] and len(set(kept[POINTERS:])) == 1, kept


def test_what_is_forgotten_is_never_missed(propagator, clip, objects, monkeypatch):
    frames = np.concatenate([clip[0], clip[0][:POINTERS]])

    def logits():
        tracker = propagator.method.start(frames[0], [objects[:2]])
        return [tracker.step(frame)[0] for frame in frames[1:]], tracker

    short, tracker = logits()
    monkeypatch.setattr(type(tracker), "_forget", lambda self, t: None)
    whole, hoarder = logits()
    assert held(hoarder) > held(tracker) and all(map(torch.equal, short, whole))


def test_agrees_with_transformers_own_loop(by_transformers, clip, objects):
    """The whole video given at once, and propagated by `propagate_in_video_iterator`; a session for each direction, since one
    for both would let the second look at what the first found. The video is longer than the pointers that the model uses: in a
    shorter one that loop would measure time by its length."""
    from transformers import Sam2VideoInferenceSession

    model, processor = by_transformers.method.model, by_transformers.method.image_processor
    pixels = torch.cat([processed(processor, frame) for frame in clip[0]])
    masks_M11ss = to_input_masks(objects[:2], (TINY_SIZE, TINY_SIZE), torch.device("cpu"), smooth=True)[:, None, None]
    (found,) = collect(by_transformers, FramesInMemory(clip[0]), [objects[:2]])
    compared = []
    for reverse in (False, True):
        session = Sam2VideoInferenceSession(pixels, 44, 60, dtype=torch.float32)
        for m, mask_11ss in enumerate(masks_M11ss):
            session.add_mask_inputs(session.obj_id_to_idx(m), TARGET, mask_11ss)
        session.obj_with_new_inputs = [0, 1]
        for output in model.propagate_in_video_iterator(session, TARGET, reverse=reverse):
            logits = F.interpolate(output.pred_masks, (44, 60), mode="bilinear", align_corners=False)[:, 0]
            expected = (logits > 0) & (logits == logits.amax(0))
            if output.frame_idx != TARGET:
                compared.append(output.frame_idx)
                assert nearly_equal(found[output.frame_idx], expected.numpy())
    assert sorted([*compared, TARGET]) == list(range(FRAMES))


def test_both_programs_agree(by_transformers, by_meta, clip, objects, monkeypatch):
    """The converted weights, longer than either kind of memory. Transformers takes the first frame's pointer from another token than
    Meta's program (the best of three masks, though a mask was given); with that set right, nothing else differs."""
    model = by_transformers.method.model
    forward = model._single_frame_forward

    def single(*args, input_masks=None, **others):
        return forward(*args, input_masks=input_masks, **others | ({} if input_masks is None else {"multimask_output": False}))

    monkeypatch.setattr(model, "_single_frame_forward", single)
    frames = np.random.default_rng(0).integers(0, 256, (POINTERS + 4, TINY_SIZE, TINY_SIZE, 3), dtype=np.uint8)
    masks = np.zeros((2, TINY_SIZE, TINY_SIZE), dtype=bool)
    masks[0, 10:30, 12:40] = masks[1, 35:60, 20:44] = True
    a, b = (propagator.method.start(frames[0], [masks]) for propagator in (by_transformers, by_meta))
    for t, frame in enumerate(frames[1:], start=1):
        (x,), (y,) = a.step(frame), b.step(frame)
        # Rounding grows from frame to frame: it is 1e-5 of logits up to 20 on the first.
        assert x.abs().max() > 5 and (x - y).abs().max() < (1e-3 if t == 1 else 0.3)
        assert ((x.argmax(0) != y.argmax(0)).float().mean()) < 0.02


def test_half_precision(propagator, clip, objects, video):
    low = copy.copy(propagator.method)
    low.dtype = torch.bfloat16
    (half,), (full,) = (collect(p, video, [objects[:1]], range(TARGET, TARGET + 3)) for p in (Propagator(low), propagator))
    assert 0 < np.mean([np.mean(half[t] != full[t]) for t in half]) < 0.2


def test_the_callers_torch_state_is_left_alone(propagator, clip, objects):
    locked = clip[0].copy()
    locked.flags.writeable = False  # as out of Ray's object store
    run = propagator.propagate(FramesInMemory(locked), TARGET, [objects])
    for _ in range(3):
        next(run)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


def test_errors_are_those_of_every_method(propagator, clip, objects):
    with pytest.raises(VideoError, match="frame 12 was asked for"):
        propagator.propagate(FramesInMemory(clip[0]), 0, [objects], [12])
    with pytest.raises(ValueError, match="hypothesis 0, object 0: the mask is 44x50"):
        propagator.propagate(FramesInMemory(clip[0]), 0, [objects[:, :, :50]])
    frames = list(clip[0])
    frames[6] = frames[6].astype(np.float32)
    with pytest.raises(VideoError, match="frame 6 of the video is not an RGB uint8 array"):
        propagator.propagate_rle(FramesInMemory(frames), TARGET, [objects[:1]])


def test_checkpoints_that_cannot_track(tiny_sam2, folder, tmp_path):
    def load(checkpoint):
        return Propagator.load(PropagationConfig(method="sam2", checkpoint=str(checkpoint)))

    with pytest.raises(CheckpointError, match="is a 'sam2' model, which has no memory .*facebook/sam2.1-hiera-large"):
        load(tiny_sam2)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere.pt does not exist"):
        load(tmp_path / "nowhere.pt")
    other = shutil.copytree(folder, tmp_path / "other")
    edit_json(other / "config.json", num_maskmem=5)
    with pytest.raises(CheckpointError, match="1 mismatched keys .memory_temporal_positional_encoding"):
        load(other)


def test_one_folder_serves_images_and_videos(folder, clip):
    segmenter = Segmenter(folder, device="cpu", propagation=PropagationConfig(method="sam2", checkpoint=folder))
    video = FramesInMemory(clip[0])
    masks = segmenter.segment_group(video.frame(TARGET), [[ObjectPrompt((20, 10, 40, 30))], []])
    tracks = segmenter.propagate_group(video, TARGET, masks, [2, TARGET, 6])
    assert [sorted(track) for track in tracks] == [[2, TARGET, 6]] * 2 and tracks[0][TARGET] == masks[0] and tracks[1][6] == []
    assert decode_rle(tracks[0][6][0]).shape == (44, 60)
