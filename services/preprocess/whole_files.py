"""Whether image files are whole.

Some programs leave out the end marker of a JPEG, and viewers do not need it. libjpeg does. If the
marker stands behind a picture that is cut off, libjpeg leaves the rest of the picture grey. It says
so only in a warning, which Pillow does not pass on.
"""

import re
from collections.abc import Iterator
from io import BytesIO

from PIL import Image, JpegImagePlugin

from common.errors import UnreadableImage
from services.preprocess.image_formats import content_of

END = b"\xff\xd9"
LACKS_END = "lacks_end"
"""What the `info` of an opened JPEG has if its end marker was added."""
NOISE = bytes((167 * n + 91) % 255 for n in range(2048))
"""No decoder needs this behind the last scan. In a scan that is cut off, it becomes pixels."""
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker in or behind compressed data, that is not a stuffed byte, a restart or a fill byte."""
BARE = (0x01, 0xD8)
"""The markers without a length, besides the end."""
FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
SCAN = 0xDA
GREYS = {127, 128}
BAND_ROWS = 256
CUT_OFF = "the image is a JPEG that is cut off; send the whole file"


def missing_end(data: bytes) -> bytes:
    """Return what a file lacks of its end marker; empty if it needs or lacks none."""
    match content_of(data):
        case "jpeg":
            has_end = data.endswith(END) or any(kind == END[1] for kind, _ in markers(data))
        case "jpeg2000":
            has_end = END in data  # no compressed data have these bytes
        case _:
            has_end = True
    if has_end:
        return b""
    return END[1:] if data.endswith(END[:1]) else END


def load_jpeg(image: JpegImagePlugin.JpegImageFile) -> None:
    """Decode an opened JPEG. Raises UnreadableImage if a part of the picture is missing."""
    assert isinstance(image.fp, BytesIO)
    data = image.fp.getvalue()
    lacks_end = LACKS_END in image.info
    image.load()
    if image.info.get("progressive") and not has_all_scans(data):
        raise UnreadableImage(CUT_OFF)
    if not lacks_end and not may_be_cut(image):
        return
    with Image.open(BytesIO(with_noise(data)), formats=["JPEG"]) as other:
        is_whole = are_equal(image, other)
    if not is_whole or (lacks_end and not has_all_scans(data)):
        raise UnreadableImage(CUT_OFF)


def may_be_cut(image: Image.Image) -> bool:
    """Whether the last pixel of a decoded JPEG has the grey of missing data."""
    last = image.getpixel((image.width - 1, image.height - 1))
    return set(last if isinstance(last, tuple) else (last,)) <= GREYS


def with_noise(data: bytes) -> bytes:
    """Return a JPEG that decodes to the same pixels if it is whole, and else to others."""
    end = next((at - len(END) for kind, at in markers(data) if kind == END[1]), len(data))
    return data[:end].rstrip(END[:1]) + NOISE + END


def has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG bring all bits of all its coefficients."""
    left: dict[tuple[int, int], int] = {}
    for kind, at in markers(data):
        if kind in FRAMES:
            ids = data[at + 8 : at + 8 + 3 * data[at + 7] : 3]
            left = {(component, place): 1 for component in ids for place in range(64)}
        elif kind == SCAN:
            behind_ids = at + 3 + 2 * data[at + 2]
            first, last, bits = data[behind_ids : behind_ids + 3]
            for component in data[at + 3 : behind_ids : 2]:
                left |= {(component, place): bits & 15 for place in range(first, last + 1)}
    return bool(left) and not any(left.values())


def markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the kind of each marker of a JPEG up to its end marker, and the offset behind it."""
    at = 2
    while found := MARKER.search(data, at):
        kind = data[found.start() + 1]
        at = found.end()
        yield kind, at
        if kind == END[1]:
            return
        if kind not in BARE:
            at += max(int.from_bytes(data[at : at + 2]), 2)


def are_equal(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images of one size have equal pixels."""
    for top in range(0, one.height, BAND_ROWS):  # whole copies would take much memory
        box = (0, top, one.width, min(top + BAND_ROWS, one.height))
        if one.crop(box).tobytes() != other.crop(box).tobytes():
            return False
    return True
