"""Base64 as clients write it."""

import binascii
import re

PIECE_CHARS = 2**20
"""How much is decoded at a time, so that no call keeps other threads from running for long. Base64
can be cut at multiples of four characters."""
WHITE_SPACE = b" \t\n\v\f\r"
TO_STANDARD = bytes.maketrans(b"-_", b"+/")
ESCAPED = {"2b": "+", "2f": "/", "2d": "-", "5f": "_", "3d": "=", "20": "", "0a": "", "0d": ""}
"""What stands for an escape of a URI. Only characters that occur in base64 are escaped in it."""
ESCAPES = [
    (f"%{digits}".encode(), character.encode())
    for lower, character in ESCAPED.items()
    for digits in {lower, lower.upper()}
]
FOREIGN = re.compile(rf"%(?!{'|'.join(ESCAPED)})|[^A-Za-z0-9+/=_% \t\n\v\f\r-]", re.IGNORECASE)


def decode(text: str, start: int = 0) -> bytes:
    """Return the bytes that a text has in base64 from `start` on.

    White space, missing padding, the URL-safe alphabet and escapes of URIs are accepted.

    Raises
    ------
    ValueError
        if the text is not base64. The message says what is wrong, and where: the first character
        from `start` on is character 1.
    """
    try:
        return decode_usual(text, start)
    except ValueError:
        pass
    try:
        return decode_any(text, start)
    except ValueError:
        raise ValueError(fault_of(text, start)) from None


def decode_usual(text: str, start: int) -> bytes:
    """Return the bytes of base64 in the form that most clients send, or raise ValueError."""
    pieces = [
        binascii.a2b_base64(text[at : at + PIECE_CHARS], strict_mode=True)
        for at in range(start, len(text), PIECE_CHARS)
    ]
    if any(len(piece) != PIECE_CHARS // 4 * 3 for piece in pieces[:-1]):
        raise ValueError("there is padding before the end")
    return b"".join(pieces)


def decode_any(text: str, start: int) -> bytes:
    """Return the bytes of base64 in any form that is accepted, or raise ValueError."""
    pieces: list[bytes] = []
    rest = b""
    at = start
    while at < len(text):
        end = at + PIECE_CHARS
        while "%" in text[end - 2 : end]:  # no escape is cut
            end += 1
        data = rest + plain(text[at:end])
        whole = len(data) // 4 * 4
        if pieces and len(pieces[-1]) % 3 and data:
            raise ValueError("there is padding before the end")
        pieces.append(binascii.a2b_base64(data[:whole], strict_mode=True))
        rest = data[whole:]
        at = end
    unpadded = rest.rstrip(b"=")
    pieces.append(binascii.a2b_base64(unpadded + b"=" * (-len(unpadded) % 4), strict_mode=True))
    if rest and (not unpadded or any(len(piece) % 3 for piece in pieces[:-1])):
        raise ValueError("there is padding before the end")
    return b"".join(pieces)


def plain(piece: str) -> bytes:
    """Return base64 in the usual alphabet, without white space and escapes."""
    data = piece.encode("ascii")
    if b"%" in data:
        for escape, character in ESCAPES:
            data = data.replace(escape, character)
    return data.translate(TO_STANDARD, WHITE_SPACE)


def fault_of(text: str, start: int) -> str:
    """Return why a text is not base64."""
    for at in range(start, len(text), PIECE_CHARS):
        # Two characters more, so that no escape is cut.
        found = FOREIGN.search(text, at, at + PIECE_CHARS + 2)
        if found and found.start() < at + PIECE_CHARS:
            place = found.start() - start + 1
            return f"character {place}, {text[found.start()]!r}, does not occur in base64"
    place = text.find("=", start)
    if place >= 0 and text[place:].strip("= \t\n\v\f\r"):
        return f"character {place - start + 1} is padding, but more follows"
    return "its length is not that of base64; a part of it is missing"
