"""Encoded image files to RGB pixels, and resizing."""

import struct
import warnings
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import (
    ExifTags,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
)

from common.errors import ServingError, TooLarge, UnreadableImage
from common.wire import Buffer
from services.preprocess.image_formats import READABLE, refusal
from services.preprocess.pixels import raw_mode_of, to_rgb
from services.preprocess.whole_files import LACKS_END, load_jpeg, missing_end

MAX_PIXELS = 50_000_000
MAX_SCANNED_PIXELS = 50 * MAX_PIXELS
"""The most pixels that all scans of a JPEG may have together. Progressive files of common encoders
have about ten scans."""
START_OF_SCAN = b"\xff\xda"
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIDEWAYS = (5, 6, 7, 8)
"""The EXIF orientations that exchange height and width."""
TOO_COSTLY = "opening the image takes too much time or memory; send it smaller, or saved plainly"

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
    struct.error,
    zlib.error,
)


def open_image(
    data: Buffer, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = READABLE
) -> Image.Image:
    """Read the header of an image file in one of these formats, and check its size.

    Raises
    ------
    UnreadableImage
        if the bytes are not such an image. Pillow's own text is not passed on, because it may
        contain memory addresses.
    TooLarge
        if the image has more than `max_pixels` pixels.
    """
    whole = bytes(data)
    missing = missing_end(whole)
    with quiet():
        try:
            image = Image.open(BytesIO(whole + missing), formats=[name.upper() for name in formats])
        except Image.DecompressionBombError as e:
            raise TooLarge(
                f"the image has more than the {max_pixels} pixels allowed; send it smaller"
            ) from e
        except READER_ERRORS as e:
            raise UnreadableImage(refusal(whole, formats)) from e
        except MemoryError as e:
            raise UnreadableImage(TOO_COSTLY) from e
    if image.width * image.height > max_pixels:
        raise TooLarge(
            f"the image has {image.width}x{image.height} pixels, at most {max_pixels} are allowed; "
            "send it smaller"
        )
    check_scans(image, whole)
    if missing:
        image.info[LACKS_END] = True
    return image


def size_of(image: Image.Image) -> tuple[int, int]:
    """Return the height and width that `decode` will return, as far as the header knows them.

    The orientation may stand behind the pixels of a PNG. Then height and width are exchanged.
    Raises UnreadableImage if the Exif data are broken.
    """
    size = image.height, image.width
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return size  # Pillow has exchanged them
    if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info:
        return size  # getexif would decode the pixels to find it
    try:
        with quiet():
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    except READER_ERRORS as e:
        raise UnreadableImage(f"the Exif data of the {image.format} are broken") from e
    except MemoryError as e:
        raise UnreadableImage(TOO_COSTLY) from e
    return size[::-1] if is_turned else size


def decode(image: Image.Image) -> Image.Image:
    """Return the RGB pixels of an opened image, of its first frame or page.

    The orientation noted in EXIF is applied, deep pixels are scaled, and what is transparent is
    white. Raises UnreadableImage if the image is broken or incomplete.
    """
    try:
        with quiet():
            check_rows(image)
            raw_mode = raw_mode_of(image)
            frame = frame_of(image)
            if isinstance(image, JpegImagePlugin.JpegImageFile):
                load_jpeg(image)
            ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image, raw_mode)
            return on_canvas(rgb, frame) if frame else rgb
    except ServingError:
        raise
    except READER_ERRORS as e:
        # Decoders of Pillow report a lack of memory as a broken file.
        raise UnreadableImage(
            f"the image is a broken or cut off {image.format}, or takes too much memory; send the "
            "whole file, or a smaller one"
        ) from e
    except MemoryError as e:
        raise UnreadableImage(TOO_COSTLY) from e


def check_rows(image: Image.Image) -> None:
    """Refuse a TIFF whose header says that it has more rows than it stores."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or not image.tile:
        return
    *_, bottom = np.max([tile.extents for tile in image.tile if tile.extents], axis=0)
    if bottom < image._tile_size[1]:
        raise UnreadableImage("the image is a TIFF that is cut off; send the whole file")


def frame_of(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the part of a GIF that its first frame covers; None if that is all of it."""
    if not isinstance(image, GifImagePlugin.GifImageFile) or not image.tile:
        return None
    extents = image.tile[0].extents
    return None if extents == (0, 0, *image.size) else extents


def on_canvas(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Return an image of which only a box is left, on white."""
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image.crop(box), box[:2])
    return canvas


def quiet() -> AbstractContextManager[object]:
    """Ignore Pillow's warnings of large and of slightly broken files.

    The limit here is lower, and broken files that decode are welcome.
    """
    return warnings.catch_warnings(action="ignore")


def check_scans(image: Image.Image, data: bytes) -> None:
    """Refuse a JPEG that goes over its pixels far more often than any encoder makes it.

    A scan of some bytes costs a walk over all pixels, so a small file can cost minutes.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return
    num_scans = data.count(START_OF_SCAN)
    if num_scans * image.width * image.height > MAX_SCANNED_PIXELS:
        raise UnreadableImage(
            f"the JPEG of {image.width}x{image.height} pixels is stored in {num_scans} scans, "
            "which take too long to decode; save it with fewer scans"
        )


def resize(
    image: Image.Image,
    height: int,
    width: int,
    resampling: Literal["bicubic", "bilinear"] = "bicubic",
) -> np.ndarray:
    """Resize RGB pixels with antialiasing, to uint8 [height, width, 3]."""
    if image.size != (width, height):
        image = image.resize((width, height), RESAMPLING[resampling])
    return np.asarray(image)
