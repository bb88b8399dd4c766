"""Makes video files. Importing it skips the tests of a module where PyAV is not installed."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'twinlens[video]'")


def encoded_video(
    frames: Sequence[np.ndarray],
    rate: int = 8,
    container: str = "mp4",
    codec: str = "mpeg4",
    has_sound: bool = False,
) -> bytes:
    """Return a file of frames, uint8 [height, width, 3], `rate` of them a second."""
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.thread_count = 1
        stream.height, stream.width, _ = frames[0].shape
        sound = output.add_stream("aac", rate=16000, layout="mono") if has_sound else None
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")):
                output.mux(packet)
        for packet in stream.encode(None):
            output.mux(packet)
        if sound:
            add_silence(output, sound)
    return file.getvalue()


def sound() -> bytes:
    """Return an MP4 file without a picture."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        add_silence(output, output.add_stream("aac", rate=16000, layout="mono"))
    return file.getvalue()


def add_silence(output: Any, stream: Any) -> None:
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    silence.sample_rate = 16000
    for packet in [*stream.encode(silence), *stream.encode(None)]:
        output.mux(packet)


def grey_frames(count: int, height: int = 56, width: int = 84) -> list[np.ndarray]:
    """Return frames that become lighter: frame i has the value 10 * i."""
    return [np.full((height, width, 3), min(10 * i, 255), np.uint8) for i in range(count)]
