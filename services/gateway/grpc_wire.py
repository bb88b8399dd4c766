"""The bounds of a gRPC request, checked on its bytes before objects are built from them.

The images and videos are taken out as views of the bytes. protobuf would copy them twice.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from common.errors import InvalidRequest, TooLarge
from common.pixel_bounds import PixelBounds
from common.wire import Buffer
from services.gateway.images import check_item_count
from services.gateway.invalid_field import BeyondContext, InvalidField
from services.gateway.limits import MAX_GUIDE_BYTES, MAX_MESSAGES, MAX_TOKEN_BYTES
from services.gateway.videos import (
    BoundedImage,
    Media,
    Video,
    bytes_of,
    check_frame_count,
    read_fps,
    video_of,
)

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
MAX_VARINT_BYTES = 10

DEFAULT_CONTEXT = 2**20
"""The context in tokens that bounds a request while no language group is ready."""
MAX_UNPACKED_IDS = 2**15
"""The most token ids that may come as a field each. Packed ids, the usual form, are one field."""
MAX_OTHER_BYTES = 64 * 1024
"""The most bytes of all fields but the prompt, the images, the videos and the guide."""

TEXT, TOKEN_IDS, IMAGES, GUIDE, VIDEOS, CHAT, RAW_TEXT = 3, 4, 5, 9, 11, 12, 13
"""Numbers of fields in GenerateRequest and GenerateStreamRequest."""
Nested = dict[int, "Nested"]
"""Numbers of the fields that are messages, and those of the fields in them that are messages."""
PART: Nested = {2: {}, 3: {}}
NESTED: Nested = {
    6: {9: {}},
    7: {7: {}},
    8: {},
    GUIDE: {4: {}},
    CHAT: {1: {2: PART, 3: {}}, 2: {}},
}
DATA, MIN_PIXELS, MAX_PIXELS = 1, 2, 3
"""Numbers of fields in Image."""
FRAMES, FILE, FPS = 1, 2, 3
"""Numbers of fields in Video."""
OTHER = 0
"""Stands for the numbers of all other fields, which are counted together."""
FIELD_NAMES = {
    1: "request_id",
    2: "model",
    TEXT: "text",
    7: "stopping",
    GUIDE: "guide",
    CHAT: "chat",
    RAW_TEXT: "raw_text",
}
"""Names of the fields that may be too long, for errors."""


class Field(NamedTuple):
    """A field of a message: its number, its type on the wire, and where its bytes are.

    `start` is where the field begins with its tag. `value` is where its value begins, after the
    length if it has one.
    """

    number: int
    wire_type: int
    start: int
    value: int
    end: int


class Split(NamedTuple):
    """A request without its images and videos, and these: the images first."""

    request: bytes
    media: tuple[Media, ...]


class NotAMessage(InvalidRequest):
    """The bytes of a request are not a message."""

    def __init__(self) -> None:
        super().__init__("the bytes sent are not a message of this method", "gateway")


class TooManyFields(TooLarge):
    """A request has more fields than it may have."""

    code = "TooLarge"

    def __init__(self, most: int) -> None:
        super().__init__(f"the message has more than {most} fields; send fewer", "gateway")


class Walker:
    """Walks over the fields of a message and of those in it, up to a number of fields in all."""

    def __init__(self, data: bytes, max_fields: int) -> None:
        self._data = data
        self._max_fields = max_fields
        self._num_fields = 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """Return the fields between two positions.

        Raises
        ------
        InvalidRequest
            if the bytes are not a message, or if there are too many fields.
        """
        position = start
        while position < end:
            self._num_fields += 1
            if self._num_fields > self._max_fields:
                raise TooManyFields(self._max_fields)
            tag, value = self._varint(position, end)
            number = tag >> 3
            wire_type = tag & 7
            if wire_type == BYTES:
                size, value = self._varint(value, end)
                after = value + size
            elif wire_type == VARINT:
                _, after = self._varint(value, end)
            else:
                # Groups do not exist in proto3.
                if wire_type not in FIXED_SIZES:
                    raise NotAMessage
                after = value + FIXED_SIZES[wire_type]
            if after > end or not 0 < number < 2**29:
                raise NotAMessage
            yield Field(number, wire_type, position, value, after)
            position = after

    def count(self, message: Field, nested: Nested) -> None:
        """Walk over the fields of a message and of those in it."""
        for field in self.fields(message.value, message.end):
            if field.number in nested and field.wire_type == BYTES:
                self.count(field, nested[field.number])

    def number(self, field: Field) -> int:
        """Return the value of a field that is a number."""
        return self._varint(field.value, field.end)[0]

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """Return the number at the position, and the position after it."""
        number = 0
        for shift, byte in enumerate(self._data[position : min(position + MAX_VARINT_BYTES, end)]):
            number |= (byte & 0x7F) << 7 * shift
            if byte < 0x80:
                return number, position + shift + 1
        raise NotAMessage


def split_media(data: bytes, max_model_len: int | None, max_fields: int | None = None) -> Split:
    """Return the request without its images and videos, and these.

    `max_model_len` is the context length in tokens, or None if it is not known. `max_fields` is a
    smaller number of fields than a request may have, to give up early.

    Raises
    ------
    InvalidRequest
        if the bytes are not a message, or if something in it is beyond its bound.
    TooManyFields
        if it has too many fields.
    """
    context = max_model_len or DEFAULT_CONTEXT
    walker = Walker(data, max_fields or MAX_MESSAGES + min(context, MAX_UNPACKED_IDS))
    view = memoryview(data)
    images: list[Media] = []
    videos: list[Video] = []
    kept: list[Buffer] = []
    bounds = Bounds(context)
    for field in walker.fields(0, len(data)):
        if field.number == IMAGES and field.wire_type == BYTES:
            check_item_count(len(images) + len(videos) + 1)
            images.append(read_image(walker, field, view))
            continue
        if field.number == VIDEOS and field.wire_type == BYTES:
            check_item_count(len(images) + len(videos) + 1)
            videos.append(read_video(walker, field, view, videos))
            continue
        if field.number == TOKEN_IDS and field.wire_type == BYTES:
            bounds.add_token_ids(walker.fields(field.value, field.end), data)
        else:
            bounds.add(field)
            if field.number in NESTED and field.wire_type == BYTES:
                walker.count(field, NESTED[field.number])
        kept.append(view[field.start : field.end])
    return Split(b"".join(kept), (*images, *videos))


def read_image(walker: Walker, image: Field, view: memoryview) -> Media:
    """Return an Image, of whose fields the last ones count.

    Raises
    ------
    InvalidRequest
        if its bounds are wrong.
    """
    data: Buffer = b""
    numbers: dict[int, int] = {}
    for field in walker.fields(image.value, image.end):
        if field.number == DATA and field.wire_type == BYTES:
            data = view[field.value : field.end]
        elif field.number in (MIN_PIXELS, MAX_PIXELS) and field.wire_type == VARINT:
            numbers[field.number] = walker.number(field)
    bounds = PixelBounds(numbers.get(MIN_PIXELS), numbers.get(MAX_PIXELS))
    if bounds.objection:
        raise InvalidField("images", bounds.objection)
    return BoundedImage(data, bounds) if bounds else data


def read_video(walker: Walker, video: Field, view: memoryview, before: Sequence[Video]) -> Video:
    """Return a Video, whose last field `file` and `fps` count.

    Raises
    ------
    InvalidRequest
        if it has neither frames nor a file, or both, or too many frames.
    """
    frames: list[Buffer] = []
    file: Buffer = b""
    fps = None
    for field in walker.fields(video.value, video.end):
        kind = field.number, field.wire_type
        if kind == (FRAMES, BYTES):
            check_frame_count(len(frames) + 1, before)
            frames.append(read_frame(walker, field, view))
        elif kind == (FILE, BYTES):
            file = view[field.value : field.end]
        elif kind == (FPS, FIXED64):
            [fps] = struct.unpack("<d", view[field.value : field.end])
    if bool(frames) == bool(file):
        raise InvalidField("videos", "send either the frames or the file of a video")
    fps = read_fps(fps, "videos.fps")
    return video_of(frames, fps) if frames else Video(file, fps=fps)


def read_frame(walker: Walker, frame: Field, view: memoryview) -> Buffer:
    """Return the bytes of a frame. All frames are resized alike, so none may have bounds."""
    image = read_image(walker, frame, view)
    if isinstance(image, BoundedImage):
        problem = "min_pixels and max_pixels are not supported in frames; leave them out"
        raise InvalidField("videos.frames", problem)
    return bytes_of(image)


class Bounds:
    """Counts what protobuf would unpack, over all occurrences of a field."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._num_token_ids = 0
        self._sizes = dict.fromkeys((TEXT, GUIDE, CHAT, RAW_TEXT, OTHER), 0)
        self._most = {
            TEXT: context * MAX_TOKEN_BYTES,
            GUIDE: MAX_GUIDE_BYTES,
            CHAT: context * MAX_TOKEN_BYTES + MAX_GUIDE_BYTES,
            RAW_TEXT: context * MAX_TOKEN_BYTES,
            OTHER: MAX_OTHER_BYTES,
        }

    def add(self, field: Field) -> None:
        """Count a field other than the token ids and the images."""
        kind = field.number if field.number in self._sizes else OTHER
        self._sizes[kind] += field.end - field.start
        if self._sizes[kind] > self._most[kind]:
            self._refuse(FIELD_NAMES.get(field.number, "other fields"), kind)

    def _refuse(self, name: str, kind: int) -> NoReturn:
        most = self._most[kind]
        if kind in (TEXT, CHAT, RAW_TEXT):
            problem = f"The {name} has more than {most} bytes, which do not fit: send less text."
            raise BeyondContext(name, self._context, problem)
        raise InvalidField(name, f"more than {most} bytes; send less")

    def add_token_ids(self, fields: Iterator[Field], data: bytes) -> None:
        """Count ids, packed or not. Each byte below 0x80 ends one."""
        for field in fields:
            size = field.end - field.value
            if field.wire_type == BYTES and size <= self._context * MAX_VARINT_BYTES:
                packed = np.frombuffer(data, np.uint8, size, field.value)
                size = int(np.count_nonzero(packed < 0x80))
            self._num_token_ids += size if field.wire_type == BYTES else 1
            if self._num_token_ids > self._context:
                problem = "Your token_ids are more than that: send fewer."
                raise BeyondContext("token_ids", self._context, problem)
