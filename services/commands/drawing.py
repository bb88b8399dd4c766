"""Draws the boxes of an answer on the image that they mark."""

import contextlib
import math
import os
import random
import secrets
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from proto.twinlens.inference.v1 import inference_pb2
from services.commands.client import ClientError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""The formats that can be written, by the ending of a file's name."""
COLORS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
"""Tableau's ten colors."""
LEAST_FONT_SIZE = 15
FONTS = ("NotoSansCJK-Regular.ttc", "SourceHanSansSC-Regular.otf", "wqy-zenhei.ttc", "simsun.ttc")
"""Fonts of the system that have Chinese characters, which the font of Pillow has not."""
TEXT_BACKGROUND = "black"


def check_drawing(path: Path) -> None:
    """Raise ClientError if no drawing can be written to this path."""
    if path.suffix.lower() not in FORMATS:
        raise ClientError(f"cannot draw to {path}: give a name that ends with {', '.join(FORMATS)}")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ClientError(f"cannot write {path}: name a file in a folder that can be written to")


def draw_boxes(
    files: list[bytes], boxes: Iterable[inference_pb2.Box], path: Path, seed: int = 0
) -> int:
    """Write the image that the boxes mark, with the boxes on it, and return their number.

    Parameters
    ----------
    files
        are the images of the request. The boxes of an answer mark one of them.
    path
        names the file to write. It appears as a whole, or not at all.
    seed
        decides the colors.

    Raises
    ------
    ClientError
        if there are no boxes, or the file cannot be written.
    """
    marked = list(boxes)
    if not marked:
        raise ClientError("the answer marks no boxes, so nothing was drawn")
    image = open_upright(files[marked[0].image])
    draw_on(image, marked, seed)
    write(image, path)
    return len(marked)


def open_upright(file: bytes) -> Image.Image:
    """Return the RGB pixels of an image file, turned as its Exif orientation says."""
    return ImageOps.exif_transpose(Image.open(BytesIO(file))).convert("RGB")


def draw_on(image: Image.Image, boxes: list[inference_pb2.Box], seed: int) -> None:
    """Draw boxes on an image. Each text begins a new color, which the boxes after it keep."""
    chosen = random.Random(seed)
    font_size = max(int(math.sqrt(image.width * image.height) / 30), LEAST_FONT_SIZE)
    font = font_for([box.ref for box in boxes], font_size)
    width = max(font_size // 4, 1)
    draw = ImageDraw.Draw(image)
    color = ""
    for box in boxes:
        if box.ref or not color:
            color = chosen.choice([other for other in COLORS if other != color])
        corners = corners_of(box)
        draw.line([*corners, corners[0]], fill=color, width=width, joint="curve")
        if box.ref:
            corner = min(x for x, _ in corners), min(y for _, y in corners)
            draw.rectangle(draw.textbbox(corner, box.ref, font), fill=TEXT_BACKGROUND)
            draw.text(corner, box.ref, fill=color, font=font)


def font_for(texts: Iterable[str], size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font for these texts: that of Pillow, or one of the system if it is needed."""
    if not all(text.isascii() for text in texts):
        for name in FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def corners_of(box: inference_pb2.Box) -> list[tuple[int, int]]:
    """Return the four corners of a box in the order of its outline."""
    if box.WhichOneof("shape") == "quad":
        return [(corner.x, corner.y) for corner in box.quad.corners]
    found = box.rectangle
    return [(found.x1, found.y1), (found.x2, found.y1), (found.x2, found.y2), (found.x1, found.y2)]


def write(image: Image.Image, path: Path) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        image.save(part, FORMATS[path.suffix.lower()])
        part.replace(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ClientError(f"cannot write {path}: {reason}") from error
    finally:
        part.unlink(missing_ok=True)
