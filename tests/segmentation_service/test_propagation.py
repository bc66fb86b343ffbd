"""Masks of many hypotheses through a video: equal to each alone, in both directions, reading no more frames than are needed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from propagating import FRAMES, HEIGHT, TARGET, WIDTH, CountingVideo, all_nearly_equal, collect, make_clip, objects_of, recipe
from segmentation_service import propagation_xmem
from segmentation_service.checkpoint import CheckpointError
from segmentation_service.config import PropagationConfig
from segmentation_service.masks import decode_rle, encode_rle
from segmentation_service.propagation import Propagator
from segmentation_service.resizing import resized, to_input_masks
from segmentation_service.segmenter import Segmenter
from segmentation_service.video import FramesInMemory, ImageFolder, VideoError
from segmentation_service.xmem import XMemConfig, XMemGroupTracker, XMemTracker, load_xmem
from tiny_xmem import tiny_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")

MEMORY = dict(mem_every=2, max_mid_term_frames=4, min_mid_term_frames=2, num_prototypes=9, max_long_term_elements=30)


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture
def video(clip):
    return CountingVideo(clip[0])


@pytest.fixture(scope="module")
def objects(clip):
    return objects_of(clip)


@pytest.fixture(scope="module")
def weights():
    return tiny_state_dict(seed=7)  # draws on every frame, and something else for every hypothesis


@pytest.fixture(scope="module")
def network(weights):
    return load_xmem(weights)


@pytest.fixture(scope="module")
def propagator(network):
    return Propagator(network, config())


@pytest.fixture
def trackers(monkeypatch):
    """The trackers that propagation makes, in order."""
    made = []

    class Tracker(XMemGroupTracker):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(propagation_xmem, "XMemGroupTracker", Tracker)
    return made


def config(**changes):
    return PropagationConfig(**{"size": 0, "xmem": XMemConfig(**MEMORY), **changes})


def plain_loop(network, frames, masks_NHW, size=0):
    """{place in frames: masks}, the first frame's being given: one tracker, one direction, resized as the published program does."""
    tracker, height, width = XMemTracker(network, XMemConfig(**MEMORY)), *frames[0].shape[:2]
    hw = (size or height, size * width // height if size else width)
    found = {0: masks_NHW}
    for i, frame_HW3 in enumerate(frames):
        image = F.interpolate(recipe.to_input(frame_HW3)[None], hw, mode="bilinear", align_corners=False)[0]
        mask = None if i else F.interpolate(torch.from_numpy(masks_NHW)[None].float(), hw, mode="nearest")[0]
        probs = F.interpolate(tracker.step(image, mask)[None], (height, width), mode="bilinear", align_corners=False)[0]
        if i:
            index_HW = probs.argmax(0).numpy()
            found[i] = np.stack([index_HW == n for n in range(1, len(masks_NHW) + 1)])
    return found


@pytest.mark.parametrize("size", [0, 32, 64])
def test_both_directions_agree_with_a_plain_loop(network, video, clip, objects, size):
    (found,) = collect(Propagator(network, config(size=size)), video, [objects[:2]])
    forwards = plain_loop(network, clip[0][TARGET:], objects[:2], size)
    backwards = plain_loop(network, clip[0][TARGET::-1], objects[:2], size)
    expected = {TARGET + i: masks for i, masks in forwards.items()} | {TARGET - i: masks for i, masks in backwards.items()}
    assert sorted(found) == list(range(FRAMES)) and all_nearly_equal(found, expected)
    assert all(masks.any((1, 2)).all() for masks in found.values()), "the random network should draw something"
    assert not any((masks.sum(0) > 1).any() for t, masks in found.items() if t != TARGET), "objects compete for pixels"


def test_grouped_equals_separate(propagator, video, clip, objects):
    one, two, three = objects
    hypotheses = [objects[:1], objects, objects[1:], np.stack([one | two]), objects[[2, 0]], np.stack([one, one | three])]
    together = collect(propagator, video, hypotheses)
    for hypothesis, found in zip(hypotheses, together):
        (alone,) = collect(propagator, FramesInMemory(clip[0]), [hypothesis])
        assert all_nearly_equal(found, alone)
        assert (found[TARGET] == hypothesis).all(), "masks on the target frame come back as given"
    assert len({masks[TARGET + 2].tobytes() for masks in together}) == len(hypotheses)


def test_a_subset_of_frames_equals_the_full_run_and_reads_no_further(propagator, clip, objects):
    hypotheses = [objects[:1], objects[1:]]
    full = collect(propagator, FramesInMemory(clip[0]), hypotheses)
    for frames, read in [([3, 6], {3, 4, 5, 6}), ([9], set(range(4, 10))), ([0, 2, 2], set(range(5))), ([4], {4}), ([], {4})]:
        video = CountingVideo(clip[0])
        some = collect(propagator, video, hypotheses, frames)
        assert set(video.read) == read and len(video.read) == len(read)
        assert all(found.keys() == set(frames) and all((found[t] == whole[t]).all() for t in found) for found, whole in zip(some, full))


def test_frames_are_read_once_and_let_go(propagator, video, objects):
    collect(propagator, video, [objects, objects[:1]])
    assert sorted(video.read) == list(range(FRAMES)) and video.most_alive == 2 and video.alive == 0


def test_memory_does_not_grow_with_the_video(propagator, trackers, clip, objects):
    for rounds in (5, 9):
        frames = np.concatenate([clip[0][TARGET:], clip[0][:TARGET]] * rounds)
        video = CountingVideo(frames)
        for _ in propagator.propagate(video, 0, [objects[:1]]):
            pass
        assert video.most_alive == 2
    short, long = trackers
    assert long.frame > short.frame and long.memory.nbytes() == short.memory.nbytes()


def test_empty_hypotheses_are_left_out(propagator, trackers, video, objects):
    nothing = np.zeros_like(objects)
    mixed = np.stack([nothing[0], objects[1]])
    hypotheses = [nothing[:0], nothing, mixed, [], [encode_rle(nothing[0])]]
    found = collect(propagator, video, hypotheses)
    assert [tracker.memory.objects for tracker in trackers] == [1, 1]
    assert all(sorted(f) == list(range(FRAMES)) for f in found)
    assert not any(masks.any() for g in (0, 1, 3, 4) for masks in found[g].values())
    (alone,) = collect(propagator, video, [objects[1:2]])
    assert all(not masks[0].any() and (masks[1] == alone[t][0]).all() for t, masks in found[2].items())


def test_nothing_to_track_reads_the_target_frame_only(propagator, trackers, video):
    assert propagator.propagate_rle(video, TARGET, [[], []], [1, 0]) == [{0: [], 1: []}] * 2
    assert propagator.propagate_rle(video, TARGET, []) == []
    assert video.read == [TARGET] * 2 and not trackers


def test_equal_hypotheses_are_computed_once(propagator, trackers, video, objects):
    rles = [encode_rle(mask) for mask in objects]
    hypotheses = [objects[:2], objects[:2].copy(), objects[[1, 0]], rles[:2], [rles[0], rles[1], rles[0]], objects[2:]]
    found = propagator.propagate_rle(video, TARGET, hypotheses)
    assert [(tracker.memory.objects, len(tracker.places)) for tracker in trackers] == [(3, 2)] * 2
    for t in range(FRAMES):
        a, b = found[0][t]
        assert [f[t] for f in found[1:5]] == [[a, b], [b, a], [a, b], [a, b, a]]
    found[0][0][0]["counts"] = "changed"
    assert found[1][0][0]["counts"] != "changed", "hypotheses do not share what a caller may change"


def test_many_objects_go_in_turns(network, propagator, trackers, video, clip, objects):
    hypotheses = [objects[:1], objects, objects[1:2], objects[:2], objects[2:]]
    expected = collect(propagator, video, hypotheses)
    trackers.clear()
    told = []
    found = collect(Propagator(network, config(max_objects=2)), FramesInMemory(clip[0]), hypotheses, progress=lambda *n: told.append(n))
    assert [tracker.memory.objects for tracker in trackers[::2]] == [1, 3, 1, 2, 1]
    assert all(map(all_nearly_equal, found, expected))
    assert told == [(i, 5 * (FRAMES - 1)) for i in range(1, 5 * (FRAMES - 1) + 1)]


def test_rles_are_those_of_the_masks(propagator, video, objects):
    hypotheses = [objects[:2], objects[1:2]]
    masks, rles = collect(propagator, video, hypotheses), propagator.propagate_rle(video, TARGET, hypotheses, range(1, 7))
    for of_frame, found in zip(masks, rles):
        assert list(found) == [1, 2, 3, 4, 5, 6]
        assert all((np.stack([decode_rle(rle) for rle in found[t]]) == of_frame[t]).all() for t in found)


def test_a_video_of_one_frame(propagator, trackers, clip, objects):
    (found,) = propagator.propagate_rle(FramesInMemory(clip[0][TARGET : TARGET + 1]), 0, [objects])
    assert found == {0: [encode_rle(mask) for mask in objects]} and not trackers


@pytest.mark.parametrize("target, step", [(0, 1), (FRAMES - 1, -1)])
def test_a_target_frame_at_the_end(propagator, network, clip, trackers, target, step):
    mask = (clip[1][target] == 1)[None]
    (found,) = collect(propagator, FramesInMemory(clip[0]), [mask], target=target)
    expected = {target + step * i: masks for i, masks in plain_loop(network, clip[0][::step], mask).items()}
    assert all_nearly_equal(found, expected) and len(trackers) == 1


@pytest.mark.parametrize("smooth", [False, True])
def test_an_object_lost_by_resizing_is_kept(smooth):
    speck = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    speck[0, 21, 31] = speck[1, 2:30, 5:40] = True
    small = to_input_masks(speck, (11, 15), torch.device("cpu"), smooth)
    assert small[0].sum() == 1 and small[0, 5, 7] == 1
    mode = dict(mode="bilinear", antialias=True) if smooth else dict(mode="nearest")
    assert torch.equal(small[1], (F.interpolate(torch.from_numpy(speck[1:])[None].float(), (11, 15), **mode)[0, 0] >= 0.5).float())


def test_sizes():
    for hw, expected in {(480, 854): (480, 854), (1080, 1920): (480, 853), (1920, 1080): (853, 480), (240, 427): (480, 854), (480, 480): (480, 480)}.items():
        assert resized(hw, 480) == expected
    assert resized((33, 70), 0) == (33, 70)


def test_half_precision(network, propagator, video, clip, objects):
    frames = range(TARGET, FRAMES)
    (low,) = collect(Propagator(network, config(dtype="bfloat16")), video, [objects[:1]], frames)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_loop(network, clip[0][TARGET:], objects[:1])
    assert all_nearly_equal(low, {TARGET + i: masks for i, masks in expected.items()})
    (full,) = collect(propagator, video, [objects[:1]], frames)
    assert 0 < np.mean([np.mean(low[t] != full[t]) for t in frames]) < 0.2


def test_the_callers_torch_state_is_left_alone(propagator, clip, objects):
    locked = clip[0].copy()
    locked.flags.writeable = False  # as out of Ray's object store
    run = propagator.propagate(FramesInMemory(locked), TARGET, [objects])
    for _ in range(3):
        next(run)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


def test_an_image_folder_is_the_same_video(propagator, tmp_path, clip, objects):
    from PIL import Image

    for i, frame_HW3 in enumerate(clip[0]):
        Image.fromarray(frame_HW3).save(tmp_path / f"{i:05d}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    folder, hypotheses = ImageFolder(tmp_path), [objects[:1]]
    assert len(folder) == FRAMES
    assert propagator.propagate_rle(folder, TARGET, hypotheses) == propagator.propagate_rle(FramesInMemory(clip[0]), TARGET, hypotheses)
    file = tmp_path / "00007.png"
    file.write_bytes(file.read_bytes()[:500])
    run = propagator.propagate(folder, TARGET, hypotheses)
    with pytest.raises(VideoError, match="frame 7: .*00007.png is not a readable image"):
        list(run)
    Image.fromarray(clip[0][2][:-4]).save(tmp_path / "00002.png")
    with pytest.raises(VideoError, match="frame 2 is 40x60 and frame 4 44x60"):
        propagator.propagate_rle(folder, TARGET, hypotheses, [2])
    file.unlink()
    with pytest.raises(VideoError, match="frame 7: .*00007.png"):
        propagator.propagate_rle(folder, 7, hypotheses)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty: holds no .jpg"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(VideoError, match="nowhere: no such folder"):
        ImageFolder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "target, frames, message",
    [
        (FRAMES, None, "frame 10 was asked for, but the video has frames 0 to 9"),
        (-1, None, "frame -1 was asked for"),
        (1.5, None, "frame 1.5 was asked for"),
        (0, [3, 12], "frame 12 was asked for"),
        (0, [-2], "frame -2 was asked for"),
    ],
)
def test_frame_numbers_are_checked_at_once(propagator, video, objects, target, frames, message):
    with pytest.raises(VideoError, match=message):
        propagator.propagate(video, target, [objects], frames)
    assert not video.read


@pytest.mark.parametrize(
    "hypothesis, message",
    [
        (np.zeros((2, HEIGHT, WIDTH), np.uint8), "hypothesis 1: masks are bool .* got uint8 \\(2, 44, 60\\)"),
        (np.zeros((HEIGHT, WIDTH), bool), "hypothesis 1: masks are bool"),
        (np.zeros((1, HEIGHT, 50), bool), "hypothesis 1, object 0: the mask is 44x50 and frame 4, on which it lies, 44x60"),
        ([encode_rle(np.ones((HEIGHT, WIDTH), bool)), encode_rle(np.ones((5, 5), bool))], "hypothesis 1, object 1: the mask is 5x5"),
        ([{"size": [HEIGHT, WIDTH]}], "hypothesis 1, object 0: a run-length mask is"),
    ],
)
def test_masks_that_do_not_fit_are_named(propagator, video, objects, hypothesis, message):
    with pytest.raises(ValueError, match=message):
        propagator.propagate(video, TARGET, [objects, hypothesis])


def test_a_source_that_fails_names_the_frame(propagator, clip, objects):
    frames = list(clip[0])
    frames[6] = frames[6].astype(np.float32)
    with pytest.raises(VideoError, match="frame 6 of the video is not an RGB uint8 array .* float32"):
        propagator.propagate_rle(FramesInMemory(frames), TARGET, [objects])

    class Broken(FramesInMemory):
        def frame(self, i):
            if i == 8:
                raise RuntimeError("decoder lost")
            return super().frame(i)

    with pytest.raises(VideoError, match="frame 8 of the video cannot be read .RuntimeError: decoder lost"):
        propagator.propagate_rle(Broken(clip[0]), TARGET, [objects])
    assert propagator.propagate_rle(Broken(clip[0]), TARGET, [objects], [7])[0].keys() == {7}
    with pytest.raises(VideoError, match="frame 0 was asked for, but the video has no frames"):
        propagator.propagate(FramesInMemory([]), 0, [objects])


def test_settings_are_checked(network):
    with pytest.raises(ValueError, match="segmentation.propagation.method must be one of xmem, sam2, cutie; got 'sam3'"):
        Propagator(network, config(method="sam3"))
    with pytest.raises(ValueError, match="segmentation.propagation.dtype must be one of float32"):
        Propagator(network, config(dtype="int8"))
    for method, named in {"xmem": "XMem.pth", "sam2": "facebook/sam2.1-hiera-large", "cutie": "cutie-base-mega.pth"}.items():
        with pytest.raises(ValueError, match=f"segmentation.propagation.checkpoint is null; set it to .*{named}"):
            Propagator.load(config(method=method))


def test_segmenter(tmp_path, weights, propagator, video, objects):
    class NoSam2:
        device, dtype = "cpu", torch.float32

    torch.save(weights, tmp_path / "tiny.pth")
    segmenter = Segmenter("", NoSam2(), propagation=config(checkpoint=str(tmp_path / "tiny.pth")))
    hypotheses = [objects[:2], [encode_rle(objects[2])], []]
    prepared = segmenter.propagator.method.network
    found = segmenter.propagate_group(video, TARGET, hypotheses, [2, 5])
    assert found == propagator.propagate_rle(video, TARGET, hypotheses, [2, 5]) == segmenter.propagate_group(video, TARGET, hypotheses, (5, 2))
    assert segmenter.propagator.method.network is prepared and prepared.folded, "calls share one prepared network"
    assert segmenter.stats()["frames_propagated"] == 2 * 3 and segmenter.stats()["propagate_seconds"] > 0
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        Segmenter("", NoSam2(), propagation=config(checkpoint=str(tmp_path / "nowhere.pth")))
    for without in (Segmenter("", NoSam2()), Segmenter("", NoSam2(), propagation=config())):
        with pytest.raises(ValueError, match="set segmentation.propagation.checkpoint"):
            without.propagate_group(video, TARGET, hypotheses)
