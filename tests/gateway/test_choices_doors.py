"""Several answers as clients of both APIs get them."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from starlette.testclient import TestClient

from common.messages import MAX_CHOICES, MAX_PRIORITY, Usage
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.generation import Began, Ended, Piece
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.gateway.fake_core import TIMINGS, FakeCore, grpc_server, logprob
from tests.gateway.test_http import ASK, CHAT, events

USAGE = Usage(prompt_tokens=9, completion_tokens=3)
SCRIPT = (
    Began([1, 2], TIMINGS),
    Piece(0, [10], "a", [logprob(10, "a")]),
    Began(None, TIMINGS, choice=1),
    Piece(0, [20], "b", [logprob(20, "b")], choice=1),
    Ended("length", Usage(prompt_tokens=9, completion_tokens=1), TIMINGS, choice=1, is_last=False),
    Piece(1, [11], "c", [logprob(11, "c")]),
    Ended("stop", USAGE, TIMINGS),
)
ASK_TWO = ASK | {"n": 2, "return_token_ids": True, "logprobs": True, "token_timestamps": True}


@pytest.fixture
def core() -> FakeCore:
    return FakeCore(*SCRIPT)


@pytest.fixture
def client(core: FakeCore) -> Iterator[TestClient]:
    with TestClient(create_app(MeasuredCore(core))) as client:
        yield client


def test_a_whole_body_has_each_answer_by_its_index(client: TestClient, core: FakeCore) -> None:
    answer = client.post(CHAT, json=ASK_TWO).json()
    assert core.requests[0].n == 2
    assert [
        (c["index"], c["message"]["content"], c["token_ids"], c["finish_reason"])
        for c in answer["choices"]
    ] == [(0, "ac", [10, 11], "stop"), (1, "b", [20], "length")]
    tokens = [[t["token_id"] for t in c["logprobs"]["content"]] for c in answer["choices"]]
    assert tokens == [[10, 11], [20]]
    assert (answer["prompt_token_ids"], answer["usage"]["completion_tokens"]) == ([1, 2], 3)
    assert len(answer["token_timestamps"]) == 2
    assert len(answer["choices"][1]["token_timestamps"]) == 1


def test_a_stream_has_a_begin_and_an_end_of_each_answer(client: TestClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    found = events(client.post(CHAT, json=ASK_TWO | options).text)
    *chunks, totals = found
    seen: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks:
        [choice] = chunk["choices"]
        assert chunk["usage"] is None
        seen[choice["index"]].append(choice["finish_reason"] or choice["delta"].get("content"))
    assert seen == {0: ["", "a", "c", "stop"], 1: ["", "b", "length"]}
    assert "prompt_token_ids" in chunks[0] and "prompt_token_ids" not in chunks[2]
    times = [len(chunk.get("token_timestamps", ())) for chunk in chunks]
    assert times == [1, 0, 1, 0, 0, 1, 0]
    assert (totals["choices"], totals["usage"]["total_tokens"]) == ([], 12)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"priority": MAX_PRIORITY + 1}, "priority"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_other_numbers_are_refused_by_name(
    client: TestClient, fields: dict[str, Any], field: str
) -> None:
    answer = client.post(CHAT, json=ASK | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("fields", [{"n": None, "best_of": 1}, {"n": 3, "best_of": 3}])
def test_best_of_as_many_as_are_made_changes_nothing(
    client: TestClient, core: FakeCore, fields: dict[str, Any]
) -> None:
    assert client.post(CHAT, json=ASK | fields).status_code == 200
    assert core.requests[0].n == (fields["n"] or 1)


def test_the_priority_reaches_the_core(client: TestClient, core: FakeCore) -> None:
    client.post(CHAT, json=ASK | {"priority": -3})
    client.post(CHAT, json=ASK)
    assert [request.priority for request in core.requests] == [-3, 0]


async def test_grpc_has_the_further_answers_apart(core: FakeCore) -> None:
    async with grpc_server(core) as address, grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        asked = {"text": "hi", "n": 2, "priority": -3}
        whole = await stub.Generate(inference_pb2.GenerateRequest(**asked))
        stream = stub.GenerateStream(inference_pb2.GenerateStreamRequest(**asked))
        streamed = [response async for response in stream]
        with pytest.raises(grpc.aio.AioRpcError, match="at most 16"):
            await stub.Generate(inference_pb2.GenerateRequest(text="hi", n=17))
    assert [(request.n, request.priority) for request in core.requests] == [(2, -3)] * 2
    [more] = whole.more_choices
    assert (whole.text, list(whole.token_ids), more.text, list(more.token_ids)) == (
        "ac", [10, 11], "b", [20],
    )  # fmt: skip
    assert (whole.usage.completion_tokens, len(more.logprobs)) == (3, 1)
    assert more.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    kinds = [(r.WhichOneof("event"), r.delta.choice or r.end.choice) for r in streamed]
    assert kinds == [
        ("begin", 0), ("delta", 0), ("delta", 1), ("end", 1), ("delta", 0), ("end", 0),
    ]  # fmt: skip


async def test_all_answers_are_measured_as_one_request(core: FakeCore) -> None:
    measured = MeasuredCore(core)
    TestClient(create_app(measured)).post(CHAT, json=ASK_TWO)
    value = measured.metrics.registry.get_sample_value
    names = {
        "twinlens_gateway_prompt_tokens_total": 9,
        "twinlens_gateway_generation_tokens_total": 3,
        "twinlens_gateway_time_to_first_token_seconds_count": 1,
        "twinlens_gateway_inter_token_latency_seconds_count": 1,
        "twinlens_gateway_time_per_output_token_seconds_count": 1,
        "twinlens_gateway_request_generation_tokens_count": 1,
    }
    labels = {"twinlens_gateway_prompt_tokens_total": {"source": "computed"}}
    assert {name: value(name, labels.get(name, {})) for name in names} == names
    assert value("twinlens_gateway_requests_total", {"outcome": "stop"}) == 1
