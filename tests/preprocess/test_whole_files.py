"""Files that lack only their end are read, and those that lack pixels are refused."""

import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.errors import UnreadableImage
from services.preprocess.images import decode, open_image
from tests.preprocess.cases import encoded, noise

END = b"\xff\xd9"
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"progressive": True},
    {"restart_marker_rows": 1},
    {"subsampling": 0, "quality": 95},
)
PICTURE = Image.new("RGB", (120, 90), "white")
ImageDraw.Draw(PICTURE).text((5, 5), "Invoice 4711", fill="black")
PICTURE.paste(Image.fromarray(noise(45, 120)), (0, 45))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(open_image(data)))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("behind", [b"", b"\0" * 100], ids=["bare", "padded"])
def test_a_jpeg_that_lacks_only_its_end_is_read(
    mode: str, options: dict[str, Any], behind: bytes
) -> None:
    whole = encoded(PICTURE.convert(mode), "JPEG", **options)
    assert whole.endswith(END)
    for cut in (whole[:-2], whole[:-1]):
        assert np.array_equal(pixels(cut + behind), pixels(whole))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kept", [0.4, 0.6, 0.8, 0.95, 0.99])
def test_a_jpeg_that_is_cut_in_its_pixels_is_refused(
    mode: str, options: dict[str, Any], kept: float
) -> None:
    whole = encoded(PICTURE.convert(mode), "JPEG", **options)
    with pytest.raises(UnreadableImage, match="cut off"):
        pixels(whole[: int(len(whole) * kept)])


def test_a_progressive_jpeg_that_lacks_whole_scans_is_refused() -> None:
    whole = encoded(PICTURE, "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(UnreadableImage, match="cut off"):
        pixels(whole[:last])


@pytest.mark.parametrize("options", [KINDS[0], KINDS[2], KINDS[3]], ids=str)
def test_a_jpeg_whose_end_was_put_behind_half_of_its_pixels_is_refused(
    options: dict[str, Any],
) -> None:
    whole = encoded(PICTURE, "JPEG", **options)
    with pytest.raises(UnreadableImage, match="cut off"):
        pixels(whole[: len(whole) * 3 // 4] + END)


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7])
def test_a_progressive_jpeg_whose_end_was_put_behind_its_first_scans_is_refused(
    kept: float,
) -> None:
    whole = encoded(PICTURE, "JPEG", progressive=True)
    with pytest.raises(UnreadableImage, match="cut off"):
        pixels(whole[: int(kept * len(whole))] + END)


def test_a_jpeg_that_is_grey_is_read() -> None:
    assert (pixels(encoded(Image.new("RGB", (40, 40), (128,) * 3), "JPEG")) == 128).all()


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"tile_size": (64, 64)}], ids=str)
def test_a_jpeg2000_that_lacks_only_its_end_is_read(options: dict[str, Any]) -> None:
    whole = encoded(PICTURE, "JPEG2000", **options)
    for cut in (whole[:-2], whole[:-1]):
        assert np.array_equal(pixels(cut), pixels(whole))
    with pytest.raises(UnreadableImage, match="cut off"):
        pixels(whole[:-3])


def test_a_tiff_that_stores_fewer_rows_than_it_has_is_refused() -> None:
    whole = encoded(PICTURE, "TIFF")
    height = struct.pack("<HHI", 257, 4, 1)
    [start, end] = whole.split(height + struct.pack("<I", PICTURE.height))
    with pytest.raises(UnreadableImage, match="cut off"):
        pixels(start + height + struct.pack("<I", 2 * PICTURE.height) + end)


@pytest.mark.parametrize(("format", "end"), [("PNG", 12), ("GIF", 1)])
def test_other_formats_are_read_without_their_end(format: str, end: int) -> None:
    whole = encoded(PICTURE, format)
    assert np.array_equal(pixels(whole[:-end]), pixels(whole))
