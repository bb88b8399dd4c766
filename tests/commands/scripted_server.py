"""An HTTP server that answers every request with the same bytes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
"""The head of a response that ends with the connection."""
CHUNKED = STREAM.replace(b"connection: close", b"transfer-encoding: chunked")


def response(status: int, body: Any, *headers: str) -> bytes:
    """Return a whole response. A body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(data)}", "connection: close", *headers]
    if not isinstance(body, bytes):
        lines.append("content-type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + data


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_event(text: str, **choice: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, **choice}])


class Script:
    """What the server sends: one list of pieces for each request; the last one is repeated.

    Each piece is sent when the one before it has left. The connection closes after the last.
    """

    def __init__(self, *responses: list[bytes]) -> None:
        self.responses = list(responses)
        self.bodies: list[Any] = []
        """What clients sent."""
        self.heads: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        lines = [line.lower() for line in head.splitlines()]
        length = next((int(line[15:]) for line in lines if line.startswith("content-length")), 0)
        self.bodies.append(json.loads(await reader.readexactly(length)) if length else None)
        pieces = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def scripted_server(script: Script) -> AsyncIterator[str]:
    """Run the server and return its base URL."""
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
