"""Base64 is read in every form that clients send, and what is wrong with it is named."""

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import TooLarge
from services.gateway import base64_text, images
from services.gateway.images import read_data_uri
from services.gateway.invalid_field import InvalidField

LONG = bytes(range(256)) * 3


def forms(data: bytes) -> dict[str, str]:
    """Return the same bytes in each form of base64 that is read."""
    usual = base64.b64encode(data).decode()
    escaped = usual.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    return {
        "usual": usual,
        "without padding": usual.rstrip("="),
        "URL-safe": base64.urlsafe_b64encode(data).decode(),
        "mixed": usual.replace("+", "-"),
        "lines": base64.encodebytes(data).decode(),
        "CRLF": base64.encodebytes(data).decode().replace("\n", "\r\n"),
        "indented": "\n  ".join(["", *re.findall(".{1,60}", usual)]),
        "escaped": escaped,
        "escaped lines": escaped + "%0A%0d",
    }


@given(st.binary(max_size=300), st.integers(2, 40))
def test_every_form_is_read_however_it_is_cut_into_pieces(data: bytes, quarter: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base64_text, "PIECE_CHARS", 4 * quarter)
        for form, text in forms(data).items():
            assert base64_text.decode(text) == data, form


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ab*d", "character 3, '*', does not occur in base64"),
        ("abé", "character 3, 'é', does not occur in base64"),
        ("ab\x00d", r"character 3, '\x00', does not occur in base64"),
        ("abcd%zz", "character 5, '%', does not occur in base64"),
        ("ab==cdef", "character 3 is padding, but more follows"),
        ("ab=c", "character 3 is padding, but more follows"),
        ("abcde", "its length is not that of base64; a part of it is missing"),
        ("====", "its length is not that of base64; a part of it is missing"),
    ],
)
def test_what_is_wrong_is_named(text: str, fault: str) -> None:
    for pieces in (4, 2**20):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as caught:
            patch.setattr(base64_text, "PIECE_CHARS", pieces)
            base64_text.decode("##" + text, 2)
        assert str(caught.value) == fault


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "data:;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:image/png;charset=utf-8;base64,",
        "data:image/png;base64;charset=utf-8,",
        "data:image/png;name=a,b.png;base64,",
        " data:image/png; base64,",
    ],
)
def test_every_form_of_a_data_uri_is_read(head: str) -> None:
    assert read_data_uri(head + "aGk=", "url", 0) == b"hi"


@pytest.mark.parametrize(
    "url", ["data:image/png,aGk=", "data:base64,aGk=", "data:image/png;base64", "data:"]
)
def test_other_data_uris_are_refused(url: str) -> None:
    with pytest.raises(InvalidField, match="must have the form data:<type>;base64"):
        read_data_uri(url, "url", 0)


@pytest.mark.parametrize("form", forms(LONG))
def test_a_file_may_be_as_large_as_the_limit_in_every_form(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    url = f"data:;base64,{forms(LONG)[form]}"
    monkeypatch.setattr(images, "MAX_HEAD_CHARS", 40)
    monkeypatch.setitem(images.MAX_FILE_BYTES, "image", len(LONG))
    assert read_data_uri(url, "url", 0) == LONG
    monkeypatch.setitem(images.MAX_FILE_BYTES, "image", len(LONG) - 1)
    with pytest.raises(TooLarge):
        read_data_uri(url, "url", 0)
