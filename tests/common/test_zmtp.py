"""The bytes of a connection are read as messages, and everything a peer announces is bounded."""

import resource
from collections.abc import Iterable

import pytest

from common.wire import MAX_FRAMES, MAX_HEADER_BYTES, Buffer
from common.zmtp import (
    COMMAND,
    GREETING,
    LONG,
    MORE,
    Decoder,
    ZmtpError,
    introduction,
    pack,
)

MESSAGES = [
    [b"header"],
    [b""],
    [b"header", b"x" * 255, b"", b"y" * 256],
    [b"h" * MAX_HEADER_BYTES, b"z" * 300_000],
]


def packed(frames: list[bytes]) -> bytes:
    return b"".join(pack(frames))


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def start(flags: int, size: int) -> bytes:
    return bytes([flags | LONG]) + size.to_bytes(8, "big")


def decoder(max_tensor_bytes: int = 2**20) -> Decoder:
    """Return a decoder whose peer is ready."""
    ready = Decoder()
    ready.max_tensor_bytes = max_tensor_bytes
    ready.feed(introduction("DEALER", "p"))
    assert ready.next_message() is None and ready.is_ready
    return ready


def receive(reader: Decoder, pieces: Iterable[bytes]) -> list[list[bytes]]:
    """Return the messages in bytes that arrive in these pieces, some of them where they belong."""
    found: list[list[Buffer]] = []
    for each in pieces:
        piece = each
        while piece:
            missing = reader.missing()
            if missing is None:
                reader.feed(piece)
                piece = b""
            else:
                num = min(len(missing), len(piece))
                missing[:num] = piece[:num]
                reader.note_filled(num)
                piece = piece[num:]
            while (frames := reader.next_message()) is not None:
                found.append(frames)
    return [[bytes(frame) for frame in frames] for frames in found]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000, 10**6])
def test_messages_are_the_same_in_pieces_of_any_size(size: int) -> None:
    stream = introduction("DEALER", "größe") + b"".join(map(packed, MESSAGES))
    reader = Decoder()
    reader.max_tensor_bytes = 2**20
    pieces = (stream[at : at + size] for at in range(0, len(stream), size))
    assert receive(reader, pieces) == MESSAGES
    assert reader.identity == "größe"


def test_a_large_frame_that_is_announced_takes_no_memory_until_it_arrives() -> None:
    reader = decoder(max_tensor_bytes=2**33)
    before = resident_bytes()
    receive(reader, [b"\x01\x01h" + start(0, 2**32), b"x" * 2**20])
    missing = reader.missing()
    assert missing is not None and len(missing) == 2**32 - 2**20
    assert resident_bytes() - before < 2**26


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"\x01\x01h" + start(0, 1001), "1001 bytes of tensors"),
        (b"\x01\x01h" + (start(MORE, 400) + bytes(400)) * 3, "1200 bytes of tensors"),
        (start(MORE, MAX_HEADER_BYTES + 1), "a header of"),
        (start(0, 2**63), "a header of"),
        (b"\x01\x00" * (MAX_FRAMES + 1), "frames"),
        (bytes([COMMAND, 5]) + b"\x04PING", "a command"),
        (bytes([0x08, 0]), "unknown flags"),
    ],
)
def test_what_a_peer_announces_is_checked_before_it_arrives(stream: bytes, reason: str) -> None:
    with pytest.raises(ZmtpError, match=reason):
        receive(decoder(max_tensor_bytes=1000), [stream])


def test_the_tensors_of_one_message_do_not_count_for_the_next() -> None:
    message = [b"h", bytes(1000)]
    assert receive(decoder(max_tensor_bytes=1000), [packed(message) * 3]) == [message] * 3


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" + bytes(63),
        GREETING.replace(b"NULL", b"PLAI"),
        GREETING + packed([b"a message"]),
        GREETING + bytes([COMMAND, 6]) + b"\x05ERROR",
        GREETING + start(COMMAND, 2**30),
        GREETING + bytes([COMMAND | MORE, 6]) + b"\x05READY",
        GREETING + bytes([COMMAND, 8]) + b"\x05READY\x09I",
        GREETING + bytes([COMMAND, 13]) + b"\x05READY\x01I\xff\xff\xff\xff\x00",
    ],
)
def test_a_greeting_that_is_none_is_refused(stream: bytes) -> None:
    with pytest.raises(ZmtpError):
        receive(Decoder(), [stream])


def test_a_stranger_can_send_no_tensor() -> None:
    reader = Decoder()
    with pytest.raises(ZmtpError, match="at most 0 are allowed"):
        receive(reader, [introduction("DEALER", ""), packed([b"h", b"x"])])
