"""Bytes from anywhere become RGB pixels or one of our own errors."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.config import BadSetting
from common.errors import InvalidRequest, TooLarge, UnreadableImage
from common.image_formats import IMAGE_FORMATS, objection_to_image_formats
from services.preprocess import image_formats, images
from services.preprocess.image_formats import READABLE, formats_of
from services.preprocess.images import open_image, resize, size_of
from tests.preprocess.cases import encoded, noise

FORMATS = [name.upper() for name in IMAGE_FORMATS]


def decode(data: bytes | bytearray | memoryview, **limits: int) -> np.ndarray:
    """Return the decoded pixels, uint8 [height, width, 3]."""
    return np.asarray(images.decode(images.open_image(data, **limits)))


def png_with_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds hardly any pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "JPEG2000"])
def test_lossless_formats_keep_the_pixels(format: str) -> None:
    rgb = noise(20, 31)
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(decode(encoded(rgb, format, **options)), rgb)


def test_jpeg_decodes_as_in_pillow() -> None:
    data = encoded(noise(20, 31), "JPEG", quality=90)
    found = decode(data)
    assert found.shape == (20, 31, 3) and found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(Image.open(BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind: type) -> None:
    assert decode(kind(encoded(noise(3, 5)))).shape == (3, 5, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_opaque_png_becomes_what_pillow_converts_it_to(mode: str) -> None:
    image = Image.fromarray(noise(9, 8)[..., 0]).convert(mode)
    assert image.mode == mode
    data = encoded(image)
    found = decode(data)
    assert found.shape == (9, 8, 3) and found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(Image.open(BytesIO(data)).convert("RGB")))


def test_cmyk_jpeg_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = decode(data)[4, 4].tolist()
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "AVIF", "PNG"])
def test_of_an_animation_and_of_pages_the_first_is_decoded(format: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("#ff0000", "#0000ff")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], quality=100)
    assert Image.open(BytesIO(data)).n_frames == 2
    assert np.abs(decode(data).astype(int) - (255, 0, 0)).max() <= 3


def test_a_photo_taken_sideways_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(noise(8, 16), "JPEG", exif=exif)).shape == (16, 8, 3)


def test_one_pixel_is_an_image() -> None:
    assert decode(encoded(noise(1, 1))).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "the bytes are not an image; send"),
        (b"\0\1\2\3", "the bytes are not an image; send"),
        (b"hello", "this is text,"),
        ("été".encode() * 999, "this is text,"),
        (b"<?xml version='1.0'?>\n<svg></svg>", "this is an SVG,"),
        (b"<!DOCTYPE html>", "this is an HTML page,"),
        (b"junk %PDF-1.7", "this is a PDF,"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "this is a HEIC file,"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "this is a HEIC file,"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "this is a video file,"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "this is a PostScript file,"),
        (b"\x89PNG\r\n\x1a\n", "this png file is broken, cut off, or of an unusual kind"),
        (b"\xff\xd8\xff", "this jpeg file is broken, cut off, or of an unusual kind"),
        (b"II*\0\0\0\0\0", "this tiff file is broken, cut off, or of an unusual kind"),
    ],
)
def test_what_is_not_an_image_is_unreadable_and_named(data: bytes, what: str) -> None:
    with pytest.raises(UnreadableImage) as caught:
        decode(data)
    assert caught.value.message.startswith(what)
    assert "jpeg2000" in caught.value.message or "send the whole file" in caught.value.message


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_read_only_if_it_is_on(format: str) -> None:
    data = encoded(noise(16, 16), format)
    assert decode(data).shape == (16, 16, 3)
    others = tuple(name for name in IMAGE_FORMATS if name != format.lower())
    with pytest.raises(UnreadableImage) as caught:
        open_image(data, formats=others)
    assert caught.value.message == (
        f"this is a {format.lower()} file, which is not read here; send an image in one of the "
        f"formats {', '.join(others)}"
    )


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA"])
def test_other_formats_are_unreadable(format: str) -> None:
    with pytest.raises(UnreadableImage, match="send an image in one of the formats png, jpeg"):
        decode(encoded(noise(16, 16), format))


def test_a_setting_lists_formats_in_any_order() -> None:
    assert formats_of(" JPEG,png") == ("png", "jpeg")
    assert formats_of("") == READABLE
    assert "png,jpeg" in objection_to_image_formats("png,psd")


def test_a_format_that_this_pillow_lacks_is_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_formats, "READABLE", ("png", "jpeg"))
    with pytest.raises(BadSetting, match="has avif, which the installed Pillow cannot read"):
        formats_of("png,avif")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_cut_off_file_is_unreadable_and_no_library_text_gets_out(
    format: str, kept: float
) -> None:
    data = encoded(noise(64, 64), format)
    with pytest.raises(UnreadableImage) as caught:
        decode(data[: int(len(data) * kept)])
    assert "cut off" in caught.value.message
    assert "0x" not in caught.value.message


@pytest.mark.parametrize(
    ("width", "height"),
    [(20_000, 20_000), (10_000, 10_000), (7_100, 7_100), (2**31 - 1, 2**31 - 1)],
)
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(TooLarge, match="50000000"):
        decode(png_with_header(width, height))


def test_the_limit_of_pixels_is_inclusive() -> None:
    data = encoded(noise(10, 20))
    assert decode(data, max_pixels=200).shape == (10, 20, 3)
    with pytest.raises(TooLarge, match="20x10 pixels, at most 199"):
        decode(data, max_pixels=199)


SEEDS = [encoded(noise(16, 16), format) for format in FORMATS]


@settings(max_examples=300)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_decode_or_raise_our_own_error(
    seed: bytes, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(seed)
    for at, value in damage:
        data[at % len(data)] = value
    try:
        found = decode(data)
    except InvalidRequest as e:
        assert isinstance(e, UnreadableImage | TooLarge)
    else:
        assert found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8


def test_resize_is_pillows_bicubic_and_keeps_an_image_of_the_right_size() -> None:
    rgb = noise(50, 70)
    found = resize(Image.fromarray(rgb), 28, 56)
    assert np.array_equal(
        found, np.asarray(Image.fromarray(rgb).resize((56, 28), Image.Resampling.BICUBIC))
    )
    assert np.array_equal(resize(Image.fromarray(rgb), 50, 70), rgb)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_knows_the_size_of_an_upright_image(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(8, 16), format, exif=exif)
    assert size_of(open_image(data)) == decode(data).shape[:2]


def test_the_size_is_known_without_decoding_a_pixel() -> None:
    assert size_of(open_image(png_with_header(5000, 9000))) == (9000, 5000)


def scanned_jpeg(side: int, num_scans: int) -> bytes:
    """A JPEG whose header declares a size, and that has this number of empty scans."""
    data = encoded(noise(16, 16), "JPEG")
    frame = data.index(b"\xff\xc0")
    sides = struct.pack(">HH", side, side)
    scans = data.index(b"\xff\xda")
    return data[: frame + 5] + sides + data[frame + 9 : scans] + b"\xff\xda\0\2" * num_scans


def test_a_jpeg_with_more_scans_than_any_encoder_makes_is_refused_by_its_header() -> None:
    assert open_image(scanned_jpeg(7000, 51)).size == (7000, 7000)
    with pytest.raises(UnreadableImage, match="7000x7000 pixels is stored in 300 scans"):
        open_image(scanned_jpeg(7000, 300))
    assert open_image(scanned_jpeg(500, 300)).size == (500, 500)
