"""Random bodies of both APIs: valid ones that were changed, as JSON, as bytes, or as protobuf."""

import base64
import functools
import json
import math
import struct
from copy import deepcopy
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from common.image_formats import IMAGE_FORMATS
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.pooling_schema import EmbeddingsRequest
from services.gateway.schema import ChatRequest
from services.gateway.unsupported import IN_MESSAGE, IN_POOLING, IN_REQUEST

FORMATS = (*(name.upper() for name in IMAGE_FORMATS), "ICO", "PPM", "TGA", "MPO")
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("RGB", "JPEG", {"progressive": True}),
    ("RGBA", "PNG", {}),
    ("P", "PNG", {"transparency": 3}),
    ("I", "TIFF", {}),
    ("F", "TIFF", {}),
    ("CMYK", "TIFF", {"compression": "tiff_lzw"}),
    ("RGB", "TIFF", {"compression": "jpeg"}),
    ("RGBA", "TIFF", {"compression": "tiff_adobe_deflate"}),
    ("RGBA", "AVIF", {}),
    ("RGBA", "JPEG2000", {"no_jp2": True}),
    ("P", "BMP", {}),
)
"""Further modes and forms of the formats."""
MODEL = "org/tiny"
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.0,
    -0.5,
    1.5,
    1e308,
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
    "",
    "x",
    "auto",
    "none",
    "text",
    "json_schema",
    "user",
    "é😀",
    "\u0000",
    "\ud800",
    "a" * 300,
    [],
    [[]],
    [1],
    [None],
    ["stop", "x"],
    ["x" * 300] * 20,
    {},
    {"": {}},
    {"type": "text"},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"include_usage": True},
    {"url": "data:image/png;base64,AAAA"},
    {"$ref": "#"},
)
PIECES = (
    b"",
    b",",
    b"]",
    b"}",
    b"[" * 70,
    b'{"a":' * 70,
    b"[" * 5000,
    b"1e999",
    b"-0",
    b"NaN",
    b"-Infinity",
    b"1" * 5000,
    b"0.1" + b"0" * 5000 + b"1",
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\\u0000"',
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"/* */",
    b"'",
    b'\\"',
    b'"messages":[],',
    b'"model":"x","model":3,',
    b"[0," * 300,
)
HEADERS: tuple[tuple[bytes, tuple[bytes, ...]], ...] = (
    (b"content-type", (b"", b"text/plain", b"application/json; charset=utf-16", b"\xff")),
    (b"content-length", (b"0", b"-1", b"1e3", b"9" * 30, b"abc", "٣".encode(), b"70000000")),
    (b"x-request-timeout", (b"0", b"-1", b"nan", b"inf", b"1e999", b"1e-300", b"x", b"\xff", b"5")),
    (b"x-request-id", (b"", b"a" * 129, b"~!", b"a\tb", b"\xff\xfe", b"x" * 128)),
    (b"accept-encoding", (b"gzip",)),
    (b"content-encoding", (b"gzip", b"x")),
    (b"host", (b"", b"x" * 3000)),
)
FIELD_VALUES: tuple[Any, ...] = (0, 1, 2**31, 2**32 - 1, True, -1.5, math.nan, 1e30, "x", "(" * 99)
TEXT_PART = {"type": "text", "text": "Read it."}


@functools.cache
def small_images() -> tuple[bytes, ...]:
    """Return a small file of each format."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    found = []
    for name in FORMATS:
        target = BytesIO()
        Image.fromarray(pixels).save(target, name)
        found.append(target.getvalue())
    for mode, name, options in VARIANTS:
        target = BytesIO()
        Image.fromarray(pixels).convert(mode).save(target, name, **options)
        found.append(target.getvalue())
    return tuple(found)


def image_file(draw: Random) -> bytes:
    """Return a small image file, in most cases a broken one."""
    data = bytearray(draw.choice(small_images()))
    for _ in range(draw.choice([0, 1, 1, 2, 5, 20])):
        place = draw.randrange(len(data))
        match draw.randrange(6):
            case 0:
                del data[place : place + draw.choice([1, 4, 100])]
            case 1:
                data[place:place] = draw.randbytes(draw.choice([1, 2, 4, 50]))
            case 2:
                data[place : place + 4] = struct.pack(">I", draw.choice([0, 1, 50_000, 2**32 - 1]))
            case 3:
                data[place : place + 2] = struct.pack("<H", draw.choice([0, 1, 7000, 65535]))
            case _:
                data[place] = draw.randrange(256)
        if not data:
            break
    return bytes(data)


def data_uri(draw: Random, data: bytes) -> str:
    text = base64.b64encode(data).decode()
    match draw.randrange(8):
        case 0:
            text = text[: draw.randrange(len(text) + 1)]
        case 1:
            text = text.replace("A", draw.choice(["=", "-", " ", "\n", "é", "_", "\x00"]))
        case 2:
            return draw.choice(["", "data:", "http://x/y.png", "data:,x", "file:///etc/passwd"])
        case 3:
            return f"data:{draw.choice(['image/png', 'text/html', 'x' * 400])},{text}"
    kind = draw.choice(["image/png", "image/jpeg", "image/x", "", "text/plain;charset=x"])
    return f"data:{kind};base64,{text}"


# JSON


def chat(draw: Random) -> dict[str, Any]:
    """Return a valid body."""
    parts: list[Any] = [dict(TEXT_PART) for _ in range(draw.randrange(1, 4))]
    for _ in range(draw.choice([0, 0, 1, 2])):
        uri = f"data:image/png;base64,{base64.b64encode(small_images()[0]).decode()}"
        video = {"type": "video", "video": [uri] * draw.choice([1, 2, 3]), "fps": 1.5}
        parts.append(draw.choice([{"type": "image_url", "image_url": {"url": uri}}, video]))
    messages: list[Any] = [{"role": "user", "content": draw.choice([parts, "Read it."])}]
    if draw.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "You read."})
    body = {
        "model": MODEL,
        "messages": messages,
        "stream": draw.random() < 0.3,
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["x"],
    }
    return body | with_tools(draw, messages) if draw.random() < 0.3 else body


def with_tools(draw: Random, messages: list[Any]) -> dict[str, Any]:
    """Return the fields of a body about tools, and add a call and its result to the messages."""
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    function = {"name": "f", "description": "F.", "parameters": schema, "strict": True}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": "1", "content": [dict(TEXT_PART)]})
    name = {"type": "function", "function": {"name": "f"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [name]}}
    return {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": draw.choice(["auto", "none", "required", name, allowed]),
        "parallel_tool_calls": draw.random() < 0.5,
    }


def chat_body(draw: Random) -> bytes:
    """Return a body that was changed at some places."""
    body = chat(draw)
    for _ in range(draw.choice([0, 0, 1, 1, 2, 4])):
        match draw.randrange(4):
            case 0:
                fields = [
                    *ChatRequest.model_fields,
                    *EmbeddingsRequest.model_fields,
                    *IN_REQUEST,
                    *IN_POOLING,
                ]
                body[draw.choice(fields)] = deepcopy(draw.choice(VALUES))
            case 1 if isinstance(messages := body.get("messages"), list) and messages:
                message = draw.choice(messages)
                if isinstance(message, dict):
                    message[draw.choice(["role", "content", *IN_MESSAGE])] = deepcopy(
                        draw.choice(VALUES)
                    )
            case 2:
                uri = data_uri(draw, image_file(draw))
                image = draw.choice([{"url": uri}, uri])
                frames = {"type": "video", "video": [uri] * draw.choice([1, 3, 900])}
                file = {"type": "video_url", "video_url": image, "fps": draw.choice(VALUES)}
                part = draw.choice([{"type": "image_url", "image_url": image}, frames, file])
                body["messages"] = [{"role": "user", "content": [part, TEXT_PART]}]
            case _:
                replace_somewhere(draw, body)
    if draw.random() < 0.1:
        body["input"] = body.pop("messages", None) and draw.choice(["Read it.", ["a", "b"] * 20])
    data = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.5).encode(errors="replace"))
    if draw.random() < 0.3:
        for _ in range(draw.choice([1, 1, 2, 5])):
            break_text(draw, data)
    return bytes(data)


def replace_somewhere(draw: Random, body: Any) -> None:
    """Replace or remove a value at some depth, or put it into containers."""
    place = body
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = draw.choice(keys)
        if not isinstance(place[key], dict | list) or draw.random() < 0.4:
            break
        place = place[key]
    match draw.randrange(4):
        case 0:
            del place[key]
        case 1:
            for _ in range(draw.choice([1, 60, 64, 70])):
                place[key] = draw.choice([[place[key]], {"a": place[key]}])
        case 2:
            place[key] = [deepcopy(place[key]) for _ in range(draw.choice([2, 50]))]
        case _:
            place[key] = deepcopy(draw.choice(VALUES))


def break_text(draw: Random, data: bytearray) -> None:
    """Change the bytes of a body without regard to what they mean."""
    place = draw.randrange(len(data) + 1)
    match draw.randrange(5):
        case 0:
            del data[place : place + draw.choice([1, 2, 20, 10**9])]
        case 1 if place < len(data):
            data[place] = draw.randrange(256)
        case 2:
            data[place:place] = data[draw.randrange(len(data) + 1) :][:200]
        case _:
            data[place:place] = draw.choice(PIECES)


def headers(draw: Random, body: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers of a body, in some cases strange ones."""
    found = {b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
    if draw.random() < 0.2:
        name, values = draw.choice(HEADERS)
        found[name] = draw.choice(values)
    return list(found.items())


# Protobuf


def generate_request(draw: Random, kind: type[Any]) -> Any:
    """Return a valid request, or one with fields that are not."""
    request = kind(text="Read it.")
    if draw.random() < 0.3:
        request.token_ids.ids.extend(draw.choice([[1, 2, 3], [2**32 - 1], range(5000), []]))
    for _ in range(draw.choice([0, 0, 1, 2, 40])):
        request.images.add(data=image_file(draw))
    if "sampling" not in kind.DESCRIPTOR.fields_by_name:
        if kind is inference_pb2.ClassifyRequest and draw.random() < 0.5:
            request.top_k = draw.choice([0, 1, 2, 2**32 - 1])
        return named(draw, request)
    for _ in range(draw.choice([0, 0, 1, 3])):
        frames = [{"data": image_file(draw)} for _ in range(draw.choice([0, 1, 3, 800]))]
        file = draw.choice([b"", b"\0\0\0\x18ftypisom", image_file(draw)])
        request.videos.add(frames=frames, file=file, fps=draw.choice([0, 2, math.nan, 1e30]))
    for part in (request.sampling, request.stopping, request.response, request.guide):
        for field in part.DESCRIPTOR.fields:
            if draw.random() < 0.1:
                set_field(draw, part, field)
    return named(draw, request)


def named(draw: Random, request: Any) -> Any:
    """Return the request, in some cases with names."""
    if draw.random() < 0.3:
        request.model = draw.choice([MODEL, MODEL, "x", "é" * 2000])
        request.request_id = draw.choice(["", "a", "a" * 200, "\n"])
    return request


def set_field(draw: Random, part: Any, field: Any) -> None:
    value = draw.choice(FIELD_VALUES)
    try:
        if field.is_repeated:
            getattr(part, field.name).extend([value] * draw.choice([1, 3, 100]))
        else:
            setattr(part, field.name, value)
    except (AttributeError, TypeError, ValueError):
        pass  # a value of another type


def protobuf_body(draw: Random, kind: type[Any]) -> bytes:
    """Return a serialized request, in most cases changed on the wire level."""
    data = bytearray(generate_request(draw, kind).SerializeToString())
    for _ in range(draw.choice([0, 1, 1, 2, 5])):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0:
                del data[place : place + draw.choice([1, 3, 1000])]
            case 1:
                data[place:place] = draw.randbytes(draw.choice([1, 4, 30]))
            case 2:
                data += field_of(draw)
            case 3:
                data[0:0] = field_of(draw)
            case 4:
                data += data[:2000]
            case _ if place < len(data):
                data[place] = draw.randrange(256)
    return bytes(data)


def field_of(draw: Random) -> bytes:
    """Return a field of any number and wire type, groups included."""
    number = draw.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 2000, 2**29 - 1])
    wire_type = draw.randrange(8)
    tag = varint(number << 3 | wire_type)
    match wire_type:
        case 0:
            return tag + varint(draw.choice([0, 1, 2**32, 2**64 - 1, 2**70]))
        case 1:
            return tag + draw.randbytes(8)
        case 2:
            content = draw.randbytes(draw.choice([0, 1, 5, 200]))
            return tag + varint(draw.choice([len(content), 2**31, 3])) + content
        case 3:
            return tag * draw.choice([1, 50, 200]) + varint(number << 3 | 4) * draw.choice(
                [0, 1, 50]
            )
    return tag + draw.randbytes(4)


def varint(value: int) -> bytes:
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found + bytes([value]))


REQUEST_KINDS = {
    "Generate": inference_pb2.GenerateRequest,
    "GenerateStream": inference_pb2.GenerateStreamRequest,
    "Classify": inference_pb2.ClassifyRequest,
    "Embed": inference_pb2.EmbedRequest,
}
