"""The openai client and the parsers of common benchmarks against a real HTTP server.

The gateway core behind the server is scripted.
"""

import asyncio
import base64
import json
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import pytest

from common.errors import Exhausted, Unavailable
from common.messages import Usage
from services.gateway.generation import Began, Piece, Result
from tests.gateway.fake_core import FOREVER, HELLO, FakeCore, http_server

PICTURE = "data:image/png;base64," + base64.b64encode(b"picture").decode()
SEE: Any = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": PICTURE, "detail": "auto"}},
            {"type": "text", "text": "?"},
        ],
    }
]
ASK: Any = {"model": "org/tiny", "messages": SEE}


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
async def port(core: FakeCore) -> AsyncIterator[int]:
    async with http_server(core) as port:
        yield port


@pytest.fixture
async def client(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=10
    ) as client:
        yield client


async def raw_stream(port: int, **body: Any) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps({"messages": SEE, "stream": True, **body}).encode(),
        {"Content-Type": "application/json"},
    )

    def read() -> bytes:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read()

    return await asyncio.to_thread(read)


async def test_models_are_listed_and_retrieved(client: openai.AsyncOpenAI) -> None:
    [model] = (await client.models.list()).data
    assert (await client.models.retrieve(model.id)).id == "org/tiny"


async def test_a_whole_answer(client: openai.AsyncOpenAI, core: FakeCore) -> None:
    answer = await client.chat.completions.create(**ASK, max_completion_tokens=24, temperature=0)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "stop")
    assert (
        answer.usage
        and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    )
    assert (
        answer.usage.prompt_tokens_details and answer.usage.prompt_tokens_details.cached_tokens == 2
    )
    [asked] = core.requests
    assert (asked.images, asked.stopping.max_tokens, asked.sampling.temperature) == (
        (b"picture",),
        24,
        0,
    )


async def test_a_stream_ends_with_its_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        **ASK, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == "Hello"
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert not chunks[-1].choices and chunks[-1].usage and chunks[-1].usage.completion_tokens == 3


async def test_logprobs_and_our_own_fields(client: openai.AsyncOpenAI, core: FakeCore) -> None:
    extra = {"ignore_eos": True, "top_k": 5, "return_token_ids": True}
    answer = await client.chat.completions.create(
        **ASK, logprobs=True, top_logprobs=1, stop=["x"], seed=7, extra_body=extra
    )
    logprobs = answer.choices[0].logprobs
    assert (
        logprobs
        and logprobs.content
        and [entry.token for entry in logprobs.content] == ["Hel", "l", "o"]
    )
    assert logprobs.content[0].top_logprobs[0].bytes == [72, 101, 108]
    assert answer.model_extra and answer.model_extra["prompt_token_ids"] == [1, 2, 3]
    [asked] = core.requests
    assert (
        asked.stopping.ignore_eos,
        asked.stopping.stop,
        asked.sampling.top_k,
        asked.sampling.seed,
    ) == (True, ("x",), 5, 7)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (openai.NotFoundError, {"model": "no-such-model"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"max_tokens": 10**9}),
        (openai.BadRequestError, {"n": 17}),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f g"}}]}),
        (openai.BadRequestError, {"response_format": {"type": "grammar"}}),
        (
            openai.BadRequestError,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}],
                    }
                ]
            },
        ),
    ],
)
async def test_a_refusal_is_the_clients_own_exception_and_reads_well(
    client: openai.AsyncOpenAI,
    core: FakeCore,
    kind: type[openai.APIStatusError],
    wrong: dict[str, Any],
) -> None:
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(**ASK | wrong)
    assert isinstance(caught.value.body, dict) and caught.value.body["message"]
    assert caught.value.request_id
    assert core.requests == []


async def test_a_client_that_retries_is_told_how_long_to_wait(
    client: openai.AsyncOpenAI, core: FakeCore
) -> None:
    core.refusal = Exhausted("full", retry_after=3.0)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(**ASK)
    assert caught.value.response.headers["retry-after"] == "3"


async def test_a_failure_in_mid_stream_is_raised(
    client: openai.AsyncOpenAI, core: FakeCore
) -> None:
    core.script = (Began(None), Piece(0, [1], "x", []), Unavailable("llm was lost", "llm"))
    stream = await client.chat.completions.create(**ASK, stream=True)
    with pytest.raises(openai.APIError, match="llm was lost"):
        _ = [chunk async for chunk in stream]


async def test_closing_a_stream_aborts_it(client: openai.AsyncOpenAI, core: FakeCore) -> None:
    core.script = (Began(None), Piece(0, [1], "x", []), FOREVER)
    async with (
        asyncio.timeout(10),
        await client.chat.completions.create(**ASK, stream=True) as stream,
    ):
        assert (await anext(aiter(stream))).choices[0].delta.role == "assistant"
        await stream.close()
        await core.aborted.wait()


async def test_many_at_once(client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(*(client.chat.completions.create(**ASK) for _ in range(16)))
    assert {answer.choices[0].message.content for answer in answers} == {"Hello"}
    assert len({answer.id for answer in answers}) == 16


async def test_benchmarks_split_at_empty_lines_and_read_usage_from_a_chunk_without_text(
    port: int,
) -> None:
    stream = await raw_stream(
        port, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    assert b"\r" not in stream and stream.endswith(b"\n\ndata: [DONE]\n\n")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in stream.split(b"\n\n")[:-2]]
    with_text = [
        chunk
        for chunk in chunks
        if chunk["choices"] and chunk["choices"][0]["delta"].get("content")
    ]
    assert len(with_text) == 2
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 2,
        "image_tokens": 4,
        "text_tokens": 5,
    }
    assert all(chunk["choices"][0]["delta"].get("content") != "" for chunk in chunks[1:-1]), (
        "they count it as a token"
    )


async def test_a_failed_stream_ends_like_any_other(port: int, core: FakeCore) -> None:
    core.script = (*HELLO[:2], Unavailable("died", "llm"))
    *_, error, done, nothing = (await raw_stream(port)).split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["stage"] == "llm"
    assert (done, nothing) == (b"data: [DONE]", b"")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": PICTURE}}],
        [{"type": "image_url", "image_url": PICTURE}],
        [
            {
                "type": "image_url",
                "image_url": {"url": PICTURE, "detail": "original"},
                "prompt_cache_breakpoint": {},
            }
        ],
        [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": PICTURE}}],
    ],
)
async def test_images_as_different_clients_send_them(
    port: int, core: FakeCore, content: list[dict[str, Any]]
) -> None:
    assert (await raw_stream(port, messages=[{"role": "user", "content": content}])).endswith(
        b"data: [DONE]\n\n"
    )
    assert core.requests[0].images == (b"picture",)


async def test_embeddings_come_as_the_client_asks_for_them_by_itself(
    client: openai.AsyncOpenAI, core: FakeCore
) -> None:
    values = np.array([0.6, -0.8], np.float32)
    core.script = (Began(None), Result(values, [], Usage(prompt_tokens=4), {}))
    for form in ({}, {"encoding_format": "float"}):
        answer = await client.embeddings.create(model="org/tiny", input=["a", "b"], **form)
        assert [entry.index for entry in answer.data] == [0, 1]
        np.testing.assert_allclose(answer.data[1].embedding, values, rtol=1e-7)
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (8, 8)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        await client.embeddings.create(model="org/tiny", input="a", dimensions=5)
