"""Images of a request: data URIs, counts and sizes."""

import binascii
from collections.abc import Sequence

from common.errors import TooLarge, UnreadableImage
from common.wire import Buffer
from services.gateway.invalid_field import InvalidField

MAX_IMAGES = 32
MAX_IMAGE_BYTES = 20 * 10**6
MAX_HEAD_CHARS = 1000
"""The comma of a data URI must be among its first characters. Without one, the whole payload of
several megabytes would be searched."""

PIECE_CHARS = 2**20
"""How much base64 is decoded at a time. Base64 can be cut at multiples of four characters."""


def read_data_uri(url: str, field: str, index: int) -> bytes:
    """Return the encoded file in a base64 data URI.

    `field` is the path of the field that holds the URI, and `index` the image's index in the
    request; both appear in errors.

    Raises
    ------
    InvalidField
        if this is not a data URI in base64.
    UnreadableImage
        if the file is empty.
    TooLarge
        if the file is larger than MAX_IMAGE_BYTES.
    """
    scheme = url[:20].partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise InvalidField(field, "by-URL images are not enabled; send a data: URI")
    if scheme != "data":
        raise InvalidField(field, "only images inside the request are accepted; send a data: URI")
    head, comma, _ = url[:MAX_HEAD_CHARS].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidField(
            field, "a data: URI must have the form data:<type>;base64,<file in base64>"
        )
    if len(url) * 3 // 4 > MAX_IMAGE_BYTES + MAX_HEAD_CHARS:
        raise image_too_large(index)
    try:
        image = decode_base64(url, len(head) + 1)
    except ValueError:
        raise InvalidField(field, "the data after ;base64, is not valid base64") from None
    check_image(image, index)
    return image


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


def check_images(images: Sequence[Buffer]) -> None:
    """Raise TooLarge or UnreadableImage if the number or size of the files is out of bounds."""
    check_image_count(len(images))
    for index, image in enumerate(images):
        check_image(image, index)


def check_image_count(count: int) -> None:
    if count > MAX_IMAGES:
        raise TooLarge(f"more than {MAX_IMAGES} images in one request; send fewer", stage="gateway")


def check_image(image: Buffer, index: int) -> None:
    if not image:
        raise UnreadableImage(f"image {index} is empty", stage="gateway", item=index)
    if len(image) > MAX_IMAGE_BYTES:
        raise image_too_large(index)


def image_too_large(index: int) -> TooLarge:
    return TooLarge(
        f"image {index} is larger than {MAX_IMAGE_BYTES // 10**6} MB; send a smaller file",
        stage="gateway",
        item=index,
    )
