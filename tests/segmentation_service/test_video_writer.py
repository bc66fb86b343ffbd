"""Videos and palette images that are written: frame for frame and pixel for pixel what was given, as another program reads it."""

import av
import numpy as np
import pytest
from PIL import Image

from segmentation_service.palette import save_palette
from segmentation_service.video_file import VideoFile
from segmentation_service.video_writer import write_video
from tests.segmentation_service.test_video_file import number, picture


@pytest.mark.parametrize("hw, fps, rate", [((50, 66), 25.0, (25, 1)), ((51, 65), 30000 / 1001, (30000, 1001)), ((51, 66), 7.5, (15, 2))])
def test_every_frame_is_there_in_its_place_at_its_size_and_rate(tmp_path, hw, fps, rate):
    frames = [picture(i, hw) for i in range(70)]
    video = VideoFile(write_video(tmp_path / "out.mp4", iter(frames), fps))
    assert [f.name for f in tmp_path.iterdir()] == ["out.mp4"] and len(video) == 70 and video.fps == pytest.approx(fps)
    with av.open(str(tmp_path / "out.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.average_rate.numerator, stream.average_rate.denominator) == rate and stream.format.name == "yuv420p"
    for i, frame in enumerate(frames):
        got = video.frame(i)
        assert got.shape[:2] == (hw[0] + hw[0] % 2, hw[1] + hw[1] % 2) and number(got[: hw[0], : hw[1]]) == i


@pytest.mark.parametrize("hw", [(64, 64), (1080, 1920)])
def test_colours_are_those_given_whatever_players_guess_from_the_size(tmp_path, hw):
    colours = [(255, 0, 0), (0, 200, 40), (30, 60, 235), (128, 128, 128)]
    video = VideoFile(write_video(tmp_path / "out.mp4", [np.full((*hw, 3), c, np.uint8) for c in colours], 10))
    for i, colour in enumerate(colours):
        assert np.abs(video.frame(i).astype(int) - colour).max() <= 3


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    frame = np.zeros((10, 10, 3), np.uint8)
    for frames, said in (([], "there is no frame"), ([frame, frame[:8]], "frame 1 is uint8 \\(8, 10, 3\\)"), ([frame / 255], "frame 0 is float64")):
        with pytest.raises(ValueError, match=said):
            write_video(tmp_path / "out.mp4", frames, 10)
    assert not list(tmp_path.iterdir())


def test_palette_images_number_the_objects(tmp_path):
    masks = np.zeros((3, 5, 7), bool)
    masks[0, 1, 1:4] = masks[2, 1:3, 3] = True
    save_palette(tmp_path / "m.png", masks, (5, 7))
    image = Image.open(tmp_path / "m.png")
    expected = np.zeros((5, 7), int)
    expected[1, 1:3], expected[1:3, 3] = 1, 3
    assert image.mode == "P" and (np.asarray(image) == expected).all()
    colours = np.reshape(image.getpalette(), (-1, 3)).tolist()
    # The first and some later colours of DAVIS's own images.
    assert colours[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]] and colours[8] == [64, 0, 0] and colours[20] == [0, 64, 128]
    save_palette(tmp_path / "m.png", [], (5, 7))
    assert not np.asarray(Image.open(tmp_path / "m.png")).any()
    with pytest.raises(ValueError, match="300 objects"):
        save_palette(tmp_path / "m.png", [masks[0]] * 300, (5, 7))
