"""The alphabet in which byte-level BPE writes bytes as printable characters."""


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character stands for.

    Printable Latin-1 characters stand for themselves. The characters from U+0100 on stand for the
    other bytes, in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


BYTE_OF = byte_level_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def bytes_of(token: str) -> bytes:
    """Return the bytes that a token stands for.

    A token with a character outside the alphabet, as added tokens may have, stands for its own
    text.
    """
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def token_of(data: bytes) -> str:
    """Return the token that stands for these bytes."""
    return "".join([CHARACTER_OF[byte] for byte in data])
