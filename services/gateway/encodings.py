"""What the headers of a request say about the form of its body, and the decoding of bodies."""

import re
import zlib
from collections.abc import Iterator

from starlette.datastructures import Headers

from common.errors import InvalidRequest, UnsupportedType, shorten

SUPPORTED = "gzip, deflate or identity"
GZIP_WINDOW = 16 + zlib.MAX_WBITS
RAW_WINDOW = -zlib.MAX_WBITS
INPUT_BYTES = 64 * 1024
"""How much of an encoded body is decoded at a time. What zlib leaves of it is copied each time."""
OUTPUT_BYTES = 4 * 2**20
"""The most bytes that are decoded at a time."""
MAX_MEMBERS = 4096
"""The most gzip members of one body. Each takes some microseconds, however small it is."""

JSON_TYPE = re.compile(r"application/(json|[!#$&^_.+a-z0-9-]+\+json)")
CHARSETS = ("utf-8", "utf8", "us-ascii")
MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8, which some tools put before a text."""
WIDE_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32"} | {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""The byte order marks of other encodings of Unicode, longer ones first."""


def check_content_type(headers: Headers) -> None:
    """Raise UnsupportedType if the body is said to be something else than JSON in UTF-8.

    A web page can post a text or a form to any server without being asked for permission.
    """
    given = headers.get("content-type", "").strip()
    if not given:
        return
    kind, *parameters = (part.strip() for part in given.lower().split(";"))
    if not JSON_TYPE.fullmatch(kind):
        raise UnsupportedType(
            f"Content-Type: {shorten(kind)!r} is not read; send application/json", stage="gateway"
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        charset = value.strip().strip('"')
        if name.strip() == "charset" and charset not in CHARSETS:
            raise UnsupportedType(
                f"Content-Type: the charset {shorten(charset)!r} is not read; send UTF-8",
                stage="gateway",
            )


def encoding_of(headers: Headers) -> str:
    """Return how the body is encoded: gzip, deflate, or an empty text for not at all.

    Raises
    ------
    UnsupportedType
        if it is encoded in another way, or more than once.
    """
    given = ",".join(headers.getlist("content-encoding")).lower().split(",")
    names = [name.strip() for name in given if name.strip() not in ("", "identity")]
    if len(names) > 1:
        raise UnsupportedType(
            f"Content-Encoding: {shorten(', '.join(names))!r} is more than one encoding; send "
            f"{SUPPORTED}",
            stage="gateway",
        )
    name = names[0] if names else ""
    if name not in ("", "gzip", "x-gzip", "deflate"):
        raise UnsupportedType(
            f"Content-Encoding: {shorten(name)!r} is not read; send {SUPPORTED}", stage="gateway"
        )
    return name.removeprefix("x-")


def decoded(body: bytes | bytearray, encoding: str) -> Iterator[bytes]:
    """Yield the pieces of a body that is encoded with gzip or deflate, at most OUTPUT_BYTES each.

    Raises
    ------
    InvalidRequest
        if the body is broken, ends too early, or goes on behind its end.
    """
    encoded = memoryview(body)
    window = GZIP_WINDOW if encoding == "gzip" else deflate_window(body)
    decoder = zlib.decompressobj(window)
    num_members = 1
    try:
        for start in range(0, len(encoded), INPUT_BYTES):
            piece: bytes | memoryview = encoded[start : start + INPUT_BYTES]
            while piece:
                if decoder.eof:
                    num_members += 1
                    decoder = next_member(encoding, num_members)
                yield decoder.decompress(piece, OUTPUT_BYTES)
                piece = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        while not decoder.eof and (rest := decoder.decompress(b"", OUTPUT_BYTES)):
            yield rest
    except zlib.error:
        raise broken(encoding, "is broken") from None
    if not decoder.eof:
        raise broken(encoding, "ends too early")


def next_member(encoding: str, number: int) -> "zlib._Decompress":
    """Return what decodes the next member of a body; only gzip has more than one."""
    if encoding != "gzip":
        raise broken(encoding, "goes on behind its end")
    if number > MAX_MEMBERS:
        raise broken(encoding, f"has more than {MAX_MEMBERS} members")
    return zlib.decompressobj(GZIP_WINDOW)


def broken(encoding: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"Content-Encoding: the {encoding} body {problem}", stage="gateway")


def deflate_window(body: bytes | bytearray) -> int:
    """Return zlib's parameter for a body in "deflate".

    That is a zlib stream (RFC 9110), but some clients send what is inside one. Its first byte
    cannot be that of a zlib header, if its padding is zero.
    """
    header = int.from_bytes(body[:2], "big")
    is_zlib = len(body) > 1 and header >> 8 & 0x0F == 8 and header % 31 == 0
    return zlib.MAX_WBITS if is_zlib else RAW_WINDOW


def remove_mark(body: bytearray) -> None:
    """Remove the byte order mark of UTF-8, if there is one.

    Raises
    ------
    InvalidRequest
        if the body is in UTF-16 or UTF-32.
    """
    begin = body[:4]
    if begin.isascii() and b"\0" not in begin:
        return  # No mark is ASCII only, but nearly all bodies begin so.
    if body.startswith(MARK):
        del body[: len(MARK)]
        return
    name = next((name for mark, name in WIDE_MARKS.items() if body.startswith(mark)), "")
    if not name and b"\0" in body[:4]:
        name = "UTF-32" if body[:4].count(0) > 2 else "UTF-16"
    if name:
        raise InvalidRequest(f"the body is in {name}; send JSON in UTF-8", stage="gateway")
