"""POST /v1/classify and /v1/embeddings, request by request."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from common.errors import DeadlineExceeded, Exhausted, InvalidRequest
from common.messages import Usage
from services.gateway import pooling_http
from services.gateway.generation import Began, GenerationEvent, GenerationRequest, Result
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.pooling_schema import MAX_INPUTS
from services.gateway.videos import BoundedImage
from tests.gateway.fake_core import TIMINGS, FakeCore

PIXEL = "data:image/png;base64," + base64.b64encode(b"picture").decode()
IMAGE = {"type": "image_url", "image_url": {"url": PIXEL}}
ASK: dict[str, Any] = {
    "model": "org/tiny",
    "messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Is it red?"}]}],
}
LABELED = Result(
    np.array([0.25, 0.5, 0.125, 0.125], np.float32),
    ["no", "yes", "two", "red"],
    Usage(prompt_tokens=9),
    TIMINGS,
)


class EmbeddingCore(FakeCore):
    """A core whose embeddings of a text are its length, in the order of the shortest first."""

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        [message] = json.loads(request.prompt)
        length = len(message["content"])
        values = np.array([length, 0.1, -0.5], np.float32)
        for _ in range(length):
            await asyncio.sleep(0)
        self.script = (Began(None), Result(values, [], Usage(prompt_tokens=length), {}))
        async with super().generate(request) as events:
            yield events


@pytest.fixture
def core() -> FakeCore:
    return FakeCore(Began(None), LABELED)


@pytest.fixture
def client(core: FakeCore) -> Iterator[TestClient]:
    with TestClient(create_app(MeasuredCore(core), max_body_bytes=200_000)) as client:
        yield client


@pytest.fixture
def embedder() -> Iterator[TestClient]:
    with TestClient(create_app(MeasuredCore(EmbeddingCore()), max_body_bytes=200_000)) as client:
        yield client


def test_each_embedding_has_its_timings_if_they_are_asked_for() -> None:
    result = Result(np.ones(2, np.float32), [], Usage(), {"total_seconds": 0.5})
    client = TestClient(create_app(MeasuredCore(FakeCore(Began(None), result))))
    for asked in (False, True):
        body = {"input": ["a", "b"], "timings": asked}
        answer = client.post("/v1/embeddings", json=body).json()
        found = [entry.get("timings") for entry in answer["data"]]
        assert found == [{"total_seconds": 0.5} if asked else None] * 2


def test_a_classification(client: TestClient, core: FakeCore) -> None:
    answer = client.post("/v1/classify", json=ASK, headers={"x-request-id": "mine"}).json()
    assert answer.pop("created") > 0
    assert answer == {
        "id": "classify-mine",
        "object": "list",
        "model": "org/tiny",
        "data": [
            {"index": 0, "label": "yes", "probs": [0.25, 0.5, 0.125, 0.125], "num_classes": 4}
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 0,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 0, "text_tokens": 9},
        },
        "timings": TIMINGS,
    }
    [request] = core.requests
    assert request.task == "classify" and request.images == (b"picture",)
    assert json.loads(request.prompt) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}
    ]


def test_the_best_labels_of_a_classification(client: TestClient) -> None:
    data = client.post("/v1/classify", json=ASK | {"top_k": 3}).json()["data"]
    assert data == [
        {
            "index": 0,
            "label": "yes",
            "num_classes": 4,
            "top": [
                {"index": 1, "label": "yes", "prob": 0.5},
                {"index": 0, "label": "no", "prob": 0.25},
                {"index": 2, "label": "two", "prob": 0.125},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("classify", {"messages": None}, "messages"),
        ("classify", {"top_k": 0}, "top_k"),
        ("classify", {"softmax": False}, "softmax"),
        ("classify", {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("classify", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages"),
        ("classify", {"mm_processor_kwargs": {"fps": 2}}, "mm_processor_kwargs.fps"),
        (
            "embeddings",
            {"messages": None, "input": "a", "mm_processor_kwargs": {"max_pixels": 9}},
            "mm_processor_kwargs",
        ),
        ("embeddings", {}, None),
        ("embeddings", {"messages": None}, "input"),
        ("embeddings", {"input": "hi"}, "input"),
        ("embeddings", {"messages": None, "input": []}, "input"),
        ("embeddings", {"messages": None, "input": ["a", ""]}, "input[1]"),
        ("embeddings", {"messages": None, "input": [1, 2]}, "input"),
        ("embeddings", {"messages": None, "input": [[1], [2]]}, "input"),
        ("embeddings", {"messages": None, "input": [None]}, "input[0]"),
        ("embeddings", {"messages": None, "input": {"a": 1}}, "input"),
        ("embeddings", {"messages": None, "input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ("embeddings", {"encoding_format": "int8"}, "encoding_format"),
        ("embeddings", {"normalize": False}, "normalize"),
        ("embeddings", {"dimensions": 3}, "dimensions"),
        ("embeddings", {"dimensions": 4, "user": "me", "priority": 1}, None),
    ],
)
def test_a_field_that_is_wrong_is_refused_by_name(
    client: TestClient, path: str, fields: dict[str, Any], param: str | None
) -> None:
    body = {name: value for name, value in (ASK | fields).items() if value is not None}
    answer = client.post(f"/v1/{path}", json=body)
    if param is None:
        assert answer.status_code == 200
        return
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"].partition("[0].content")[0].startswith(param)


def test_another_model_is_not_found(client: TestClient) -> None:
    for path in ("classify", "embeddings"):
        assert client.post(f"/v1/{path}", json=ASK | {"model": "other"}).status_code == 404


@pytest.mark.parametrize("path", ["classify", "embeddings"])
def test_refusals_and_failures_are_the_errors_of_a_chat(
    client: TestClient, core: FakeCore, path: str
) -> None:
    core.refusal = Exhausted("full", stage="gateway", retry_after=3)
    answer = client.post(f"/v1/{path}", json=ASK)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    core.refusal = None
    core.script = (DeadlineExceeded("late", stage="llm"),)
    answer = client.post(f"/v1/{path}", json=ASK, headers={"x-request-timeout": "5"})
    assert answer.status_code == 504 and answer.json()["error"]["stage"] == "llm"
    assert client.post(f"/v1/{path}", content=b" " * 200_001).status_code == 413
    assert client.get(f"/v1/{path}").status_code == 405


@pytest.mark.parametrize("path", ["classify", "embeddings"])
def test_the_bounds_of_pixels_hold_for_the_images(
    client: TestClient, core: FakeCore, path: str
) -> None:
    body = ASK | {"mm_processor_kwargs": {"max_pixels": 5000}}
    assert client.post(f"/v1/{path}", json=body).status_code == 200
    [image] = core.requests[0].images
    assert isinstance(image, BoundedImage) and image.bounds.max_pixels == 5000


def test_the_embedding_of_an_image(client: TestClient, core: FakeCore) -> None:
    body = {"messages": [{"role": "user", "content": [IMAGE]}]}
    answer = client.post("/v1/embeddings", json=body).json()
    assert answer["object"] == "list" and answer["id"].startswith("embd-")
    assert answer["data"] == [
        {"object": "embedding", "index": 0, "embedding": [0.25, 0.5, 0.125, 0.125]}
    ]
    assert core.requests[0].task == "embed" and core.requests[0].images == (b"picture",)


def test_the_embeddings_of_texts_come_in_the_order_of_the_texts(embedder: TestClient) -> None:
    texts = ["x" * n for n in (9, 3, 5, 1)]
    answer = embedder.post("/v1/embeddings", json={"input": texts}).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3]
    assert [entry["embedding"][0] for entry in answer["data"]] == [9, 3, 5, 1]
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 18


def test_an_embedding_in_base64_is_little_endian_float32(embedder: TestClient) -> None:
    body = {"input": "four", "encoding_format": "base64"}
    [entry] = embedder.post("/v1/embeddings", json=body).json()["data"]
    values = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
    np.testing.assert_array_equal(values, np.array([4, 0.1, -0.5], np.float32))


def test_many_texts_are_few_at_a_time_and_each_has_an_id_and_what_is_left_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pooling_http, "MAX_AT_ONCE", 3)
    most = 0
    now = 0

    class CountingCore(EmbeddingCore):
        @asynccontextmanager
        async def generate(
            self, request: GenerationRequest
        ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
            nonlocal most, now
            now += 1
            most = max(most, now)
            async with super().generate(request) as events:
                yield events
            now -= 1

    core = CountingCore()
    with TestClient(create_app(MeasuredCore(core))) as client:
        headers = {"x-request-id": "mine", "x-request-timeout": "7"}
        client.post("/v1/embeddings", json={"input": ["abcd"] * 50}, headers=headers)
    assert most == 3
    assert sorted(r.request_id for r in core.requests) == sorted(f"mine-{n}" for n in range(50))
    timeouts = [r.timeout for r in core.requests if r.timeout is not None]
    assert len(timeouts) == 50 and 7 >= timeouts[0] > timeouts[-1] > 0


def test_one_failure_of_many_fails_the_request(embedder: TestClient) -> None:
    class FailingCore(EmbeddingCore):
        @asynccontextmanager
        async def generate(
            self, request: GenerationRequest
        ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
            if b"bad" in request.prompt:
                raise InvalidRequest("too long", stage="preprocess")
            async with super().generate(request) as events:
                yield events

    with TestClient(create_app(MeasuredCore(FailingCore()))) as client:
        answer = client.post("/v1/embeddings", json={"input": ["ok", "bad", "ok"]})
    assert answer.status_code == 400 and "too long" in answer.text


def test_the_outcome_is_counted(core: FakeCore) -> None:
    measured = MeasuredCore(core)
    with TestClient(create_app(measured)) as client:
        client.post("/v1/classify", json=ASK)
        text = client.get("/metrics").text
    assert 'twinlens_gateway_requests_total{outcome="pooled"} 1.0' in text
    assert 'twinlens_gateway_prompt_tokens_total{source="computed"} 9.0' in text
