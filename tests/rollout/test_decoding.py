"""The pool of decoders: the right frames, in bounded memory, and videos that hang, crash or leak stopped at one process."""

import contextlib
import gc
import os
import random
import subprocess
import sys
import time

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from rollout.decoding import CrashingVideo, Decoders, SlowVideo
from rollout.frame_cache import FrameCache
from segmentation_service.video import VideoError, open_video

H, W, FRAMES = 36, 50, 12


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of PNGs and a file that is lossless: frame i of video v is `picture((v, i))`."""
    root = tmp_path_factory.mktemp("videos")
    (root / "0").mkdir()
    for i in range(FRAMES):
        Image.fromarray(picture((0, i))).save(root / f"0/{i:05d}.png")
    with av.open(str(root / "1.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = H, W, "bgr0"
        for i in range(FRAMES):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture((1, i)), format="rgb24")))
        out.mux(stream.encode())
    return [root / "0", root / "1.mkv"]


@pytest.fixture
def decoders():
    """Makes pools; they are closed when the test is over."""
    made = []

    def make(*arguments, **options):
        made.append(Decoders(*arguments, **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


@pytest.fixture
def hanging(tmp_path):
    """A folder whose second frame is a pipe into which nobody writes: to open it takes for ever."""
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    return tmp_path


def running():
    """The processes of pools that are alive."""
    found = []
    for p in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
            if p.status() != psutil.STATUS_ZOMBIE and "rollout.decoding" in " ".join(p.cmdline()):
                found.append(p)
    return found


def files(process):
    """How many handles it has of other things than sockets and the kernel's events."""
    kinds = []
    for handle in os.listdir(f"/proc/{process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of this listing
            kinds.append(os.readlink(f"/proc/{process.pid}/fd/{handle}"))
    return sum(not kind.startswith(("socket:", "anon_inode:")) for kind in kinds)


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_frames_are_those_of_the_video_and_kept_for_the_next_time(videos, decoders):
    pool = decoders(2, cache_bytes=2**20)
    asked = {v: pool.frames(path, [7, 0, 7, 3]) for v, path in enumerate(videos)}
    for v, future in asked.items():
        assert future.result().num_frames == FRAMES and list(future.result().by_number) == [0, 3, 7]
        for i, frame in future.result().by_number.items():
            np.testing.assert_array_equal(frame, picture((v, i)))
            assert not frame.flags.writeable  # the next who asks gets the same one
    (before, missed), again = (pool.cache.hits, pool.cache.misses), pool.frames(videos[0], [0, 7, 9]).result()
    assert (before, missed, pool.cache.hits, pool.cache.misses) == (0, 6, 2, 7)
    assert again.by_number[7] is asked[0].result().by_number[7]
    np.testing.assert_array_equal(again.by_number[9], picture((0, 9)))


def test_the_cache_is_bounded_by_bytes_and_the_least_used_goes_first():
    cache = FrameCache(3 * H * W * 3)
    for i in range(3):
        cache.put(i, picture(i))
    assert cache.get(0) is not None
    cache.put(3, picture(3))
    assert [i for i in range(4) if cache.get(i) is not None] == [0, 2, 3]
    cache.put(4, np.zeros((H, 2 * W, 3), np.uint8))
    assert len(cache) == 2 and cache.bytes == 3 * H * W * 3
    cache.put(5, np.zeros((H, 4 * W, 3), np.uint8))
    assert len(cache) == 2 and cache.get(5) is None


def test_broken_videos_are_refused_by_name_and_the_pool_goes_on(videos, decoders, tmp_path):
    pool = decoders(1)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/0.jpg").write_bytes(b"\xff\xd8 and then nothing")
    for path, numbers, message in [
        (tmp_path / "none.mp4", [0], "none.mp4: no such video file"),
        (tmp_path / "text.mp4", [0], "text.mp4: not a readable video"),
        (tmp_path / "folder", [0], "0.jpg is not a readable image"),
        (videos[1], [FRAMES], f"frame {FRAMES} was asked for"),
    ]:
        with pytest.raises(VideoError, match=message):
            pool.frames(path, numbers).result()
    for path, message in [(tmp_path / "text.mp4", "not a readable video"), (tmp_path / "folder", "0.jpg is not a readable image")]:
        with pytest.raises(VideoError, match=message):
            pool.check(path).result()
    assert len(running()) == 1
    pool.check(videos[0]).result()
    assert pool.frames(videos[0], []).result().num_frames == FRAMES


def test_a_video_that_hangs_costs_its_process_and_no_more(videos, decoders, hanging):
    pool = decoders(1)
    assert pool.frames(hanging, [0]).result().num_frames == 2
    (first,) = running()
    pool.seconds = 0.5
    with pytest.raises(SlowVideo, match="not decoded within 0.5 s"):
        pool.frames(hanging, [1]).result()
    pool.seconds = 60
    np.testing.assert_array_equal(pool.frames(videos[1], [5]).result().by_number[5], picture((1, 5)))
    assert first.pid not in [p.pid for p in running()]


def test_a_process_that_is_killed_is_replaced_once_for_each_request(videos, decoders, hanging):
    pool = decoders(1, seconds=60)
    pool.frames(videos[0], [0]).result()
    (first,) = running()
    first.kill()
    np.testing.assert_array_equal(pool.frames(videos[0], [1]).result().by_number[1], picture((0, 1)))
    future = pool.frames(hanging, [1])
    for _ in range(2):
        wait_for(lambda: [p for p in running() if p.pid != first.pid])
        (first,) = running()
        first.kill()
    with pytest.raises(CrashingVideo, match="broke down at it, twice"):
        future.result()
    assert pool.frames(videos[0], [2]).result().num_frames == FRAMES


def test_closing_ends_what_hangs(decoders, hanging):
    pool = decoders(1, seconds=600)
    future, waiting = pool.frames(hanging, [1]), pool.frames(hanging, [0])
    wait_for(running)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        future.result()
    assert waiting.cancelled()
    wait_for(lambda: not running())


def test_processes_end_with_their_owner(hanging):
    code = f"""
import os, sys, time
from rollout.decoding import Decoders
pool = Decoders(1, seconds=600)
pool.frames({str(hanging)!r}, [0]).result()
pool.frames({str(hanging)!r}, [1])
print(next(iter(pool._running))._process.pid, flush=True)
time.sleep(0.5)
os._exit(1)
"""
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    wait_for(lambda: not psutil.pid_exists(pid))


def test_random_reading_leaks_nothing(videos, decoders):
    """Handles and memory of this process and of the decoder's after 300 reads of both videos; docs/video.md has the long one."""
    pool, order = decoders(1, cache_bytes=4 * H * W * 3), random.Random(0)
    here = {path: open_video(path) for path in videos}

    def read(times):
        for _ in range(times):
            path, i = order.choice(videos), order.randrange(FRAMES)
            np.testing.assert_array_equal(pool.frames(path, [i]).result().by_number[i], here[path].frame(i))
        gc.collect()  # what other tests left open here is not closed meanwhile
        return [(p.num_fds(), files(p), p.memory_info().rss) for p in (psutil.Process(), *running())]

    read(100)
    (mine_before, decoders_before), (mine, its) = read(1), read(300)
    assert mine[0] < mine_before[0] + 50  # Ray of other tests may open some connections here meanwhile, but no file
    assert its[0] == decoders_before[0]
    for (_, files_before, memory_before), (_, files_after, memory) in ((mine_before, mine), (decoders_before, its)):
        assert files_after == files_before
        assert memory < memory_before + 2**24
