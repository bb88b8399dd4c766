"""Encoded files of a request: data URIs, counts and sizes."""

import re
from typing import Literal

from common.errors import TooLarge, UnreadableImage
from common.wire import Buffer
from services.gateway import base64_text
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
BASE64_MARK = re.compile(r";\s*base64\s*(;[^,]*)?,", re.IGNORECASE)
"""What stands before the payload of a data URI. Other parameters may stand around it."""


def read_data_uri(url: str, field: str, index: int, kind: FileKind = "image") -> bytes:
    """Return the encoded file in a base64 data URI.

    `field` is the path of the field that holds the URI, and `index` that of the image or video in
    the request; both appear in errors. The file is an image, a frame of a video, or a video. What
    media type the URI declares does not matter: the file says what it is.

    Raises
    ------
    InvalidField
        if this is not a data URI in base64.
    UnreadableImage
        if the file is empty.
    TooLarge
        if the file is larger than such a file may be.
    """
    url = url.lstrip()
    scheme = url[:20].partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise InvalidField(field, f"by-URL {kind}s are not enabled; send a data: URI")
    if scheme != "data":
        raise InvalidField(field, f"only {kind}s inside the request are accepted; send a data: URI")
    start = start_of_base64(url)
    if not start:
        raise InvalidField(
            field, "a data: URI must have the form data:<type>;base64,<file in base64>"
        )
    if num_bytes_of(url) > MAX_FILE_BYTES[kind] + MAX_HEAD_CHARS:
        raise file_too_large(index, kind)
    try:
        file = base64_text.decode(url, start)
    except ValueError as e:
        problem = f"the {kind} after ;base64, is not valid base64: {e}"
        raise InvalidField(field, problem) from None
    check_file(file, index, kind)
    return file


def start_of_base64(url: str) -> int:
    """Return where the payload of a data URI in base64 begins; 0 if it is not one."""
    found = BASE64_MARK.search(url, 0, MAX_HEAD_CHARS)
    return found.end() if found else 0


def num_bytes_of(url: str) -> int:
    """Return about how many bytes a data URI holds, whatever line ends and escapes it has."""
    return (len(url) - url.count("\n") - url.count("\r") - 2 * url.count("%")) * 3 // 4


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
