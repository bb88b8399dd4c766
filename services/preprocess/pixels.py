"""Pixels of every mode of Pillow to RGB: deep ones scaled, and what is transparent on white."""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile, PngImagePlugin, TiffImagePlugin

STRAIGHT = {"La": "LA", "RGBa": "RGBA"}
"""The modes whose colours are multiplied by their alpha, and those to which they are converted."""
DEEP_MODES = ("I", "F")
"""What the modes begin with that have one channel of more than eight bits."""
PNG_BITS = {"L;2": 2, "L;4": 4}
"""The bits of a sample of grey in a PNG that Pillow scales to eight."""
USUAL_WHITES = (255.0, 65535.0)
BAND_PIXELS = 2**20
"""About how many pixels are worked on at a time, so that memory does not hold another image."""
PHOTOMETRIC = 262
WHITE_IS_ZERO = 0


def raw_mode_of(image: Image.Image) -> str:
    """Return how an image is stored whose pixels are not decoded yet; empty if nobody knows."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return ""
    args = image.tile[0].args
    return str(args if isinstance(args, str) else args[0] if args else "")


def to_rgb(image: Image.Image, raw_mode: str = "") -> Image.Image:
    """Return a decoded image as RGB. It may be changed.

    Whatever is transparent shows white. A pixel of alpha 0 becomes white whatever colour it has, so
    nothing can be hidden there. `raw_mode` is what `raw_mode_of` returned before decoding.
    """
    key = image.info.get("transparency") if image.mode != "P" else None
    if image.mode.startswith(DEEP_MODES):
        return deep_to_rgb(image, raw_mode, key)
    if key is not None and isinstance(image, PngImagePlugin.PngImageFile):
        image.info["transparency"] = as_decoded(key, raw_mode)
    if image.has_transparency_data:
        return on_white(image)
    if image.mode == "LAB":
        return lab_to_rgb(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """Composite an image with any kind of transparency on white, in its own memory."""
    if image.mode in STRAIGHT:
        image = image.convert(STRAIGHT[image.mode])
    if image.mode not in STRAIGHT.values():
        image = image.convert("RGBA")
    hidden = ImageChops.invert(image.getchannel("A"))
    if hidden.getbbox():
        image.paste((255,) * len(image.getbands()), mask=hidden)
    return image.convert("RGB")


def as_decoded(key: int | tuple[int, ...], raw_mode: str) -> int | tuple[int, ...]:
    """Return the transparent colour of a PNG in the values of its decoded pixels."""
    if isinstance(key, tuple):
        return tuple(value >> 8 for value in key) if "16" in raw_mode else key
    bits = PNG_BITS.get(raw_mode, 8)
    return key * 255 // (2**bits - 1)


def lab_to_rgb(image: Image.Image) -> Image.Image:
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def deep_to_rgb(image: Image.Image, raw_mode: str, key: int | None) -> Image.Image:
    """Scale an image of one deep channel to RGB. Pixels of the value `key` are transparent."""
    white = white_of(image, raw_mode)
    is_inverted = (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO
    )
    grey = Image.new("L", image.size)
    for top, values in bands(image, raw_mode):
        scaled = np.clip(np.nan_to_num(values.astype(np.float32)) * (255.0 / white), 0, 255)
        levels = np.rint(255 - scaled if is_inverted else scaled).astype(np.uint8)
        if key is not None:
            levels[values == key] = 255
        grey.paste(Image.fromarray(levels), (0, top))
    return grey.convert("RGB")


def white_of(image: Image.Image, raw_mode: str) -> float:
    """Return the value that is white in an image of one deep channel.

    Floats and 32-bit integers do not say what range they use. It is the smallest usual one that
    holds all values, or ends at the largest value.
    """
    if image.mode.startswith("I;16"):
        return 4095.0 if raw_mode == "I;12" else 65535.0
    largest = max(
        float(np.max(values, initial=0, where=np.isfinite(values)))
        for _, values in bands(image, raw_mode)
    )
    usual = (1.0, *USUAL_WHITES) if image.mode == "F" else USUAL_WHITES
    return next((white for white in usual if largest <= white), largest)


def bands(image: Image.Image, raw_mode: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the values of an image in bands of rows, [rows, width], each with its first row."""
    rows = max(BAND_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        # Pillow has no unsigned integers of 32 bits.
        yield top, values.view(np.uint32) if raw_mode == "I;32N" else values
