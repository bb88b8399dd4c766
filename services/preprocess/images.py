"""Encoded image files to RGB pixels, and bicubic resizing."""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from common.errors import TooLarge, UnreadableImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000

# Pillow's readers parse hostile bytes in Python. Any of these may result from a broken file.
READER_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def decode(data: bytes | bytearray | memoryview, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of a PNG, JPEG, WEBP or GIF file (its first frame).

    They are uint8 [height, width, 3]. The size is checked in the header, before any pixel is
    decoded. As in the reference, the orientation noted in EXIF is applied, and transparency is
    dropped and not blended.

    Raises
    ------
    UnreadableImage
        if the bytes are not such an image, or the image is broken. Pillow's own text is not passed
        on, because it may contain memory addresses.
    TooLarge
        if the image has more than `max_pixels` pixels.
    """
    # Pillow warns of large and of slightly broken files. The limit here is lower, and broken files
    # that decode are welcome.
    with warnings.catch_warnings(action="ignore"):
        image = open_checked(data, max_pixels)
        try:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        except READER_ERRORS as e:
            raise UnreadableImage(
                f"the image is a broken or cut off {image.format}; send the whole file"
            ) from e


def open_checked(data: bytes | bytearray | memoryview, max_pixels: int) -> Image.Image:
    """Read the header of an image file and check its size."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as e:
        raise TooLarge(
            f"the image has more than the {max_pixels} pixels allowed; send it smaller"
        ) from e
    except READER_ERRORS as e:
        raise UnreadableImage(
            f"the bytes are not an image in one of the formats {', '.join(FORMATS)}"
        ) from e
    if image.width * image.height > max_pixels:
        raise TooLarge(
            f"the image has {image.width}x{image.height} pixels, at most {max_pixels} are allowed; "
            "send it smaller"
        )
    return image


def resize(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [height, width, 3] as Pillow does: bicubic, with antialiasing."""
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
