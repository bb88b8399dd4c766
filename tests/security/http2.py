"""A gRPC call written by hand, for what a gRPC library does not send."""

import asyncio

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = len(payload).to_bytes(3, "big")
    return size + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """Return a header in HPACK, without an index and not compressed; both are short."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


class RawCall:
    """One call on a connection of its own, while the block runs.

    `message` is sent whole; without one, the call stays open and nothing is sent.
    """

    def __init__(
        self,
        address: str,
        path: bytes,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        message: bytes | None = None,
    ) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._path = path
        self._headers = headers
        self._message = message

    async def __aenter__(self) -> "RawCall":
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))
        head = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", self._path),
            (b":authority", b"x"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            *self._headers,
        )
        block = b"".join(literal(name, value) for name, value in head)
        self._writer.write(PREFACE + frame(SETTINGS, 0, 0, b""))
        self._writer.write(frame(HEADERS, END_HEADERS, 1, block))
        if self._message is not None:
            body = b"\0" + len(self._message).to_bytes(4, "big") + self._message
            self._writer.write(frame(DATA, END_STREAM, 1, body))
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._writer.close()

    async def answer_until(self, text: bytes) -> bytes:
        """Return what the server sends until a payload has the text, which must come."""
        seen = b""
        async with asyncio.timeout(30):
            while text not in seen:
                seen += (await self._frame())[1]
        return seen

    async def settings(self) -> dict[int, int]:
        """Return the server's settings by their number."""
        async with asyncio.timeout(30):
            kind, payload = await self._frame()
        assert kind == SETTINGS
        pairs = [payload[at : at + 6] for at in range(0, len(payload), 6)]
        return {int.from_bytes(p[:2], "big"): int.from_bytes(p[2:], "big") for p in pairs}

    async def _frame(self) -> tuple[int, bytes]:
        head = await self._reader.readexactly(9)
        return head[3], await self._reader.readexactly(int.from_bytes(head[:3], "big"))
