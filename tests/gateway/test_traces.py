"""The spans of a request at the gateway: its own, and one for each attempt."""

from collections.abc import AsyncIterator

import grpc
import pytest
from starlette.testclient import TestClient

from common.errors import Exhausted, Internal, InvalidRequest, ServingError
from common.tracing import NO_TRACING, Tracing
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.generation import GenerationRequest, Piece
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.gateway.builders import Gateway, delta, request, rest, routed
from tests.gateway.fake_core import FOREVER, FakeCore, grpc_server
from tests.spans import PARENT, TRACE_ID, MemoryTracing, error_of, parent_of, traceparent_of

PROMPT = b"[a secret]"


@pytest.fixture
async def tracing() -> AsyncIterator[MemoryTracing]:
    tracing = MemoryTracing()
    yield tracing
    tracing.close()


def asked(**fields: object) -> GenerationRequest:
    return request("r", prompt=PROMPT, traceparent=PARENT, **fields)


def measured(gateway: Gateway, tracing: Tracing) -> MeasuredCore:
    return MeasuredCore(gateway.core, gateway.core.metrics, tracing=tracing)


async def test_an_answer_is_a_span_of_the_clients_trace_with_an_attempt_below(
    tracing: MemoryTracing,
) -> None:
    gateway = Gateway(tracing=tracing)
    async with measured(gateway, tracing).generate(asked()) as events:
        [(_, submit)] = gateway.submitted()
        gateway.on_event(routed(), delta(0, [10], "a"), delta(1, [11], "b", "stop"))
        await rest(events)
    attempt, root = tracing.spans()
    assert root.name == "chat tiny"
    assert parent_of(root) == PARENT
    assert parent_of(attempt) == traceparent_of(root.context)
    assert submit.traceparent == traceparent_of(attempt.context)
    assert attempt.attributes is not None and root.attributes is not None
    assert attempt.attributes["twinlens.llm"] == "llm-1"
    assert root.attributes["gen_ai.usage.input_tokens"] == 9
    assert root.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert root.attributes["twinlens.time_to_first_token_seconds"] > 0
    assert "secret" not in str(dict(root.attributes))


async def test_each_attempt_is_a_span(tracing: MemoryTracing) -> None:
    gateway = Gateway(replicas=2, tracing=tracing)
    async with measured(gateway, tracing).generate(asked()) as events:
        gateway.on_event(routed(), delta(0, [10], "a"))
        gateway.lose("llm")
        gateway.on_event(routed("r", "llm-2", attempt=1), delta(1, [11], "b", "stop", attempt=1))
        await rest(events)
    lost, done, root = tracing.spans()
    assert [submit.traceparent for _, submit in gateway.submitted()] == [
        traceparent_of(lost.context),
        traceparent_of(done.context),
    ]
    assert error_of(lost).startswith("llm was lost")
    assert error_of(done) == error_of(root) == ""
    assert lost.attributes is not None and done.attributes is not None
    assert (lost.attributes["twinlens.attempt"], done.attributes["twinlens.attempt"]) == (0, 1)


@pytest.mark.parametrize(
    ("error", "outline"),
    [
        (InvalidRequest("image 0: a secret", stage="preprocess"), "InvalidRequest"),
        (Internal("the tower failed", stage="vision"), "the tower failed"),
    ],
)
async def test_a_failure_is_an_error_that_quotes_no_prompt(
    tracing: MemoryTracing, error: ServingError, outline: str
) -> None:
    core = MeasuredCore(FakeCore(error), tracing=tracing)
    with pytest.raises(ServingError):
        async with core.generate(asked()) as events:
            await rest(events)
    [root] = tracing.spans()
    assert root.attributes is not None
    assert root.attributes["error.type"] == error.code
    assert error_of(root) == outline


async def test_a_refused_request_is_a_span(tracing: MemoryTracing) -> None:
    core = MeasuredCore(FakeCore(refusal=Exhausted("the queue is full")), tracing=tracing)
    with pytest.raises(Exhausted):
        async with core.generate(asked()):
            pass
    [root] = tracing.spans()
    assert root.attributes is not None
    assert root.attributes["error.type"] == "Exhausted"


async def test_a_client_that_leaves_ends_the_spans(tracing: MemoryTracing) -> None:
    core = MeasuredCore(FakeCore(Piece(0, [1], "a", []), FOREVER), tracing=tracing)
    async with core.generate(asked()) as events:
        await anext(events)
    [root] = tracing.spans()
    assert root.attributes is not None
    assert root.attributes["gen_ai.response.finish_reasons"] == ("aborted",)
    assert not error_of(root)


async def test_without_tracing_the_stages_get_the_clients_span() -> None:
    gateway = Gateway()
    async with measured(gateway, NO_TRACING).generate(asked()):
        pass
    async with measured(gateway, NO_TRACING).generate(request("untraced")):
        pass
    assert [submit.traceparent for _, submit in gateway.submitted()] == [PARENT, ""]


@pytest.mark.parametrize(("header", "found"), [(PARENT, PARENT), ("00-xyz", "")])
def test_the_http_header_names_the_clients_span(header: str, found: str) -> None:
    core = FakeCore()
    client = TestClient(create_app(MeasuredCore(core)))
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = client.post("/v1/chat/completions", json=body, headers={"traceparent": header})
    assert answer.status_code == 200
    assert core.requests[0].traceparent == found


async def test_the_metadata_of_a_call_names_the_clients_span() -> None:
    core = FakeCore()
    async with grpc_server(core) as address, grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary(
            "/twinlens.inference.v1.InferenceService/Generate",
            inference_pb2.GenerateRequest.SerializeToString,
            inference_pb2.GenerateResponse.FromString,
        )
        await method(inference_pb2.GenerateRequest(text="Hi"), metadata=(("traceparent", PARENT),))
    assert core.requests[0].span.traceparent[3:35] == TRACE_ID
