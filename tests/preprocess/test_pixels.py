"""Pixels of every mode become RGB: transparent ones white, and deep ones scaled."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.preprocess.images import decode, open_image
from services.preprocess.videos import VideoForm, VideoLimits, open_clip
from tests.preprocess.cases import encoded, noise

WHITE = [255, 255, 255]
COLOUR = [10, 20, 30]
RGBA = np.array([[[*COLOUR, 0], [*COLOUR, 128], [*COLOUR, 255]]], np.uint8)
"""A hidden, a half transparent and an opaque pixel."""


def pixels(data: bytes) -> list[list[int]]:
    """Return the first row of a decoded file."""
    return np.asarray(decode(open_image(data)))[0].tolist()


def greys(data: bytes) -> list[int]:
    """Return the first row of a decoded file that has no colours."""
    found = np.array(pixels(data))
    assert (found == found[:, :1]).all()
    return found[:, 0].tolist()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(bits: int, kind: int, row: bytes, key: bytes, palette: bytes = b"") -> bytes:
    """A PNG of 2x1 pixels with a colour key, or with the alpha of a palette."""
    header = struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", palette) if palette else b"")
        + chunk(b"tRNS", key)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def tiff(values: bytes, width: int, **tags: tuple[int, ...]) -> bytes:
    """A plain TIFF with one row."""
    known = {"bits": (8,), "photometric": (1,), "extra": ()} | tags
    samples = len(known["bits"])
    fields: list[tuple[int, tuple[int, ...]]] = [
        (256, (width,)),
        (257, (1,)),
        (258, known["bits"]),
        (259, (1,)),
        (262, known["photometric"]),
        (273, (8,)),
        (277, (samples,)),
        (278, (1,)),
        (279, (len(values),)),
        (338, known["extra"]),
    ]
    fields = [(tag, numbers) for tag, numbers in fields if numbers]
    values += b"\0" * (len(values) % 2)
    table = 8 + len(values)
    behind = table + 2 + 12 * len(fields) + 4
    entries = b""
    rest = b""
    for tag, numbers in fields:
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(packed) > 4:
            entries += struct.pack("<HHII", tag, 3, len(numbers), behind + len(rest))
            rest += packed
        else:
            entries += struct.pack("<HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    ifd = struct.pack("<H", len(fields)) + entries + b"\0\0\0\0" + rest
    return b"II*\0" + struct.pack("<I", table) + values + ifd


def bmp_with_alpha() -> bytes:
    """The pixels of RGBA as a BMP whose header says that it has alpha."""
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 56, 3, 1, 1, 32, 3, 12, 0, 0, 0, 0)
    header += struct.pack("<4I", *masks)
    data = RGBA[0][:, [2, 1, 0, 3]].tobytes()
    return b"BM" + struct.pack("<IHHI", 70 + len(data), 0, 0, 70) + header + data


WITH_ALPHA: dict[str, bytes] = {
    "PNG": encoded(RGBA),
    "WebP": encoded(RGBA, "WEBP", lossless=True, exact=True),
    "TIFF": encoded(RGBA, "TIFF"),
    "compressed TIFF": encoded(RGBA, "TIFF", compression="tiff_lzw"),
    "AVIF": encoded(RGBA, "AVIF", quality=100, subsampling="4:4:4"),
    "JPEG 2000": encoded(RGBA, "JPEG2000"),
    "BMP": bmp_with_alpha(),
}


@pytest.mark.parametrize("kind", WITH_ALPHA)
def test_what_is_transparent_shows_white_in_every_format(kind: str) -> None:
    hidden, half, seen = pixels(WITH_ALPHA[kind])
    assert hidden == WHITE and half == [132, 137, 142] and seen == COLOUR


def test_grey_with_alpha_shows_white() -> None:
    image = Image.fromarray(np.array([[[7, 0], [7, 255]]], np.uint8))
    assert image.mode == "LA"
    for format in ("PNG", "TIFF", "JPEG2000"):
        assert greys(encoded(image, format)) == [255, 7]


def test_a_palette_with_alpha_shows_white() -> None:
    image = Image.frombytes("PA", (2, 1), bytes((1, 0, 1, 255)))
    image.putpalette([0, 0, 0, *COLOUR])
    assert pixels(encoded(image, "TIFF")) == [WHITE, COLOUR]


def test_a_gif_shows_white_where_it_is_transparent() -> None:
    image = Image.frombytes("P", (2, 1), bytes((0, 1)))
    image.putpalette([*COLOUR, 1, 2, 3])
    assert pixels(encoded(image, "GIF", transparency=0)) == [WHITE, [1, 2, 3]]


def test_a_gif_shows_white_where_its_first_frame_is_not() -> None:
    screen = struct.pack("<HHBBB", 3, 1, 0xF6, 0, 0) + bytes((10, 20, 30)) * 128
    frame = b"\x2c" + struct.pack("<HHHHB", 1, 0, 1, 1, 0) + b"\7\3\x80\1\x81\0;"
    assert pixels(b"GIF89a" + screen + frame) == [WHITE, COLOUR, WHITE]


PALETTE = bytes((*COLOUR, 100, 100, 100))


@pytest.mark.parametrize(
    ("file", "seen"),
    [
        (png(1, 0, bytes([0b01000000]), b"\0\0"), WHITE),
        (png(2, 0, bytes([0b01100000]), b"\0\1"), [170] * 3),
        (png(4, 0, bytes([0x35]), b"\0\3"), [85] * 3),
        (png(8, 0, bytes([7, 9]), b"\0\7"), [9] * 3),
        (png(16, 0, struct.pack(">2H", 1000, 257 * 9), struct.pack(">H", 1000)), [9] * 3),
        (png(8, 2, bytes([1, 2, 3, 4, 5, 6]), bytes([0, 1, 0, 2, 0, 3])), [4, 5, 6]),
        (
            png(
                16,
                2,
                struct.pack(">6H", 999, 888, 777, 1024, 5 << 8, 6 << 8),
                struct.pack(">3H", 999, 888, 777),
            ),
            [4, 5, 6],
        ),
        (png(1, 3, bytes([0b01000000]), b"\0", PALETTE), [100] * 3),
        (png(8, 3, bytes([0, 1]), b"\0\x80", PALETTE), [177] * 3),
    ],
    ids=["1", "2", "4", "8", "16", "RGB", "RGB 16", "palette of 1 bit", "palette"],
)
def test_the_transparent_colour_of_a_png_shows_white(file: bytes, seen: list[int]) -> None:
    assert pixels(file) == [WHITE, seen]


def test_colours_multiplied_by_their_alpha_are_not_blended_twice() -> None:
    row = bytes((0, 0, 0, 0, 50, 50, 50, 128, 9, 9, 9, 255))
    file = tiff(row, 3, bits=(8,) * 4, photometric=(2,), extra=(1,))
    hidden, half, seen = greys(file)
    assert (hidden, seen) == (255, 9) and half == pytest.approx(177, abs=1)
    grey = tiff(bytes((0, 0, 50, 128, 9, 255)), 3, bits=(8, 8), extra=(1,))
    assert greys(grey) == [255, half, 9]


def test_nothing_that_alpha_hides_changes_a_pixel() -> None:
    """Hidden pixels would bleed into others if an image were resized before."""
    hidden = np.dstack([noise(40, 40), np.zeros((40, 40), np.uint8)])
    shown = np.dstack([noise(40, 40, 1), np.full((40, 40), 255, np.uint8)])
    image = np.concatenate([hidden, shown])
    blank = image.copy()
    blank[:40, :, :3] = 0
    for format in ("PNG", "TIFF"):
        assert np.array_equal(
            decode(open_image(encoded(image, format))), decode(open_image(encoded(blank, format)))
        )


def test_frames_of_a_video_show_white_where_they_are_transparent() -> None:
    frame = encoded(RGBA)
    clip = open_clip(frame * 2, VideoForm((len(frame),) * 2), VideoLimits())
    assert [np.asarray(found)[0, 0].tolist() for found in clip.frames()] == [WHITE] * 2


SIXTEEN = np.array([[0, 257 * 77, 65535]], np.uint16)


@pytest.mark.parametrize(
    "file",
    [
        encoded(Image.fromarray(SIXTEEN)),
        encoded(Image.fromarray(SIXTEEN), "TIFF"),
        encoded(Image.fromarray(SIXTEEN), "TIFF", compression="tiff_lzw"),
        encoded(Image.frombytes("I;16B", (3, 1), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
        encoded(Image.fromarray(np.tile(SIXTEEN, (3, 1))), "JPEG2000"),
        tiff((65535 - SIXTEEN).tobytes(), 3, bits=(16,), photometric=(0,)),
        tiff(bytes((0x00, 0x04, 0xD4, 0xFF, 0xF0)), 3, bits=(12,)),
        tiff(SIXTEEN.astype(np.uint32).tobytes(), 3, bits=(32,)),
        tiff((SIXTEEN * np.uint32(65537)).tobytes(), 3, bits=(32,)),
    ],
    ids=["PNG", "TIFF", "LZW", "big-endian", "JPEG 2000", "white is 0", "12", "32", "all of 32"],
)
def test_deep_grey_is_scaled(file: bytes) -> None:
    assert greys(file) == [0, 77, 255]


def test_deep_colours_are_scaled() -> None:
    row = struct.pack("<6H", 0, 257 * 77, 65535, 257 * 9, 257 * 8, 257 * 7)
    assert pixels(tiff(row, 2, bits=(16,) * 3, photometric=(2,))) == [[0, 77, 255], [9, 8, 7]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1, np.nan], [0, 128, 255, 0]),
        ([0, 77, 255, -4], [0, 77, 255, 0]),
        ([0, 257 * 77, 65535, np.inf], [0, 77, 255, 255]),
        ([0, 50_000, 100_000, 1], [0, 128, 255, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_floats_are_scaled_by_the_range_that_they_use(
    values: list[float], expected: list[int]
) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert greys(encoded(image, "TIFF")) == expected


@pytest.mark.parametrize(
    ("mode", "white"), [("1", 1), ("CMYK", 0), ("YCbCr", (255, 128, 128)), ("LAB", (255, 128, 128))]
)
def test_other_colour_spaces_are_converted(mode: str, white: Any) -> None:
    found = pixels(encoded(Image.new(mode, (4, 4), white), "TIFF"))
    assert np.abs(np.array(found) - 255).max() <= 1


def test_large_deep_images_are_scaled_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.preprocess.pixels.BAND_PIXELS", 100)
    grey = noise(37, 21)[..., 0]
    found = decode(open_image(encoded(Image.fromarray(grey.astype(np.uint16) * 257))))
    assert np.array_equal(np.asarray(found)[..., 0], grey)
