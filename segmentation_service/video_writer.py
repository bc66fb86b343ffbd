"""Frames into an mp4 that every player shows: H.264, 4:2:0, at a constant rate; frame i of the file is the i-th frame given."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

BT709 = 1
"""As ITU-T H.273 numbers primaries, transfer and matrix alike. Said in the file, since players guess by the picture's size."""


def write_video(file: str | Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Encodes RGB uint8 (H, W, 3) frames, one at a time, under a temporary name that is then renamed; nothing is left where it fails.

    4:2:0 needs even sides: an odd one is lengthened by repeating the last row or column. Raises ValueError where there is no frame, or
    one of another size or type than the first.
    """
    import av

    file, rate = Path(file), Fraction(fps).limit_denominator(1001)  # so that 29.97 is 30000/1001 again
    part, stream, hw = file.with_name(f".{file.name}.{os.getpid()}"), None, None
    try:
        with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as out:
            for i, frame_HW3 in enumerate(frames):
                if frame_HW3.dtype != np.uint8 or frame_HW3.ndim != 3 or frame_HW3.shape[2] != 3 or (hw and frame_HW3.shape[:2] != hw):
                    raise ValueError(f"frame {i} is {frame_HW3.dtype} {frame_HW3.shape}; a video has RGB uint8 frames (H, W, 3) of one size" + (f", here {hw}" if hw else ""))
                if stream is None:
                    hw = frame_HW3.shape[:2]
                    stream = out.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "veryfast"})
                    stream.height, stream.width, stream.pix_fmt = hw[0] + hw[0] % 2, hw[1] + hw[1] % 2, "yuv420p"
                    coder = stream.codec_context
                    coder.color_primaries = coder.color_trc = coder.colorspace = BT709
                even_HW3 = np.pad(frame_HW3, ((0, hw[0] % 2), (0, hw[1] % 2), (0, 0)), mode="edge") if hw[0] % 2 or hw[1] % 2 else frame_HW3
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even_HW3), format="rgb24").reformat(format="yuv420p", dst_colorspace=BT709)
                picture.pts, picture.time_base = i, 1 / rate
                out.mux(stream.encode(picture))
            if stream is None:
                raise ValueError(f"{file}: there is no frame to write")
            out.mux(stream.encode())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file
