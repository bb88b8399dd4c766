"""Encoded files of a request: data URIs, counts and sizes."""

import binascii
from typing import Literal

from common.errors import TooLarge, UnreadableImage
from common.wire import Buffer
from services.gateway.invalid_field import InvalidField

MAX_ITEMS = 32
"""The most images and videos of a request."""
MAX_IMAGE_BYTES = 20 * 10**6
FileKind = Literal["image", "frame", "video"]
MAX_FILE_BYTES: dict[FileKind, int] = {
    "image": MAX_IMAGE_BYTES,
    "frame": MAX_IMAGE_BYTES,
    "video": 48 * 10**6,
}
MAX_HEAD_CHARS = 1000
"""The comma of a data URI must be among its first characters. Without one, the whole payload of
several megabytes would be searched."""

PIECE_CHARS = 2**20
"""How much base64 is decoded at a time. Base64 can be cut at multiples of four characters."""


def read_data_uri(url: str, field: str, index: int, kind: FileKind = "image") -> bytes:
    """Return the encoded file in a base64 data URI.

    `field` is the path of the field that holds the URI, and `index` that of the image or video in
    the request; both appear in errors. The file is an image, a frame of a video, or a video.

    Raises
    ------
    InvalidField
        if this is not a data URI in base64.
    UnreadableImage
        if the file is empty.
    TooLarge
        if the file is larger than such a file may be.
    """
    scheme = url[:20].partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise InvalidField(field, f"by-URL {kind}s are not enabled; send a data: URI")
    if scheme != "data":
        raise InvalidField(field, f"only {kind}s inside the request are accepted; send a data: URI")
    head, comma, _ = url[:MAX_HEAD_CHARS].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidField(
            field, "a data: URI must have the form data:<type>;base64,<file in base64>"
        )
    if len(url) * 3 // 4 > MAX_FILE_BYTES[kind] + MAX_HEAD_CHARS:
        raise file_too_large(index, kind)
    try:
        file = decode_base64(url, len(head) + 1)
    except ValueError:
        raise InvalidField(field, "the data after ;base64, is not valid base64") from None
    check_file(file, index, kind)
    return file


def decode_base64(text: str, start: int) -> bytes:
    """Return the bytes that the text has in base64 from `start` on, or raise ValueError.

    The text is decoded in pieces, so that no call keeps other threads from running for long.
    """
    pieces = [
        binascii.a2b_base64(text[at : at + PIECE_CHARS], strict_mode=True)
        for at in range(start, len(text), PIECE_CHARS)
    ]
    if any(len(piece) != PIECE_CHARS // 4 * 3 for piece in pieces[:-1]):
        raise ValueError("there is padding before the end")
    return b"".join(pieces)


def check_item_count(count: int) -> None:
    if count > MAX_ITEMS:
        raise TooLarge(
            f"more than {MAX_ITEMS} images and videos in one request; send fewer", stage="gateway"
        )


def check_file(file: Buffer, index: int, kind: FileKind) -> None:
    """Raise UnreadableImage or TooLarge if a file is empty or too large."""
    if not file:
        raise UnreadableImage(f"{name_of(index, kind)} is empty", stage="gateway", item=index)
    if len(file) > MAX_FILE_BYTES[kind]:
        raise file_too_large(index, kind)


def file_too_large(index: int, kind: FileKind) -> TooLarge:
    most = MAX_FILE_BYTES[kind] // 10**6
    return TooLarge(
        f"{name_of(index, kind)} is larger than {most} MB; send a smaller file",
        stage="gateway",
        item=index,
    )


def name_of(index: int, kind: FileKind) -> str:
    """Return what a file is, for errors; `index` is that of its image or video."""
    return f"a frame of video {index}" if kind == "frame" else f"{kind} {index}"
