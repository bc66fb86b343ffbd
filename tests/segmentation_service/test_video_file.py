"""Video files by frame number: every frame is the one that was written there, in any order of reading and whatever the container."""

import pickle
import random
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from segmentation_service.video import ImageFolder, VideoError, VideoReference, open_video
from segmentation_service.video_file import VideoFile

H, W = 50, 66  # no multiple of 16


def picture(i, hw=(H, W)):
    """A frame that says its number: ten vertical bars, white for each bit that is set."""
    frame = np.zeros((*hw, 3), np.uint8)
    bar = hw[1] // 10
    for bit in range(10):
        if i >> bit & 1:
            frame[:, bit * bar : (bit + 1) * bar] = 255
    return frame


def number(frame_HW3):
    bar = frame_HW3.shape[1] // 10
    return sum(1 << bit for bit in range(10) if frame_HW3[:, bit * bar : (bit + 1) * bar].mean() > 127)


def write(file, codec, frames=70, gop=12, b_frames=0, times=None, options=None, pixels="yuv420p"):
    with av.open(str(file), "w") as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size, stream.max_b_frames = H, W, pixels, gop, b_frames
        stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = 40 * i if times is None else times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file


KINDS = {
    "h264.mp4": dict(codec="libx264", b_frames=3),
    "open-gop.mkv": dict(codec="libx264", b_frames=3, options={"x264-params": "open-gop=1"}),
    "short-gop.mp4": dict(codec="libx264", b_frames=2, gop=2),
    "one-key-frame.mp4": dict(codec="libx264", b_frames=2, gop=1000),
    "vp9.webm": dict(codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp8.webm": dict(codec="libvpx", options={"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "mpeg4.avi": dict(codec="mpeg4", b_frames=2),
    "mjpeg.avi": dict(codec="mjpeg", pixels="yuvj420p"),
    "variable.mp4": dict(codec="libx264", b_frames=2, times=[40 * i + 7 * (i % 5) + (900 if i > 30 else 0) for i in range(70)]),
}


@pytest.fixture(scope="module", params=KINDS)
def video(request, tmp_path_factory):
    return VideoFile(write(tmp_path_factory.mktemp("video") / request.param, **KINDS[request.param]))


@pytest.mark.parametrize("order", ["rising", "falling", "random", "steps"])
def test_every_frame_is_the_one_that_was_written(video, order):
    places = list(range(70))
    assert len(video) == 70
    if order == "falling":
        places.reverse()
    elif order == "random":
        random.Random(0).shuffle(places)
    elif order == "steps":
        places = places[::13] + places[::-9]
    for i in places:
        frame = video.frame(i)
        assert frame.shape == (H, W, 3) and frame.dtype == np.uint8
        assert number(frame) == i
    with pytest.raises(VideoError, match="frame 70 was asked for, but the video has frames 0 to 69"):
        video.frame(70)


def test_kept_frames_stay_within_their_bytes_and_falling_order_stays_cheap(tmp_path):
    video = VideoFile(write(tmp_path / "v.mp4", "libx264", gop=1000), cache_bytes=40_000)
    starts = []
    video._seek, seek = lambda key: (starts.append(key), seek(key)), video._seek
    for i in range(69, -1, -1):
        assert number(video.frame(i)) == i
        assert sum(plane.buffer_size for frame in video._kept.values() for plane in frame.planes) == video._kept_bytes <= 40_000
    assert len(starts) <= 70 / (len(video._kept) - 1) + 1  # once for as many as are kept
    video.close()
    assert not video._kept and not video._kept_bytes


def test_a_file_travels_as_its_name(tmp_path):
    video = VideoFile(write(tmp_path / "v.mp4", "libx264"))
    video.frame(30)
    sent = pickle.dumps(video)
    assert len(sent) < 5000
    assert number(pickle.loads(sent).frame(31)) == 31


def test_rotated_video_is_upright(tmp_path):
    file = write(tmp_path / "v.mp4", "libx264", frames=3)
    turned = tmp_path / "turned.mp4"
    with av.open(str(file)) as source, av.open(str(turned), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    data = turned.read_bytes()
    place = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, reserved to volume: then the matrix
    quarter = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -(1 << 16), 0, 0, H << 16, 0, 1 << 30))
    turned.write_bytes(data[:place] + quarter + data[place + 36 :])
    upright = VideoFile(turned).frame(1)
    assert upright.shape == (W, H, 3)
    assert number(np.rot90(upright)) == 1  # a player turns it by 90 degrees clockwise


@pytest.mark.parametrize("fault", ["empty", "text", "no-index", "missing", "audio", "no-frames"])
def test_what_is_no_video_is_refused_by_name(tmp_path, fault):
    file = tmp_path / "v.mp4"
    if fault == "empty":
        file.write_bytes(b"")
    elif fault == "text":
        file.write_text("not a video " * 100)
    elif fault == "no-index":  # an mp4 that broke off has no list of its frames, which stands at its end
        file.write_bytes(write(tmp_path / "whole.mp4", "libx264").read_bytes()[:3000])
    elif fault == "audio":
        with av.open(str(file), "w") as out:
            stream = out.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 16000, 0
            out.mux(stream.encode(sound))
            out.mux(stream.encode())
    elif fault == "no-frames":
        write(file, "libx264", frames=0)
    with pytest.raises(VideoError, match="v.mp4"):
        VideoFile(file)


@pytest.mark.parametrize("playlist", ["#EXTM3U\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n"])
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4"])
def test_a_playlist_reads_no_other_file(tmp_path, playlist, name):
    write(tmp_path / "other.mp4", "libx264", frames=3)
    file = tmp_path / name
    file.write_text(playlist.format("other.mp4"))
    with pytest.raises(VideoError, match="not a readable video"):
        VideoFile(file)


def test_a_damaged_place_is_named_and_the_rest_can_be_read(tmp_path):
    file = write(tmp_path / "v.mkv", "libx264", gop=10)
    data = bytearray(file.read_bytes())
    half = len(data) // 2
    data[half : half + 2000] = bytes(2000)
    file.write_bytes(data)
    video = VideoFile(file)
    read, refused = [], []
    for i in range(len(video)):
        try:
            video.frame(i)
            read.append(i)
        except VideoError as error:
            assert f"frame {i}" in str(error)
            refused.append(i)
    assert 0 in read and len(read) >= 20


def test_the_cover_of_a_sound_file_is_no_video(tmp_path):
    import imageio_ffmpeg

    Image.fromarray(picture(5)).save(tmp_path / "cover.png")
    sound = ["-f", "lavfi", "-i", "sine=duration=0.2", "-i", str(tmp_path / "cover.png"), "-map", "0", "-map", "1"]
    file = tmp_path / "song.m4a"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *sound, "-c:v", "copy", "-disposition:v", "attached_pic", str(file)], check=True)
    with av.open(str(file)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(VideoError, match="song.m4a: holds no video stream"):
        VideoFile(file)


@pytest.mark.parametrize("kind", ["h264.mkv", "vp9.webm", "vp8.webm", "mpeg4.avi", "mjpeg.avi", "index-first.mp4"])
def test_of_a_file_that_breaks_off_what_is_there_is_read_exactly(tmp_path, kind):
    """Cut inside the data of the 46th frame of 70: frames are right, or refused by number, or known not to be there."""
    options = KINDS.get(kind, dict(codec="libx264", b_frames=2))
    file = write(tmp_path / kind, **options)
    if kind == "index-first.mp4":
        with av.open(str(file)) as source, av.open(str(tmp_path / "moved.mp4"), "w", options={"movflags": "faststart"}) as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
        file = tmp_path / "moved.mp4"
    with av.open(str(file)) as container:
        place = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[45] + 10
    file.write_bytes(file.read_bytes()[:place])
    video, read = VideoFile(file), 0
    for i in range(len(video)):
        try:
            assert number(video.frame(i)) == i
            read += 1
        except VideoError as error:
            assert f"frame {i}" in str(error)
    assert 30 <= read <= 46 and read <= len(video)


def test_a_folder_in_which_frames_are_missing_or_broken(tmp_path):
    for i in (0, 1, 3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i:05d}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    folder = open_video(tmp_path)
    assert len(folder) == 3 and number(folder.frame(2)) == 3  # the third there is: that one is missing only its episode can tell
    folder.check()
    (tmp_path / "00001.png").write_bytes((tmp_path / "00001.png").read_bytes()[:40])
    assert number(folder.frame(0)) == 0
    with pytest.raises(VideoError, match="frame 1: .*00001.png is not a readable image"):
        folder.frame(1)
    (tmp_path / "00000.png").unlink()
    with pytest.raises(VideoError, match="frame 0: .*00000.png is not a readable image"):
        folder.frame(0)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "9.jpg")
    (tmp_path / "9.jpg").write_bytes((tmp_path / "9.jpg").read_bytes()[:1500])
    jpeg = open_video(tmp_path)
    with pytest.raises(VideoError, match="frame 2: .*9.jpg is not a readable image"):
        jpeg.frame(2)
    (tmp_path / "00001.png").unlink()
    with pytest.raises(VideoError, match="9.jpg: the JPEG is cut short"):
        open_video(tmp_path).check()


def test_a_reference_is_opened_where_it_is_read(tmp_path):
    reference = VideoReference(tmp_path / "later.mp4")
    sent = pickle.loads(pickle.dumps(reference))
    write(tmp_path / "later.mp4", "libx264", frames=9)
    assert len(sent) == 9 and number(sent.frame(4)) == 4
    assert len(pickle.dumps(sent)) < 300
    with pytest.raises(VideoError, match="none.mp4"):
        len(VideoReference(tmp_path / "none.mp4"))


def test_open_video_tells_folders_from_files(tmp_path):
    file = write(tmp_path / "v.mp4", "libx264", frames=3)
    assert isinstance(open_video(file), VideoFile)
    (tmp_path / "frames").mkdir()
    Image.fromarray(picture(1)).save(tmp_path / "frames/0.png")
    assert isinstance(open_video(tmp_path / "frames"), ImageFolder)
    with pytest.raises(VideoError, match="nowhere"):
        open_video(tmp_path / "nowhere")
