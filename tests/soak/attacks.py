"""Requests that cost much or are broken, one of each kind that has once harmed the others.

They are sent from an address of their own. Each must be refused, and nobody else may notice.
"""

import asyncio
import base64
import json
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import BytesIO
from typing import Any

import grpc
import h11
import numpy as np
from PIL import Image

from tests.soak.answers import CallFailed

SOURCE = ("127.0.0.2", 0)
"""The address of HTTP requests that attack. Limits count the clients of one address together."""
GENERATE = "/twinlens.inference.v1.InferenceService/Generate"
UNFINISHED_BYTES = 1000
"""The part of its body that the slow attack sends."""
MIB = 2**20


@cache
def http_body(kind: str) -> bytes:
    """Return the body of an attack on the HTTP API."""
    return HTTP[kind]()


@cache
def grpc_message(kind: str) -> bytes:
    """Return the message of an attack on the gRPC API."""
    return GRPC[kind]()


async def attack_http(port: int, kind: str) -> tuple[int, bytes]:
    """Send an attack, and return the status and the body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=SOURCE)
    body = http_body(kind)
    lines = [f"x-long: {'a' * 10 * MIB}"] if kind == "head" else []
    head = "\r\n".join(
        [
            "POST /v1/chat/completions HTTP/1.1",
            "host: soak",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            *lines,
        ]
    )
    sent = body[:UNFINISHED_BYTES] if kind == "slow" else body
    sending = asyncio.create_task(send(writer, f"{head}\r\n\r\n".encode() + sent))
    try:
        return await read_answer(reader)
    finally:
        sending.cancel()
        writer.transport.abort()


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    with suppress(OSError):  # the answer may come, and the connection end, while this still sends
        writer.write(data)
        await writer.drain()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "soak")]))
    connection.send(h11.EndOfMessage())
    status = 0
    body = b""
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(2**16))
            case h11.Response(status_code=status):
                pass
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                return status, body


async def attack_grpc(channel: grpc.aio.Channel, kind: str, timeout: float) -> None:
    """Send an attack, and raise the error that it is answered with."""
    try:
        await channel.unary_unary(GENERATE, None, None)(grpc_message(kind), timeout=timeout)
    except grpc.aio.AioRpcError as error:
        raise CallFailed(error.code().name, error.details() or "") from error


# Bodies


def chat(content: Any, **fields: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    return json.dumps(body | fields).encode()


def about_images(*files: bytes, mime: str = "image/png") -> bytes:
    urls = [f"data:{mime};base64,{base64.b64encode(file).decode()}" for file in files]
    return chat([{"type": "image_url", "image_url": {"url": url}} for url in urls])


def many_messages() -> bytes:
    one = b'{"role":"user","content":"a"},'
    return b'{"max_tokens":2,"messages":[' + (one * 700_000)[:-1] + b"]}"


def many_values() -> bytes:
    return chat("hi")[:-1] + b',"other":[' + b"[]," * 3_000_000 + b"0]}"


def large_schema() -> bytes:
    properties = {f"property {n}": {"type": "string"} for n in range(80_000)}
    schema = {"name": "s", "schema": {"type": "object", "properties": properties}}
    return chat("hi", response_format={"type": "json_schema", "json_schema": schema})


# Images


def jpeg() -> bytes:
    target = BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(target, "JPEG")
    return target.getvalue()


def refined_jpeg() -> bytes:
    """Return a progressive grey JPEG of 7000x7000 whose scans say nothing, 300 times.

    Each scan makes the decoder walk over all blocks.
    """
    side = 7000
    blocks = (side // 8) ** 2
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + b"\x01\x11\x00"
    quantization = b"\xff\xdb" + struct.pack(">HB", 67, 0) + b"\x01" * 64
    bits = ("0" + "1" * 14) * -(-blocks // 32767)  # runs of 32,767 blocks without a value
    bits += "1" * (-len(bits) % 8)
    runs = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def table(kind: bytes, value: bytes) -> bytes:
        return b"\xff\xc4" + struct.pack(">H", 20) + kind + b"\x01" + bytes(15) + value

    def scan(spectrum: bytes, data: bytes) -> bytes:
        return b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\x01\x00" + spectrum + data

    start = b"\xff\xd8" + quantization + frame + table(b"\0", b"\0") + table(b"\x10", b"\xe0")
    first = scan(b"\0\0\0", bytes(blocks // 8 + 1)) + scan(b"\x01\x3f\x01", runs)
    return start + first + scan(b"\x01\x3f\x10", runs) * 300 + b"\xff\xd9"


def long_header() -> bytes:
    data = jpeg()
    segment = b"\xff\xe1" + struct.pack(">H", 10) + b"Exif\0\0AB"
    return data[:2] + segment * 600_000 + data[2:]


def white_png() -> bytes:
    """Return a PNG of 50 megapixels that has few bytes."""
    side = 7071
    rows = zlib.compressobj(9)
    row = bytes(1) + b"\xff" * -(-side // 8)
    data = b"".join(rows.compress(row) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# Protobuf


def field(number: int, value: bytes) -> bytes:
    size = len(value)
    length = b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


HTTP: dict[str, Callable[[], bytes]] = {
    "messages": many_messages,
    "values": many_values,
    "depth": lambda: chat("hi")[:-1] + b',"other":' + b"[" * 100_000,
    "schema": large_schema,
    "model": lambda: chat("hi", model="x" * 5 * MIB),
    "scans": lambda: about_images(refined_jpeg(), mime="image/jpeg"),
    "header": lambda: about_images(long_header(), mime="image/jpeg"),
    "pixels": lambda: about_images(*[white_png()] * 32),
    "slow": lambda: chat("a" * 60 * MIB),
    "head": lambda: chat("hi"),
}
"""The attacks on the HTTP API."""
GRPC: dict[str, Callable[[], bytes]] = {
    "ids": lambda: field(4, field(1, b"\x01" * 60_000_000)),
    "groups": lambda: b"\x0b" * 200 + b"\x0c" * 200,
    "noise": lambda: b"\xff" * 300,
    "text": lambda: field(3, b"\xff\xfe\xfd"),
    "image": lambda: field(3, b"hi") + field(5, field(1, white_png()[:300])),
}
"""The attacks on the gRPC API."""
