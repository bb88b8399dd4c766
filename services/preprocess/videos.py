"""Videos: frames that come as encoded images, and files that PyAV decodes.

Only sandboxes open files. A decoder of hostile bytes may hang, crash or take all memory there.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import msgspec
import numpy as np
from PIL import Image

from common.errors import InvalidRequest, ServingError, TooLarge, UnreadableImage
from common.messages import MAX_FPS, MIN_FPS
from common.wire import Buffer
from services.preprocess import images
from services.preprocess.image_formats import READABLE

DEFAULT_FPS = 2.0
DEFAULT_MAX_FRAMES = 128
LEAST_FRAMES = 4
"""A file that has so many frames gives at least these, however short it is."""
FRAME_FACTOR = 2
"""As many frames as are taken of a file are a multiple of this."""
MAX_PIXELS = 2**30
"""The most pixels that all frames of a video may have together before they are resized."""
MAX_PACKETS = 200_000
SKIPPED_PER_IMAGE = 10
"""As many frames that are decoded and not taken cost about as much as an image."""
CONTAINERS = {"mov": "MP4", "matroska": "WebM"}
"""The formats that are read, by the name of their reader in FFmpeg. It has readers that open other
files or addresses, which a video may name, so it is never asked to guess."""
CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "av1", "mpeg4"))
DECODERS = (*sorted(CODECS), "libdav1d")
"""The decoders of these codecs. Others are not even tried on a file, for instance on its sound."""
EBML = b"\x1a\x45\xdf\xa3"
"""The first bytes of a WebM file."""
TOO_COSTLY = (
    "decoding the video takes too much time or memory; send it shorter, smaller, or as frames"
)
NO_PYAV = (
    "this server reads no video files, because PyAV is not installed: send the frames as a part of "
    "the type video, or install twinlens[video] where preprocess runs"
)


class VideoForm(msgspec.Struct, frozen=True):
    """What belongs to the bytes of a video."""

    frame_lengths: tuple[int, ...] = ()
    """The bytes of each frame, if it comes as encoded images; empty for a file."""
    fps: float | None = None
    """How many of the given frames make a second, or how many frames to take from each second of a
    file. None for the default."""


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """How many frames of a video are taken."""

    fps: float = DEFAULT_FPS
    """Frames that are taken from a second of a file, unless the request says otherwise."""
    max_frames: int = DEFAULT_MAX_FRAMES


class Clip(Protocol):
    """An opened video: the frames that are taken of it."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames, by the first one."""
        ...

    @property
    def num_frames(self) -> int: ...

    @property
    def num_images(self) -> int:
        """How many images of this size cost about as much to prepare."""
        ...

    @property
    def fps(self) -> float:
        """How many of the frames are a second of the video."""
        ...

    def frames(self) -> Iterator[Image.Image]:
        """Decode the frames, which are RGB.

        Raises UnreadableImage if one is broken, and TooLarge if they have too many pixels.
        """
        ...


def open_clip(
    data: Buffer, form: VideoForm, limits: VideoLimits, formats: Sequence[str] = READABLE
) -> Clip:
    """Read the headers of a video: of all its frames, which have these formats, or of its file.

    Raises
    ------
    UnreadableImage
        if the bytes are not a video.
    TooLarge
        if it has too many frames or pixels.
    InvalidRequest
        if files cannot be read here.
    """
    if form.frame_lengths:
        fps = form.fps or DEFAULT_FPS
        return ListedFrames(data, form.frame_lengths, fps, limits, formats)
    return VideoFile(data, form.fps or limits.fps, limits)


class ListedFrames:
    """Frames that come as encoded images. Implements `Clip`."""

    def __init__(
        self,
        data: Buffer,
        lengths: Sequence[int],
        fps: float,
        limits: VideoLimits,
        formats: Sequence[str],
    ) -> None:
        if len(lengths) > limits.max_frames:
            raise TooLarge(
                f"it has {len(lengths)} frames, at most {limits.max_frames} are taken; send fewer"
            )
        self.fps = fps
        self._images = []
        start = 0
        num_pixels = 0
        for index, length in enumerate(lengths):
            with naming_frame(index):
                frame = memoryview(data)[start : start + length]
                opened = images.open_image(frame, formats=formats)
            num_pixels += opened.width * opened.height
            check_pixels(num_pixels)
            self._images.append(opened)
            start += length
        self.size = images.size_of(self._images[0])

    @property
    def num_frames(self) -> int:
        return len(self._images)

    @property
    def num_images(self) -> int:
        return len(self._images)

    def frames(self) -> Iterator[Image.Image]:
        for index, opened in enumerate(self._images):
            with naming_frame(index):
                yield images.decode(opened)


class VideoFile:
    """An MP4 or WebM file. Implements `Clip`."""

    def __init__(self, data: Buffer, fps: float, limits: VideoLimits) -> None:
        try:
            # Optional, and only sandboxes that read a file need it.
            from av import FFmpegError
            from av import open as open_container
        except ModuleNotFoundError as e:
            raise InvalidRequest(NO_PYAV) from e
        self._error = FFmpegError
        whole = bytes(data)
        name = container_of(whole)
        with self._reading():
            self._container: Any = open_container(
                BytesIO(whole), format=name, options={"codec_whitelist": ",".join(DECODERS)}
            )
            streams: list[Any] = [*self._container.streams.video]
            if not streams:
                raise UnreadableImage("the file has no video, only other streams")
            self._stream = streams[0]
            self._check_stream()
            self._stream.codec_context.thread_count = 1
            times = self._packet_times()
            first = next(map(picture_of, self._decoded()), None)
        if first is None:
            raise UnreadableImage("no frame of the file can be decoded; send the whole file")
        self.size = first.height, first.width
        rate = frame_rate(times)
        self._wanted = sampled(len(times), rate, fps, limits.max_frames)
        self.num_frames = len(self._wanted)
        self.num_images = self.num_frames + len(times) // SKIPPED_PER_IMAGE
        self.fps = min(max(self.num_frames / len(times) * rate, MIN_FPS), MAX_FPS)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what is wrong with the file into errors that name no internals."""
        try:
            yield
        except ServingError:
            raise
        except (self._error, ValueError, LookupError, EOFError) as e:
            raise UnreadableImage(
                "the file is a broken or cut off video; send the whole file"
            ) from e
        except MemoryError as e:
            raise UnreadableImage(TOO_COSTLY) from e

    def _check_stream(self) -> None:
        context = self._stream.codec_context
        name = "an unknown codec" if context is None else context.codec.canonical_name
        if name not in CODECS:
            raise UnreadableImage(f"{name} is not decoded here; use {', '.join(sorted(CODECS))}")
        if context.width * context.height > images.MAX_PIXELS:
            raise TooLarge(
                f"the video has {context.width}x{context.height} pixels, at most "
                f"{images.MAX_PIXELS} are allowed; send it smaller"
            )

    def _packet_times(self) -> list[float]:
        """Return the time of each frame in seconds, in rising order, without decoding any."""
        times = []
        base = float(self._stream.time_base)
        for packet in self._container.demux(self._stream):
            if packet.size and packet.pts is not None:
                times.append(base * packet.pts)
            if len(times) > MAX_PACKETS:
                raise TooLarge(f"the video has more than {MAX_PACKETS} frames; send a shorter one")
        if not times:
            raise UnreadableImage("the file has no frames; send the whole file")
        return sorted(times)

    def _decoded(self) -> Iterator[Any]:
        """Decode all frames from the first one on, without converting them to RGB."""
        self._container.seek(0, stream=self._stream, backward=True, any_frame=False)
        for frame in self._container.decode(self._stream):
            if frame.width * frame.height > images.MAX_PIXELS:
                raise TooLarge(f"a frame has {frame.width}x{frame.height} pixels; send it smaller")
            yield frame

    def frames(self) -> Iterator[Image.Image]:
        """A file with fewer frames than it announces repeats the last one."""
        wanted = deque(self._wanted)
        num_pixels = 0
        frame = None
        with self._reading():
            for index, frame in enumerate(self._decoded()):
                if index == wanted[0]:
                    wanted.popleft()
                    num_pixels += frame.width * frame.height
                    check_pixels(num_pixels)
                    yield picture_of(frame)
                if not wanted:
                    return
            for _ in wanted:
                yield picture_of(frame)


def picture_of(frame: Any) -> Image.Image:
    """Return a frame of PyAV as RGB pixels, upright as its file says."""
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation % 360 else picture


def sampled(total: int, rate: float, fps: float, max_frames: int) -> list[int]:
    """Return which of the `total` frames of a file are taken, as the reference's utilities do.

    They are an even number, if there are two, and stand evenly from the first to the last frame.
    """
    most = min(max_frames, total) // FRAME_FACTOR * FRAME_FACTOR
    count = min(max(total / rate * fps, LEAST_FRAMES), most)
    count = max(int(count) // FRAME_FACTOR * FRAME_FACTOR, 1)
    return np.round(np.linspace(0, total - 1, count)).astype(int).tolist()


def frame_rate(times: Sequence[float]) -> float:
    """Return the frames per second of frames at these times."""
    seconds = times[-1] - times[0]
    if len(times) < 2 or not math.isfinite(seconds) or seconds <= 0:
        return DEFAULT_FPS
    return min(max((len(times) - 1) / seconds, MIN_FPS), MAX_FPS)


def container_of(data: bytes) -> str:
    """Return the name of the reader of a file, by its first bytes."""
    if data[4:8] == b"ftyp":
        return "mov"
    if data[:4] == EBML:
        return "matroska"
    raise UnreadableImage(
        f"the bytes are not a video in one of the formats {', '.join(CONTAINERS.values())}"
    )


@contextmanager
def naming_frame(index: int) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as e:
        raise type(e)(f"frame {index}: {e.message}") from e


def check_pixels(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise TooLarge(
            f"its frames have more than {MAX_PIXELS} pixels together; send fewer or smaller ones"
        )
