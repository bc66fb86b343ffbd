"""Batches of requests: shared work, the same answers as alone, and errors that stay with the request they belong to."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import BOX, FRAMES, HEIGHT, OTHER_BOX, POINT, TOY_SAM2, WIDTH, ask, make_config, same, write_video

from segmentation_service.client import LocalClient
from segmentation_service.masks import decode_rle
from segmentation_service.references import References
from segmentation_service.service import SegmentationService
from segmentation_service.service_request import SegmentResponse, ServiceError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("service"), max_hypotheses=3, max_objects=4, max_points=2, max_masks=10)


@pytest.fixture(scope="module")
def loaded(config):
    return SegmentationService.load(config)


@pytest.fixture
def service(loaded):
    """Fresh counters and an empty cache."""
    loaded.segmenter.cache.__init__(2**24)
    loaded.segmenter._stats = type(loaded.segmenter._stats)()
    return loaded


def failures(answers):
    return [a.status if isinstance(a, ServiceError) else None for a in answers]


def test_a_request_is_answered_in_its_own_shape(service):
    (answer,) = service.segment_batch([ask("red", 1, (BOX, POINT), (), (OTHER_BOX,), propagate=(0, 4))])
    assert isinstance(answer, SegmentResponse) and [len(h) for h in answer.masks] == [2, 0, 1]
    assert answer.masks[0][0].size == (HEIGHT, WIDTH)
    assert [sorted(track) for track in answer.tracks] == [[0, 4]] * 3 and [len(track[4]) for track in answer.tracks] == [2, 0, 1]
    assert service.segment_batch([ask()])[0].tracks is None and service.segment_batch([]) == []


def test_requests_about_one_frame_share_its_encoding_and_decode_once(service):
    requests = [ask("red", 0, (BOX,)), ask("green", 0), ask("red", 0, (OTHER_BOX,), (BOX,)), ask("red", 1), ask("red", 0, (POINT,))]
    answers = service.segment_batch(requests)
    stats = service.stats()
    assert (stats["image_encodings"], stats["prompts"], stats["decoded"]) == (3, 6, 5)
    for request, answer in zip(requests, answers):
        assert same(answer, LocalClient(service).segment(request))
    assert len({m.counts for a in answers for h in a.masks for m in h}) > 3, "the masks should differ"
    assert service.stats()["image_encodings"] == 3 and service.stats()["cache_hits"] == 5


def test_no_more_objects_come_together_than_a_request_may_have(service, monkeypatch):
    segment_group, sizes = service.segmenter.segment_group, []

    def counted(frame_HW3, hypotheses, key=None):
        sizes.append(sum(map(len, hypotheses)))
        return segment_group(frame_HW3, hypotheses, key)

    monkeypatch.setattr(service.segmenter, "segment_group", counted)
    answers = service.segment_batch([ask("red", 0, (BOX, POINT)), ask(), ask("red", 0, (BOX, OTHER_BOX)), ask(), ask()])
    assert sizes == [3, 4] and failures(answers) == [None] * 5 and service.stats()["image_encodings"] == 1


def test_propagation_of_one_video_is_one_pass(service):
    requests = [ask("red", 2, (BOX,), propagate=(0, 4)), ask("red", 2, (OTHER_BOX,), propagate=(4, 0, 4)), ask("red", 2, propagate=(3,)), ask("red", 2)]
    together = service.segment_batch(requests)
    assert service.stats()["frames_propagated"] == (FRAMES - 1) + 1
    alone = [LocalClient(service).segment(request) for request in requests]
    assert all(map(same, together, alone)) and together[0].tracks[0].keys() == {0, 4}
    everywhere = LocalClient(service).segment(ask("red", 2, propagate=True))
    assert list(everywhere.tracks[0]) == list(range(FRAMES)) and everywhere.tracks[0][2] == everywhere.masks[0]


def test_masks_come_before_tracks_and_errors_before_both(service):
    order = [i for i, _ in service.answers([ask(propagate=(1,)), ask("green"), ask("nowhere")])]
    assert order == [2, 1, 0]


def test_what_is_wrong_with_a_request_stays_with_it(service, config):
    root = config.roots[0]
    broken = write_video(Path(root) / "broken", 5)
    (broken / "000.png").write_text("no image")
    (broken / "003.png").write_text("no image")
    uneven = write_video(broken.parent / "uneven", 6)
    Image.new("RGB", (WIDTH, HEIGHT + 2)).save(uneven / "001.png")
    requests = [
        ask("red"),
        ask("nowhere"),
        ask("red", FRAMES),
        ask("broken", 0),
        ask("broken", 1),
        ask("broken", 1, propagate=(3,)),
        ask("broken", 1, propagate=(2,)),
        ask("uneven", 0, propagate=True),
        ask("red", 0, propagate=(1, FRAMES)),
        ask("red", 0, (BOX, BOX), (BOX, BOX, BOX)),
        ask("red", 0, (BOX,), (), (), ()),
        ask("red", 0, ({"points": ((1, 1), (2, 2), (3, 3)), "labels": (1, 1, 1)},)),
        ask("red", 0, (BOX, BOX, BOX), propagate=True),
        ask("red", 0, (OTHER_BOX,)),
    ]
    answers = service.segment_batch(requests)
    assert failures(answers) == [None, 404, 422, 422, None, 422, None, 422, 422, 413, 413, 413, 413, None]
    for i in (0, 4, 6, 13):
        assert same(answers[i], LocalClient(service).segment(requests[i]))
    assert not [a for a in answers if isinstance(a, ServiceError) and root in a.message], "messages should not tell where videos lie"
    assert [word in str(answers[i]) for i, word in ((2, "frames 0 to 4"), (3, "frame 0"), (5, "frame 3"), (7, "50x64"), (12, "3 objects on 5 frames"))] == [True] * 5


def test_a_fault_in_shared_work_falls_on_its_cause_alone(service, monkeypatch):
    segment_group = service.segmenter.segment_group

    def fragile(frame_HW3, hypotheses, key=None):
        if any(prompt.box == (1, 2, 3, 4) for hypothesis in hypotheses for prompt in hypothesis):
            raise RuntimeError("out of memory")
        return segment_group(frame_HW3, hypotheses, key)

    monkeypatch.setattr(service.segmenter, "segment_group", fragile)
    answers = service.segment_batch([ask(), ask("red", 0, ({"box": (1, 2, 3, 4)},)), ask("red", 0, (POINT,))])
    assert failures(answers) == [None, 500, None] and "out of memory" not in str(answers[1])


def test_propagation_ends_at_its_time(loaded, config):
    hasty = SegmentationService(loaded.segmenter, References(config.roots), dataclasses.replace(config, work_seconds=0.0))
    answers = hasty.segment_batch([ask("green", propagate=(4,)), ask("green", propagate=(4,)), ask("green", propagate=(1,)), ask("green")])
    assert failures(answers) == [413, 413, None, None] and "1 of 4 frames" in str(answers[0])


def test_a_changed_video_gets_new_masks(service, config, tmp_path):
    folder = write_video(Path(config.roots[0]) / "changing", 8)
    client, request = LocalClient(service), ask("changing", 0, (BOX, OTHER_BOX))
    first = client.segment(request)
    assert client.segment(request) == first and service.stats()["cache_hits"] == 1
    Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB").save(folder / "000.png")
    second = client.segment(request)
    assert second != first and service.stats()["image_encodings"] == 2
    service.segmenter.cache.__init__(0)
    assert client.segment(request) == second


def test_large_frames_and_long_videos_are_refused(loaded, config):
    for values, what in ((dict(max_frame_pixels=100), "pixels"), (dict(max_frames=FRAMES - 1), "frames in the video")):
        small = dataclasses.replace(config, **values)
        service = SegmentationService(loaded.segmenter, References(config.roots, None, small.max_frame_pixels), small)
        with pytest.raises(ServiceError, match=f"413: .*{what}"):
            LocalClient(service).segment(ask())


def test_without_weights_for_propagation_only_the_target_frame_is_served(service, monkeypatch):
    monkeypatch.setattr(service.segmenter, "propagator", None)
    answers = service.segment_batch([ask(propagate=True), ask()])
    assert failures(answers) == [422, None]


def test_probe_notices_a_model_that_changed(service):
    service.probe()
    decoder = service.segmenter.backend.model.mask_decoder
    kept = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    decoder.load_state_dict({name: tensor * float("nan") for name, tensor in kept.items()})
    try:
        with pytest.raises(RuntimeError, match="mask of the probe agrees in only"):
            service.probe()
    finally:
        decoder.load_state_dict(kept)
    service.probe()


def test_threads_may_share_a_local_client(service):
    client, found = LocalClient(service), []
    requests = [ask(video, frame) for video in ("red", "green") for frame in range(4)]
    threads = [threading.Thread(target=lambda r=r: found.append((r, client.segment(r)))) for r in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(same(answer, client.segment(request)) for request, answer in found)


@pytest.mark.parametrize("wrong, message", [("none.pth", "xmem checkpoint .*none.pth does not exist"), ("sam2", "is not the folder of an XMem")])
def test_weights_of_propagation_are_looked_for_before_ray_starts(tmp_path, wrong, message):
    from segmentation_service import serve
    from segmentation_service.checkpoint import CheckpointError

    config = make_config(tmp_path)
    config.segmentation.propagation.checkpoint = str(TOY_SAM2.parent / wrong)
    with pytest.raises(CheckpointError, match=message):
        serve.application(config)


def test_masks_of_an_answer_can_be_decoded(tmp_path):
    service = SegmentationService.load(make_config(tmp_path))
    (answer,) = service.segment_batch([ask("red", 1, (BOX,))])
    rle = answer.masks[0][0]
    assert decode_rle(rle).any() and np.array_equal(decode_rle(rle), decode_rle(rle.model_dump()))
