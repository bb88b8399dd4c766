"""Videos of a request: their parts in chat messages, counts and sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from common.errors import TooLarge
from common.messages import MAX_FPS, MAX_FRAMES, MIN_FPS, Item
from common.pixel_bounds import NO_BOUNDS, PixelBounds
from common.wire import Buffer, Tensor
from services.gateway.images import check_file, check_item_count, read_data_uri
from services.gateway.invalid_field import InvalidField
from services.gateway.pixel_bounds import ABOUT_CACHES, BOUNDS, bounds_in, refuse_unknown

IN_VIDEO_URL = ("url", *ABOUT_CACHES)
IN_PART = ("type", "video", "video_url", "fps", *BOUNDS, *ABOUT_CACHES)


@dataclass(frozen=True, slots=True)
class Video:
    """A video as the client sent it."""

    data: Buffer
    """An encoded file, or the encoded images of all frames, one after the other."""
    frame_lengths: tuple[int, ...] = ()
    """The bytes of each frame; empty for a file."""
    fps: float | None = None
    """How many of the given frames make a second, or how many frames to take from each second of a
    file. None for the default."""
    bounds: PixelBounds = NO_BOUNDS
    """Those of its frames."""

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class BoundedImage:
    """An encoded image whose size in pixels the client bounds."""

    data: Buffer
    bounds: PixelBounds

    def __len__(self) -> int:
        return len(self.data)


Media: TypeAlias = Buffer | BoundedImage | Video
"""What a request brings besides text: an encoded image, or a video."""


def video_of(frames: Sequence[Buffer], fps: float | None, bounds: PixelBounds = NO_BOUNDS) -> Video:
    """Return a video of encoded images."""
    return Video(b"".join(frames), tuple(map(len, frames)), fps, bounds)


def bytes_of(media: Media) -> Buffer:
    """Return the encoded file, or all frames one after the other."""
    return media.data if isinstance(media, Video | BoundedImage) else media


def bounds_of(media: Media) -> PixelBounds:
    return media.bounds if isinstance(media, Video | BoundedImage) else NO_BOUNDS


def item_of(media: Media) -> Item:
    """Return an image or a video as it travels."""
    data = Tensor.of_bytes(bytes_of(media))
    bounds = bounds_of(media)
    if not isinstance(media, Video):
        return Item("image", data, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
    lengths = Tensor.of_int64(media.frame_lengths) if media.frame_lengths else None
    return Item("video", data, lengths, media.fps, bounds.min_pixels, bounds.max_pixels)


def read_video(part: dict[str, Any], path: str, before: Sequence[Media]) -> Video:
    """Return the video of a part of a message, which has one of the types video and video_url.

    `path` names the part in errors. `before` are the images and videos before it.

    Raises
    ------
    InvalidRequest
        if the part is malformed, or if there are too many items or frames, or too large ones.
    """
    refuse_unknown(part, IN_PART, path)
    if isinstance(part.get("video_url"), dict):
        refuse_unknown(part["video_url"], IN_VIDEO_URL, f"{path}.video_url")
    check_item_count(len(before) + 1)
    fps = read_fps(part.get("fps"), f"{path}.fps")
    bounds = bounds_in(part, BOUNDS, path)
    index = len(before)
    match part:
        case {"type": "video_url", "video_url": str(url) | {"url": str(url)}}:
            file = read_data_uri(url, f"{path}.video_url", index, "video")
            return Video(file, fps=fps, bounds=bounds)
        case {"type": "video", "video": str(url)}:
            file = read_data_uri(url, f"{path}.video", index, "video")
            return Video(file, fps=fps, bounds=bounds)
        case {"type": "video", "video": [str(), *_] as urls}:
            check_frame_count(len(urls), before)
            return video_of(read_frames(urls, f"{path}.video", index), fps, bounds)
        case {"type": "video_url"}:
            raise InvalidField(f"{path}.video_url", "must be an object with a url, or a string")
    raise InvalidField(
        f"{path}.video", "must be a data: URI of a file, or a list of data: URIs of frames"
    )


def read_frames(urls: list[Any], path: str, index: int) -> list[bytes]:
    frames = []
    for n, url in enumerate(urls):
        if not isinstance(url, str):
            raise InvalidField(f"{path}[{n}]", "must be a data: URI of an image")
        frames.append(read_data_uri(url, f"{path}[{n}]", index, "frame"))
    return frames


def read_fps(value: Any, field: str) -> float | None:
    """Return the frames per second that a client gives, if it gives them."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidField(field, "must be a number")
    if not MIN_FPS <= value <= MAX_FPS:
        raise InvalidField(field, f"must be a number from {MIN_FPS:g} to {MAX_FPS:g}")
    return float(value)


def check_media(media: Sequence[Media]) -> None:
    """Raise InvalidRequest if there are too many images, videos or frames, or too large ones."""
    check_item_count(len(media))
    for index, one in enumerate(media):
        if not isinstance(one, Video):
            check_file(bytes_of(one), index, "image")
        elif not one.frame_lengths:
            check_file(one.data, index, "video")
        else:
            check_frame_count(len(one.frame_lengths), media[:index])
            start = 0
            for length in one.frame_lengths:
                check_file(memoryview(one.data)[start : start + length], index, "frame")
                start += length


def check_frame_count(count: int, before: Sequence[Media]) -> None:
    """Raise TooLarge if a video has too many frames, together with those before it."""
    count += sum(len(one.frame_lengths) for one in before if isinstance(one, Video))
    if count > MAX_FRAMES:
        raise TooLarge(
            f"more than {MAX_FRAMES} frames of videos in one request; send fewer", stage="gateway"
        )
