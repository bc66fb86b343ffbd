"""Frames of video files against the ffmpeg binary of the package imageio-ffmpeg: the same ones, to the last bit."""

import random
import subprocess
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from segmentation_service.video_file import VideoFile

FRAMES = 40
CLIPS = {  # name: codec, (height, width), pixel format, B-frames, codec's options
    "h264.mp4": ("libx264", (50, 66), "yuv420p", 3, {}),
    "h264-odd.mkv": ("libx264", (51, 67), "yuv444p", 2, {}),
    "h264-bt709.mp4": ("libx264", (50, 66), "yuv420p", 0, {"colorspace": "bt709", "color_range": "tv"}),
    "h264-10bit.mkv": ("libx264", (50, 66), "yuv420p10le", 2, {}),
    "h265.mp4": ("libx265", (50, 66), "yuv420p", 2, {"x265-params": "log-level=none", "preset": "ultrafast"}),
    "mpeg4.avi": ("mpeg4", (51, 67), "yuv420p", 2, {}),
    "mpeg4.mkv": ("mpeg4", (50, 66), "yuv420p", 0, {}),
    "vp8.webm": ("libvpx", (51, 67), "yuv420p", 0, {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    "vp9.webm": ("libvpx-vp9", (51, 67), "yuv420p", 0, {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    "mjpeg.avi": ("mjpeg", (51, 67), "yuvj420p", 0, {}),
    "mjpeg.mkv": ("mjpeg", (51, 67), "yuvj422p", 0, {}),
}


def write(file, codec, hw, pixels, b_frames, options, times=None):
    """Blurred noise that is another in every frame; times in milliseconds."""
    rng = np.random.default_rng(0)
    with av.open(str(file), "w") as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size, stream.max_b_frames = *hw, pixels, 12, b_frames
        stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(FRAMES):
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            frame = av.VideoFrame.from_ndarray(np.asarray(small.resize((hw[1], hw[0]))), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = 40 * i if times is None else times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file


def shown_by_ffmpeg(file, hw):
    """All frames as the program shows them: uint8 (T, H, W, 3)."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(file), "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8).reshape(-1, *hw, 3)


def check(file, hw):
    truth, video = shown_by_ffmpeg(file, hw), VideoFile(file)
    assert len(video) == len(truth) == FRAMES
    places = random.Random(0).sample(range(FRAMES), FRAMES)
    for i in [*range(FRAMES), *places]:
        np.testing.assert_array_equal(video.frame(i), truth[i], err_msg=f"frame {i}")


@pytest.mark.parametrize("name", CLIPS)
def test_frames_of_every_codec(tmp_path, name):
    check(write(tmp_path / name, *CLIPS[name]), CLIPS[name][1])


def test_frames_of_a_variable_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(1).integers(1, 400, FRAMES)).tolist()
    check(write(tmp_path / "v.mkv", *CLIPS["h264.mp4"], times=times), (50, 66))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_of_a_turned_camera(tmp_path, degrees):
    flat, turned = write(tmp_path / "flat.mp4", *CLIPS["h264.mp4"]), tmp_path / "turned.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", str(degrees), "-i", str(flat), "-c", "copy", str(turned)]
    subprocess.run(command, check=True)
    check(turned, (50, 66) if degrees == 180 else (66, 50))
