"""What widely used clients send, as it was seen on the wire, against a real HTTP server.

`docs/clients.md` says how each client was run. The core behind the server is scripted.
"""

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.generation import GenerationRequest
from tests.gateway.fake_core import FakeCore, http_server

PICTURE = "data:image/png;base64," + base64.b64encode(b"picture").decode()
FORM = {
    "properties": {
        "text": {"maxLength": 12, "title": "Text", "type": "string"},
        "page": {"maximum": 9, "minimum": 1, "title": "Page", "type": "integer"},
    },
    "required": ["text", "page"],
    "title": "Receipt",
    "type": "object",
}
FUNCTION = {"name": "Receipt", "description": "", "parameters": FORM}
OPENAI = {"Accept": "application/json", "Content-Type": "application/json"}
HTTPX = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "Content-Type": "application/json"}


def see(*, text_first: bool = True, **image: Any) -> list[dict[str, Any]]:
    text = {"type": "text", "text": "OCR:"}
    picture = {"type": "image_url", "image_url": {"url": PICTURE} | image}
    parts = [text, picture] if text_first else [picture, text]
    return [{"role": "user", "content": parts}]


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
async def port(core: FakeCore) -> AsyncIterator[int]:
    async with http_server(core) as port:
        yield port


async def raw(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send the bytes of a request, and return status, headers and body as they came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {
        name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])
    }
    length = int(headers.get("content-length", -1))
    body = await (reader.readexactly(length) if length >= 0 else reader.read())
    writer.close()
    await writer.wait_closed()
    return int(head[0].split()[1]), headers, body


async def post(port: int, path: str, body: Any, headers: dict[str, str]) -> dict[str, Any]:
    """Send a body with a client's headers, and return what it reads."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    status, _, answer = await raw(port, "\r\n".join([*lines, "", ""]).encode() + data)
    assert status == 200, answer
    found: dict[str, Any] = json.loads(answer)
    return found


def only(core: FakeCore) -> GenerationRequest:
    [asked] = core.requests
    return asked


# Documents


@pytest.mark.parametrize("is_guided", [False, True])
async def test_olmocr_speaks_http_by_itself(core: FakeCore, port: int, is_guided: bool) -> None:
    """Its pipeline writes the request line and the headers, and closes after each answer."""
    body = {"model": "org/tiny", "messages": see(), "max_tokens": 2000, "temperature": 0.1}
    if is_guided:
        body["guided_regex"] = r"---\nprimary_language: (?:[a-z]{2}|null)\n---\n[\s\S]+"
    data = json.dumps(body)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        f"\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    status, headers, answer = await raw(port, (head + data).encode())
    assert (status, headers["connection"]) == (200, "close")
    assert json.loads(answer)["choices"][0]["finish_reason"] == "stop"
    assert only(core).guide_kind == ("regex" if is_guided else "")


async def test_docling_posts_a_page_and_its_prompt(core: FakeCore, port: int) -> None:
    body = {
        "messages": see(text_first=False),
        "model": "org/tiny",
        "max_tokens": 2000,
        "skip_special_tokens": False,
        "temperature": 0.0,
    }
    answer = await post(port, "/v1/chat/completions", body, HTTPX)
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert not only(core).stopping.skip_special_tokens


async def test_mineru_sends_arguments_of_a_logits_processor(core: FakeCore, port: int) -> None:
    body = {
        "model": "org/tiny",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            *see(text_first=False),
        ],
        "temperature": 0.0,
        "top_p": 0.01,
        "top_k": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "vllm_xargs": {"no_repeat_ngram_size": 100, "debug": False},
        "skip_special_tokens": False,
    }
    assert (await post(port, "/v1/chat/completions", body, HTTPX))["usage"]
    rules = only(core).token_rules
    assert only(core).sampling.top_k == 1 and rules and rules.no_repeat_ngram_size == 100


# Agents and routers


async def test_langchain_asks_for_structured_output_as_a_schema(core: FakeCore, port: int) -> None:
    schema = FORM | {"additionalProperties": False}
    body = {
        "messages": see(),
        "model": "org/tiny",
        "max_completion_tokens": 400,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": schema, "name": "Receipt", "strict": True},
        },
        "stream": False,
        "temperature": 0.0,
    }
    await post(port, "/v1/chat/completions", body, OPENAI)
    asked = only(core)
    assert (asked.guide_kind, json.loads(asked.guide)) == ("json_schema", schema)


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param({"type": "function", "function": {"name": "Receipt"}}, id="langchain"),
        pytest.param("required", id="pydantic-ai"),
        pytest.param("auto", id="llama-index"),
    ],
)
async def test_agents_ask_for_structured_output_as_a_call(
    core: FakeCore, port: int, choice: Any
) -> None:
    body = {
        "messages": see(),
        "model": "org/tiny",
        "max_completion_tokens": 300,
        "parallel_tool_calls": False,
        "stream": False,
        "tool_choice": choice,
        "tools": [{"type": "function", "function": FUNCTION}],
    }
    await post(port, "/v1/chat/completions", body, OPENAI)
    asked = only(core)
    assert asked.reads_tool_calls and asked.guide_kind == "tool_calls"


async def test_pydantic_ai_asks_for_a_response_that_calls(core: FakeCore, port: int) -> None:
    image = {"image_url": PICTURE, "type": "input_image", "detail": "auto"}
    body = {
        "input": [{"role": "user", "content": [{"text": "OCR:", "type": "input_text"}, image]}],
        "max_output_tokens": 300,
        "model": "org/tiny",
        "stream": False,
        "tool_choice": "required",
        "tools": [FUNCTION | {"type": "function", "strict": False}],
    }
    assert (await post(port, "/v1/responses", body, OPENAI))["status"] == "completed"
    assert only(core).guide_kind == "tool_calls" and only(core).images == (b"picture",)


async def test_litellm_sends_a_detail_and_names_itself(core: FakeCore, port: int) -> None:
    headers = HTTPX | {"User-Agent": "litellm/1.110.2", "Accept-Encoding": "gzip, deflate, zstd"}
    body = {"model": "org/tiny", "messages": see(detail="auto"), "max_tokens": 60}
    assert (await post(port, "/v1/chat/completions", body, headers))["usage"]["total_tokens"]
    await post(
        port, "/v1/completions", {"model": "org/tiny", "prompt": "In", "max_tokens": 5}, HTTPX
    )
    assert core.requests[1].prompt == b"In"


# Java


async def test_a_client_that_offers_http2_is_answered_over_http1(core: FakeCore, port: int) -> None:
    """The HttpClient of the JDK offers h2c with each first request of a connection."""
    data = json.dumps({"messages": see()})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        f"Content-Length: {len(data)}\r\nHost: 127.0.0.1:{port}\r\n"
        "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAABgAGAAA\r\nUpgrade: h2c\r\n"
        "User-Agent: Java-http-client/17.0.15\r\nContent-Type: application/json\r\n\r\n"
    )
    status, headers, answer = await raw(port, (head + data).encode())
    assert status == 200 and "upgrade" not in headers
    assert json.loads(answer)["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.skipif(not shutil.which("java"), reason="there is no java")
async def test_the_client_of_the_jdk(core: FakeCore, port: int) -> None:
    program = Path(__file__).with_name("JdkClient.java")
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["java", str(program), url, json.dumps({"messages": see()})]
    found = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.splitlines() == ["200 HTTP_1_1 Hello", "200 HTTP_1_1 Hello"], found.stderr
