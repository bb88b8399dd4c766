"""Videos of a request: their parts in chat messages, counts and sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from common.errors import TooLarge
from common.messages import MAX_FPS, MAX_FRAMES, MIN_FPS, Item
from common.wire import Buffer, Tensor
from services.gateway.images import check_file, check_item_count, read_data_uri
from services.gateway.invalid_field import InvalidField
from services.gateway.unsupported import IN_VIDEO, refuse_unsupported


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

    def __len__(self) -> int:
        return len(self.data)


Media: TypeAlias = Buffer | Video
"""What a request brings besides text: an encoded image, or a video."""


def video_of(frames: Sequence[Buffer], fps: float | None) -> Video:
    """Return a video of encoded images."""
    return Video(b"".join(frames), tuple(map(len, frames)), fps)


def item_of(media: Media) -> Item:
    """Return an image or a video as it travels."""
    if not isinstance(media, Video):
        return Item("image", Tensor.of_bytes(media))
    data = Tensor.of_bytes(media.data)
    if not media.frame_lengths:
        return Item("video", data, fps=media.fps)
    return Item("video", data, Tensor.of_int64(media.frame_lengths), media.fps)


def read_video(part: dict[str, Any], path: str, before: Sequence[Media]) -> Video:
    """Return the video of a part of a message, which has one of the types video and video_url.

    `path` names the part in errors. `before` are the images and videos before it.

    Raises
    ------
    InvalidRequest
        if the part is malformed, or if there are too many items or frames, or too large ones.
    """
    refuse_unsupported(part, IN_VIDEO, f"{path}.")
    check_item_count(len(before) + 1)
    fps = read_fps(part.get("fps"), f"{path}.fps")
    index = len(before)
    match part:
        case {"type": "video_url", "video_url": str(url) | {"url": str(url)}}:
            return Video(read_data_uri(url, f"{path}.video_url", index, "video"), fps=fps)
        case {"type": "video", "video": str(url)}:
            return Video(read_data_uri(url, f"{path}.video", index, "video"), fps=fps)
        case {"type": "video", "video": [str(), *_] as urls}:
            check_frame_count(len(urls), before)
            return video_of(read_frames(urls, f"{path}.video", index), fps)
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
            check_file(one, index, "image")
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
