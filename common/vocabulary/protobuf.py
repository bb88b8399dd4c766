"""A reader of the wire format of Protocol Buffers, for files of which few fields are wanted."""

from collections.abc import Iterator

VARINT = 0
FIXED64 = 1
LENGTH_DELIMITED = 2
FIXED32 = 5


class BadProtobuf(ValueError):
    """The bytes are not a message of Protocol Buffers, or are cut off."""


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a message, in their order.

    A varint is an int. Every other value is bytes: a string, a nested message or a fixed-size
    number in little-endian order.
    """
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, at = read_varint(data, at)
            yield number, value
            continue
        if wire_type == LENGTH_DELIMITED:
            length, at = read_varint(data, at)
        elif wire_type in (FIXED32, FIXED64):
            length = 4 if wire_type == FIXED32 else 8
        else:
            raise BadProtobuf(f"a field of wire type {wire_type}")
        if at + length > len(data):
            raise BadProtobuf("it is cut off")
        yield number, data[at : at + length]
        at += length


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at byte `at`, and where the next value begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise BadProtobuf("it is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise BadProtobuf("a number of more than ten bytes")
