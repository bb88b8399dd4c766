"""Which image formats this process reads, and what a file is that it does not read."""

from collections.abc import Sequence

from PIL import (  # noqa: F401 - imported once here, so that no sandbox searches for its readers
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from common.config import BadSetting
from common.image_formats import IMAGE_FORMATS, listed_formats

AvifImagePlugin.DEFAULT_MAX_THREADS = 1
"""A sandbox has one thread."""
LIBRARIES = {"webp": "webp", "avif": "avif", "jpeg2000": "jpg_2000"}
"""The library in Pillow that a format needs and a build of Pillow may lack."""
READABLE = tuple(
    name for name in IMAGE_FORMATS if name not in LIBRARIES or features.check(LIBRARIES[name])
)
"""The formats that this Pillow can read."""

MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"\xff\xd8\xff", "jpeg"),
    (8, b"WEBP", "webp"),
    (0, b"GIF8", "gif"),
    (0, b"II*\0", "tiff"),
    (0, b"MM\0*", "tiff"),
    (0, b"II+\0", "tiff"),
    (0, b"MM\0+", "tiff"),
    (4, b"ftypavi", "avif"),
    (4, b"jP  \r\n\x87\n", "jpeg2000"),
    (0, b"\xff\x4f\xff\x51", "jpeg2000"),
    (4, b"ftyphe", "a HEIC file"),
    (4, b"ftypmif1", "a HEIC file"),
    (4, b"ftypmsf1", "a HEIC file"),
    (4, b"ftyp", "a video file"),
    (0, b"\x1a\x45\xdf\xa3", "a video file"),
    (8, b"AVI ", "a video file"),
    (8, b"WAVE", "a sound file"),
    (0, b"ID3", "a sound file"),
    (0, b"%PDF-", "a PDF"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\xff\x0a", "a JPEG XL file"),
    (4, b"JXL \r\n\x87\n", "a JPEG XL file"),
    (0, b"\0\0\1\0", "a Windows icon"),
    (0, b"v/1\1", "an OpenEXR file"),
    (0, b"qoif", "a QOI file"),
    (0, b"AT&TFORM", "a DjVu file"),
    (128, b"DICM", "a DICOM file"),
    (0, b"PK\3\4", "a ZIP or Office file"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"BM", "bmp"),
)
"""Offset and bytes by which a file is known, and what it is: a format of ours, or another thing."""
TEXTS = (("<svg", "an SVG"), ("<html", "an HTML page"), ("<!doctype html", "an HTML page"))
HEAD_BYTES = 1024


def formats_of(setting: str) -> tuple[str, ...]:
    """Return the formats that a setting allows, in our order; all that can be read if it is empty.

    Raises
    ------
    BadSetting
        if one of them cannot be read here.
    """
    wanted = listed_formats(setting) or READABLE
    if missing := [name for name in wanted if name not in READABLE]:
        raise BadSetting(
            f"--image-formats has {missing[0]}, which the installed Pillow cannot read: leave it "
            "out, or install a Pillow that has it"
        )
    return tuple(name for name in IMAGE_FORMATS if name in wanted)


def refusal(data: bytes, formats: Sequence[str]) -> str:
    """Return why a file could not be opened as one of these formats, and what to send instead."""
    what = content_of(data)
    advice = f"send an image in one of the formats {', '.join(formats)}"
    if what in formats:
        return f"this {what} file is broken, cut off, or of an unusual kind; send the whole file"
    if what in IMAGE_FORMATS:
        return f"this is a {what} file, which is not read here; {advice}"
    if what:
        return f"this is {what}, which is not read here; {advice}"
    return f"the bytes are not an image; {advice}"


def content_of(data: bytes) -> str:
    """Return what a file is, by its first bytes; empty if that is not known."""
    for offset, magic, name in MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return name
    if b"%PDF-" in data[:HEAD_BYTES]:
        return "a PDF"
    # A character may be cut at the end.
    head = data[:HEAD_BYTES].decode("utf-8", "replace").rstrip("\ufffd").lstrip("\ufeff").lower()
    for mark, name in TEXTS:
        if mark in head:
            return name
    return "text" if head and all(c.isprintable() or c.isspace() for c in head) else ""
