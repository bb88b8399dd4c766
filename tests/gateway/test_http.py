"""The OpenAI HTTP API, request by request."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from common.errors import (
    DeadlineExceeded,
    Exhausted,
    InvalidRequest,
    ServingError,
    Unavailable,
    UnreadableImage,
)
from common.messages import Usage
from services.gateway.generation import Began, Ended, Piece
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.gateway.fake_core import HELLO, TIMINGS, FakeCore

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def client(core: FakeCore) -> Iterator[TestClient]:
    with TestClient(create_app(MeasuredCore(core), max_body_bytes=10_000)) as client:
        yield client


def events(stream: str) -> list[dict[str, Any]]:
    *lines, end, nothing = stream.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "") and "\r" not in stream
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_whole_answer(client: TestClient) -> None:
    answer = client.post(CHAT, json=ASK).json()
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 2, "image_tokens": 4, "text_tokens": 5},
    }
    assert (answer["object"], answer["model"], answer["timings"]) == (
        "chat.completion",
        "org/tiny",
        TIMINGS,
    )


def test_a_whole_answer_with_ids_and_logprobs(client: TestClient, core: FakeCore) -> None:
    answer = client.post(
        CHAT, json=ASK | {"return_token_ids": True, "logprobs": True, "top_logprobs": 1}
    ).json()
    choice = answer["choices"][0]
    assert core.requests[0].return_prompt_token_ids
    assert (answer["prompt_token_ids"], choice["token_ids"]) == ([1, 2, 3], [10, 11, 12])
    entry = {"token_id": 10, "token": "Hel", "bytes": [72, 101, 108], "logprob": -0.5}
    assert choice["logprobs"]["content"][0] == entry | {"top_logprobs": [entry]}


def test_log_probabilities_have_token_ids_only_if_a_client_asks_for_these(
    client: TestClient,
) -> None:
    answer = client.post(CHAT, json=ASK | {"logprobs": True, "top_logprobs": 1}).json()
    entry = answer["choices"][0]["logprobs"]["content"][0]
    assert "token_id" not in entry and "token_id" not in entry["top_logprobs"][0]


def test_a_stream_is_the_role_then_text_then_the_finish_reason(client: TestClient) -> None:
    answer = client.post(CHAT, json=ASK | {"stream": True})
    choices = [chunk["choices"][0] for chunk in events(answer.text)]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert not any("usage" in chunk or "prompt_token_ids" in chunk for chunk in events(answer.text))
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_usage_comes_in_a_separate_last_chunk(client: TestClient) -> None:
    *chunks, last = events(
        client.post(
            CHAT, json=ASK | {"stream": True, "stream_options": {"include_usage": True}}
        ).text
    )
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (
        last["choices"] == []
        and last["usage"]["completion_tokens"] == 3
        and last["timings"] == TIMINGS
    )


def test_each_chunk_has_the_usage_so_far_if_it_is_asked_for() -> None:
    core = FakeCore(Began(None, usage=Usage(prompt_tokens=9)), *HELLO[1:])
    options = {"include_usage": True, "continuous_usage_stats": True}
    with TestClient(create_app(MeasuredCore(core))) as client:
        answer = client.post(CHAT, json=ASK | {"stream": True, "stream_options": options})
    found = [chunk["usage"] for chunk in events(answer.text)]
    assert [usage["completion_tokens"] for usage in found] == [0, 1, 3, 3, 3]
    assert {usage["prompt_tokens"] for usage in found} == {9}


def test_timings_come_with_the_end_of_a_stream_that_asks_for_them(client: TestClient) -> None:
    body = ASK | {"stream": True, "timings": True}
    *chunks, last = events(client.post(CHAT, json=body).text)
    assert last["choices"][0]["finish_reason"] == "stop" and last["timings"] == TIMINGS
    assert not any("timings" in chunk for chunk in chunks)
    both = body | {"stream_options": {"include_usage": True}}
    chunks = events(client.post(CHAT, json=both).text)
    assert [index for index, chunk in enumerate(chunks) if "timings" in chunk] == [4]


def test_a_stream_with_ids_and_logprobs_has_a_chunk_for_every_token(client: TestClient) -> None:
    chunks = events(
        client.post(
            CHAT, json=ASK | {"stream": True, "return_token_ids": True, "logprobs": True}
        ).text
    )
    assert chunks[0]["prompt_token_ids"] == [1, 2, 3]
    pieces = [chunk["choices"][0] for chunk in chunks[1:-1]]
    assert [piece["token_ids"] for piece in pieces] == [[10], [11], [12]]
    assert [piece["logprobs"]["content"][0]["token"] for piece in pieces] == ["Hel", "l", "o"]
    assert [piece["logprobs"]["content"][0]["token_id"] for piece in pieces] == [10, 11, 12]


def test_all_chunks_of_an_answer_have_the_same_id(client: TestClient) -> None:
    answer = client.post(CHAT, json=ASK | {"stream": True}, headers={"x-request-id": "mine-1"})
    assert {chunk["id"] for chunk in events(answer.text)} == {"chatcmpl-mine-1"}
    assert answer.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/livez", 200), ("/no-such-path", 404), (CHAT, 405), ("/v1/models/other", 404)],
)
def test_every_response_echoes_the_request_id(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path, headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")


@pytest.mark.parametrize("unusable", ["", "two words", "x" * 129, "caf\xe9"])
def test_an_unusable_request_id_is_replaced(
    client: TestClient, core: FakeCore, unusable: str
) -> None:
    answer = client.post(CHAT, json=ASK, headers={"x-request-id": unusable.encode("latin-1")})
    assert answer.headers["x-request-id"] == core.requests[0].request_id != unusable


ERRORS: list[tuple[Exception, int, dict[str, Any]]] = [
    (InvalidRequest("bad"), 400, {"type": "invalid_request_error", "code": "invalid_request"}),
    (
        UnreadableImage("bad", "preprocess", 1),
        400,
        {"code": "unreadable_image", "stage": "preprocess", "image": 1},
    ),
    (
        Exhausted("full", retry_after=2.1),
        429,
        {"type": "rate_limit_error", "code": "rate_limit_exceeded"},
    ),
    (Unavailable("loading", retry_after=0.0), 503, {"type": "server_error", "code": "unavailable"}),
    (DeadlineExceeded("late"), 504, {"type": "server_error", "code": "deadline_exceeded"}),
    (RuntimeError("a secret"), 500, {"type": "server_error", "code": "internal_error"}),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("admitted", [True, False])
@pytest.mark.parametrize(("error", "status", "body"), ERRORS)
def test_a_failure_before_the_first_token_is_an_http_error(
    error: Exception, status: int, body: dict[str, Any], admitted: bool, stream: bool
) -> None:
    core = FakeCore(error) if admitted else FakeCore(refusal=error)
    answer = TestClient(create_app(MeasuredCore(core))).post(CHAT, json=ASK | {"stream": stream})
    found = answer.json()["error"]
    assert answer.status_code == status
    assert found.items() >= body.items() and found.keys() >= {"message", "type", "param", "code"}
    assert "secret" not in answer.text
    assert core.aborted.is_set() is admitted


@pytest.mark.parametrize(
    ("error", "seconds"),
    [(Exhausted("full", retry_after=2.1), "3"), (Unavailable("soon", retry_after=0.0), "1")],
)
def test_retry_after_is_rounded_up_to_whole_seconds(error: ServingError, seconds: str) -> None:
    answer = TestClient(create_app(MeasuredCore(FakeCore(refusal=error)))).post(CHAT, json=ASK)
    assert answer.headers["retry-after"] == seconds


@pytest.mark.parametrize("error", [Unavailable("llm died", "llm"), RuntimeError("a secret")])
def test_a_failure_in_mid_stream_is_an_event_and_then_done(error: Exception) -> None:
    core = FakeCore(Began(None), Piece(0, [1], "x", []), error)
    answer = TestClient(create_app(MeasuredCore(core))).post(CHAT, json=ASK | {"stream": True})
    *_, piece, last = events(answer.text)
    assert answer.status_code == 200
    assert piece["choices"][0]["delta"] == {"content": "x"}
    assert last["error"]["type"] == "server_error" and "secret" not in last["error"]["message"]
    assert core.aborted.is_set()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"", 400),
        (b'{"messages":' * 500, 400),
        (b"x" * 10_001, 413),
        (b"x" * 10**6, 413),
    ],
)
def test_a_bad_body_is_refused_with_a_message(client: TestClient, body: bytes, status: int) -> None:
    answer = client.post(CHAT, content=body)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_the_param_of_an_error_is_the_wrong_field(client: TestClient) -> None:
    assert (
        client.post(CHAT, json=ASK | {"temperature": -1}).json()["error"]["param"] == "temperature"
    )


def test_an_unknown_model_is_not_found(client: TestClient) -> None:
    answer = client.post(CHAT, json=ASK | {"model": "other"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("body", [{"messages": ASK["messages"]}, ASK | {"model": None}])
def test_the_model_may_be_left_out(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [("2.5", 200), ("0", 400), ("-1", 400), ("soon", 400), ("nan", 400), ("inf", 400)],
)
def test_a_client_can_set_a_timeout_by_header(
    client: TestClient, core: FakeCore, header: str, status: int
) -> None:
    assert client.post(CHAT, json=ASK, headers={"x-request-timeout": header}).status_code == status
    assert [request.timeout for request in core.requests] == ([2.5] if status == 200 else [])


def test_models_are_listed_and_described(client: TestClient) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("org/tiny", "model", 4096)
    assert client.get("/v1/models/org/tiny").json() == model


def test_readiness_follows_the_core_and_liveness_does_not(
    client: TestClient, core: FakeCore
) -> None:
    core.reason = "no vision is ready"
    for path, status in [("/livez", 200), ("/readyz", 503), ("/health", 503)]:
        assert client.get(path).status_code == status
    assert client.get("/readyz").json()["error"]["message"] == core.reason


def test_unknown_paths_and_methods_are_errors_of_the_same_form(client: TestClient) -> None:
    for answer, status in [
        (client.get("/nothing"), 404),
        (client.get(CHAT), 405),
        (client.post("/v1/nothing"), 404),
    ]:
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_metrics_count_how_requests_ended() -> None:
    core = FakeCore()
    client = TestClient(create_app(MeasuredCore(core)))
    client.post(CHAT, json=ASK)
    core.script = (
        Began(None),
        Piece(0, [1], "x", []),
        Ended("length", Usage(completion_tokens=1), TIMINGS),
    )
    client.post(CHAT, json=ASK | {"stream": True})
    core.script = (Unavailable("died"),)
    client.post(CHAT, json=ASK)
    core.refusal = Exhausted("full")
    client.post(CHAT, json=ASK)
    assert client.head("/metrics").status_code == 200
    shown = client.get("/metrics").text.splitlines()
    for line in (
        'twinlens_gateway_requests_total{outcome="stop"} 1.0',
        'twinlens_gateway_requests_total{outcome="length"} 1.0',
        'twinlens_gateway_requests_total{outcome="Unavailable"} 1.0',
        'twinlens_gateway_rejections_total{reason="Exhausted"} 1.0',
        "twinlens_gateway_requests_in_flight 0.0",
        'twinlens_gateway_prompt_tokens_total{source="computed"} 7.0',
        'twinlens_gateway_prompt_tokens_total{source="cached"} 2.0',
        "twinlens_gateway_image_tokens_total 4.0",
        "twinlens_gateway_generation_tokens_total 4.0",
        "twinlens_gateway_time_to_first_token_seconds_count 2.0",
        "twinlens_gateway_inter_token_latency_seconds_count 2.0",
        "twinlens_gateway_request_seconds_count 3.0",
    ):
        assert line in shown
    assert not any("_created" in line for line in shown)


def test_log_probabilities_name_tokens_by_their_ids_if_a_client_asks_for_that(
    client: TestClient,
) -> None:
    asked = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    answer = client.post(CHAT, json=ASK | asked).json()
    entry = answer["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["top_logprobs"][0]["token"]) == ("token_id:10", "token_id:10")
