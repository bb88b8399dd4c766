"""The bytes of a connection: ZMTP 3.0 with the NULL mechanism, which ZeroMQ sockets speak, too.

    greeting (64 bytes)   READY command   message   message ...

A message is a sequence of frames: flags, size, body. All but the last frame have the flag MORE.

ZeroMQ itself cannot bound what a peer makes it hold. It has a limit for one frame, but none for the
frames of one message, and an application sees a message only once it is complete. So this process
reads the bytes itself, and checks each size before it reads what was announced.
"""

from collections.abc import Sequence

import numpy as np

from common.wire import MAX_FRAMES, MAX_HEADER_BYTES, Buffer

MORE = 0x01
LONG = 0x02
COMMAND = 0x04

GREETING_BYTES = 64
MAX_GREETING_FRAME_BYTES = 1024
"""The most a READY command may have: the kind of the socket, and an identity."""

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
VERSION = b"\x03\x00"
MECHANISM = b"NULL".ljust(20, b"\0")
GREETING = SIGNATURE + VERSION + MECHANISM + bytes(GREETING_BYTES - 32)


class ZmtpError(ValueError):
    """The bytes of a peer are not those of a connection, or are more than it may send."""


def introduction(kind: str, identity: str) -> bytes:
    """Return what a connection begins with; `kind` is DEALER or ROUTER."""
    body = b"\x05READY" + _property("Socket-Type", kind.encode())
    if identity:
        body += _property("Identity", identity.encode())
    flags = COMMAND | LONG if len(body) > 255 else COMMAND
    return GREETING + _frame_start(flags, len(body)) + body


def _property(name: str, value: bytes) -> bytes:
    return bytes([len(name)]) + name.encode() + len(value).to_bytes(4, "big") + value


def pack(frames: Sequence[Buffer]) -> list[Buffer]:
    """Return the buffers to write for a message. They are the frames, with a few bytes between."""
    packed: list[Buffer] = []
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        flags = MORE if index < last else 0
        packed.append(_frame_start(flags | LONG if len(frame) > 255 else flags, len(frame)))
        packed.append(frame)
    return packed


def _frame_start(flags: int, size: int) -> bytes:
    return bytes([flags]) + size.to_bytes(8 if flags & LONG else 1, "big")


class Decoder:
    """Turns the bytes of a peer into messages, and holds at most what its limits allow.

    `max_tensor_bytes` bounds the frames of one message after the first one, together. It is 0 at
    first, which leaves room for a Hello, and is raised once the peer is known.
    """

    def __init__(self) -> None:
        self.max_tensor_bytes = 0
        self.identity = ""
        """The ZeroMQ identity of the peer, if it has one."""
        self.is_ready = False
        """Whether the peer takes messages: a ZeroMQ socket does not before it has said so."""
        self._has_greeted = False
        self._unread = bytearray()
        self._frames: list[Buffer] = []
        self._num_tensor_bytes = 0
        self._flags = 0
        self._target: np.ndarray | None = None
        """The body of the frame that is incomplete."""
        self._num_filled = 0

    def missing(self) -> memoryview | None:
        """Return where the rest of the incomplete frame belongs, to be received right there."""
        if self._target is None or self._num_filled == len(self._target):
            return None
        return self._target.data[self._num_filled :]

    def note_filled(self, num_bytes: int) -> None:
        """Note that bytes were received into what `missing` returned."""
        self._num_filled += num_bytes

    def feed(self, data: Buffer) -> None:
        """Add bytes that were received otherwise. Nothing may be missing."""
        self._unread += data

    def next_message(self) -> list[Buffer] | None:
        """Return the frames of the next message, or None until more bytes arrive.

        Raises
        ------
        ZmtpError
            if the peer breaks the protocol, or announces more than it may send.
        """
        if not self._has_greeted and not self._read_greeting():
            return None
        while (frame := self._next_frame()) is not None:
            if self._flags & COMMAND:
                self._read_command(frame)
                continue
            self._frames.append(frame)
            if not self._flags & MORE:
                frames = self._frames
                self._frames = []
                self._num_tensor_bytes = 0
                return frames
        return None

    def _read_greeting(self) -> bool:
        greeting = self._unread[:GREETING_BYTES]
        if not SIGNATURE.startswith(greeting[:1]):
            raise ZmtpError("it does not speak the protocol of the members")
        if len(greeting) < GREETING_BYTES:
            return False
        if greeting[9] & 1 == 0 or greeting[10] < VERSION[0] or greeting[12:32] != MECHANISM:
            raise ZmtpError("it does not speak ZMTP 3 with the NULL mechanism")
        del self._unread[:GREETING_BYTES]
        self._has_greeted = True
        return True

    def _next_frame(self) -> Buffer | None:
        """Return the next frame, or None if it is incomplete."""
        if self._target is None:
            return self._read_frame()
        if self._num_filled < len(self._target):
            return None
        frame = self._target.data.toreadonly()
        self._target = None
        return frame

    def _read_frame(self) -> Buffer | None:
        """Return the next frame if all of it is there; otherwise begin it if its size is known."""
        unread = self._unread
        if len(unread) < 2:
            return None
        self._flags = unread[0]
        start = 9 if self._flags & LONG else 2
        if len(unread) < start:
            return None
        size = int.from_bytes(unread[1:start], "big")
        self._check(size)
        end = start + size
        if end > len(unread):
            # numpy does not fill the memory with zeros, so what never arrives takes none.
            self._target = np.empty(size, np.uint8)
            self._num_filled = len(unread) - start
            with memoryview(unread) as view:
                self._target[: self._num_filled] = view[start:]
            unread.clear()
            return None
        with memoryview(unread) as view:
            frame = bytes(view[start:end])
        del unread[:end]
        return frame

    def _check(self, size: int) -> None:
        """Check the size of the frame that begins."""
        if self._flags & ~(MORE | LONG | COMMAND):
            raise ZmtpError("a frame has unknown flags")
        if self._flags & COMMAND:
            if self.is_ready or self._flags & MORE or size > MAX_GREETING_FRAME_BYTES:
                raise ZmtpError("a command is unexpected or too long")
        elif not self.is_ready:
            raise ZmtpError("it sent a message before it was ready")
        elif not self._frames:
            if size > MAX_HEADER_BYTES:
                raise ZmtpError(f"a header of {size} bytes, at most {MAX_HEADER_BYTES} are allowed")
        else:
            self._num_tensor_bytes += size
            if self._num_tensor_bytes > self.max_tensor_bytes:
                raise ZmtpError(
                    f"a message with {self._num_tensor_bytes} bytes of tensors, at most "
                    f"{self.max_tensor_bytes} are allowed here"
                )
            if len(self._frames) >= MAX_FRAMES:
                raise ZmtpError(f"a message of more than {MAX_FRAMES} frames")

    def _read_command(self, body: Buffer) -> None:
        """Handle the READY command, which ends the greeting."""
        if not bytes(body[:6]) == b"\x05READY":
            raise ZmtpError("it did not get ready")
        self.is_ready = True
        self.identity = _identity_of(bytes(body[6:]))


def _identity_of(properties: bytes) -> str:
    while properties:
        name_end = 1 + properties[0]
        value_start = name_end + 4
        value_end = value_start + int.from_bytes(properties[name_end:value_start], "big")
        if value_end > len(properties):
            raise ZmtpError("its properties are cut off")
        if properties[1:name_end].lower() == b"identity":
            return properties[value_start:value_end].decode(errors="replace")
        properties = properties[value_end:]
    return ""
