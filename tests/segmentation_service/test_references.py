"""Videos are found below the roots and among the uploads; whatever lies elsewhere is said not to exist."""

import os

import numpy as np
import pytest
from PIL import Image
from served import write_video

from segmentation_service.references import References
from segmentation_service.service_request import ServiceError
from segmentation_service.video import VideoError


@pytest.fixture
def place(tmp_path):
    """Two roots, uploads, and a video that is none of the service's business."""
    for seed, name in enumerate(("one/a", "one/deep/b", "two/c", "uploads/7f3a", "secret/d")):
        write_video(tmp_path / name, seed, frames=2)
    return tmp_path


@pytest.fixture
def references(place):
    return References([place / "one", place / "two"], place / "uploads")


@pytest.mark.parametrize("reference", ["a", "deep/b", "deep/../a", "./a/", "c", "{}/one/deep/b", "{}/two/c", "upload:7f3a"])
def test_finds_what_lies_below_a_root_or_was_uploaded(place, references, reference):
    video = references.open(reference.format(place))
    assert len(video) == 2 and video.frame(1).shape == (48, 64, 3)


REFUSED = ["nowhere", "../secret/d", "../one/a", "deep/../../one/a", "{}/secret/d", "{}/one/../secret/d", "/etc", "/", "..", "~", "a\0b", "a" * 300, "d"]
REFUSED += ["escape", "escape/../d", "loop", "upload:none", "upload:", "upload:..", "upload:../secret/d", "upload:/etc", "upload:.hidden"]


@pytest.mark.parametrize("reference", REFUSED)
def test_all_else_does_not_exist(place, references, reference):
    (place / "one/escape").symlink_to(place / "secret/d")
    (place / "one/loop").symlink_to(place / "one/loop")
    reference = reference.format(place)
    with pytest.raises(ServiceError) as error:
        references.open(reference)
    assert (error.value.status, error.value.message) == (404, f"there is no video {reference[:200]!r}")


def test_links_inside_the_root_are_followed(place, references):
    (place / "one/link").symlink_to(place / "one/deep")
    (place / "two/other").symlink_to(place / "two/c")
    assert len(references.open("link/b")) == 2 and len(references.open("other")) == 2


def test_without_uploads_there_are_none(place):
    with pytest.raises(ServiceError, match="404"):
        References([place]).open("upload:7f3a")


def test_what_is_no_video_says_so_without_its_path(place, references):
    (place / "one/empty").mkdir()
    (place / "one/deep/b/000.png").write_text("no image")
    with pytest.raises(ServiceError) as error:
        references.open("empty")
    assert error.value.status == 422 and "empty: holds no" in str(error.value) and str(place) not in str(error.value)
    with pytest.raises(VideoError) as error:
        references.open("deep/b").frame(0)
    assert "frame 0" in str(error.value) and str(place) not in str(error.value)


def test_a_frame_may_not_be_a_link_to_elsewhere(place, references):
    os.remove(place / "one/a/001.png")
    (place / "one/a/001.png").symlink_to(place / "secret/d/001.png")
    video = references.open("a")
    assert video.frame(0).any()
    for use in (video.frame, video.identity):
        with pytest.raises(VideoError, match="link that leaves"):
            use(1)


def test_large_frames_are_refused_before_they_are_decoded(place, monkeypatch):
    video = References([place / "one"], max_pixels=48 * 64 - 1).open("a")
    monkeypatch.setattr("segmentation_service.video.ImageFolder.frame", lambda self, i: pytest.fail("was decoded"))
    with pytest.raises(ServiceError, match="413: frame 0 of a has more than the 3071 pixels"):
        video.frame(0)


def test_identity_follows_the_file_of_the_frame(place, references):
    video = references.open("a")
    before = [video.identity(t) for t in (0, 1)]
    assert before[0] != before[1] and [references.open(str(place / "one/a")).identity(t) for t in (0, 1)] == before
    times = os.stat(place / "one/a/001.png")
    Image.new("RGB", (64, 48)).save(place / "one/a/001.png")
    os.utime(place / "one/a/001.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # as tools that keep times do
    assert references.open("a").identity(0) == before[0] and references.open("a").identity(1) != before[1]


def test_large_video_files_are_refused_before_they_are_decoded(place, monkeypatch):
    import av

    with av.open(str(place / "one/v.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        out.mux([*stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")), *stream.encode()])
    assert References([place / "one"]).open("v.mp4").frame(0).shape == (48, 64, 3)
    monkeypatch.setattr("segmentation_service.video_file.VideoFile.frame", lambda self, i: pytest.fail("was decoded"))
    with pytest.raises(ServiceError, match="413: frame 0 of v.mp4 has more than the 3071 pixels"):
        References([place / "one"], max_pixels=48 * 64 - 1).open("v.mp4").frame(0)
