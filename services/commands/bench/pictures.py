"""Synthetic images for load tests."""

from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image

CELL = 16
"""The image is smooth between random points that are this many pixels apart."""
JPEG_QUALITY = 85
PNG_COMPRESSION = 1


def pictures(draw: np.random.Generator, width: int, height: int, kind: str) -> Iterator[bytes]:
    """Yield image files of which no two are alike. `kind` is jpeg or png."""
    cells = (-(-height // CELL) + 1, -(-width // CELL) + 1, 3)
    while True:
        small = Image.fromarray(draw.integers(0, 256, cells, np.uint8))
        picture = small.resize((width, height), Image.Resampling.BILINEAR)
        file = BytesIO()
        options = {"quality": JPEG_QUALITY} if kind == "jpeg" else {}
        picture.save(file, kind, compress_level=PNG_COMPRESSION, **options)
        yield file.getvalue()
