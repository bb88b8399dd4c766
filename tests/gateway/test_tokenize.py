"""/tokenize and /detokenize, and their gRPC twins, in front of a core that answers by a script."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from starlette.testclient import TestClient

from common.messages import Converted
from common.wire import Tensor
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.conversions import read_converted
from services.gateway.generation import Conversion, GenerationRequest
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.gateway.fake_core import FakeCore, grpc_server

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "look"}}
FOUND = Conversion([5, 6, 7], None, "")


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    monkeypatch.setattr(FakeCore, "max_model_len", lambda self: 1000)
    return FakeCore(FOUND)


@pytest.fixture
def client(core: FakeCore) -> Iterator[TestClient]:
    with TestClient(create_app(MeasuredCore(core))) as client:
        yield client


@pytest.fixture
async def stub(core: FakeCore) -> AsyncIterator[Any]:
    async with grpc_server(core) as target, grpc.aio.insecure_channel(target) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def test_a_prompt_is_read_as_it_is(client: TestClient, core: FakeCore) -> None:
    answer = client.post("/tokenize", json={"prompt": "a<|im_end|>", "add_special_tokens": True})
    assert answer.json() == {
        "count": 3,
        "max_model_len": core.max_model_len(),
        "tokens": [5, 6, 7],
        "token_strs": None,
    }
    [request] = core.requests
    assert (request.task, request.prompt_kind, request.prompt) == (
        "tokenize",
        "text",
        b"a<|im_end|>",
    )


def test_messages_come_with_tools_and_options(client: TestClient, core: FakeCore) -> None:
    core.script = (Conversion([5], ["a"], ""),)
    body = {
        "messages": HELLO,
        "tools": [TOOL],
        "add_generation_prompt": False,
        "chat_template_kwargs": {"colour": "red"},
        "return_token_strs": True,
    }
    assert client.post("/tokenize", json=body).json()["token_strs"] == ["a"]
    [request] = core.requests
    options = json.loads(request.chat_options)
    assert [tool["function"]["name"] for tool in options["tools"]] == ["look"]
    assert (options["add_generation_prompt"], options["template_kwargs"]) == (
        False,
        {"colour": "red"},
    )
    assert (request.task, request.prompt_kind) == ("tokenize", "messages")
    assert request.returns_token_names and not request.reads_tool_calls


def test_tokens_become_text(client: TestClient, core: FakeCore) -> None:
    core.script = (Conversion([], None, "Hello"),)
    assert client.post("/detokenize", json={"tokens": [5, 6]}).json() == {"prompt": "Hello"}
    [request] = core.requests
    assert request.task == "detokenize"
    assert np.frombuffer(request.prompt, "<i8").tolist() == [5, 6]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": HELLO, "continue_final_message": True}, None),
        ("/tokenize", {"prompt": "a" * 10**6}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, None),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**31]}, "tokens[0]"),
        ("/detokenize", {"tokens": "ab"}, "tokens"),
        ("/detokenize", {"tokens": [5] * 5000}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(
    client: TestClient, core: FakeCore, path: str, body: dict[str, Any], param: str | None
) -> None:
    answer = client.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400 and not core.requests
    assert param is None or error["param"] == param, error


def test_another_model_is_not_found(client: TestClient) -> None:
    assert client.post("/tokenize", json={"prompt": "a", "model": "b"}).status_code == 404
    assert client.post("/detokenize", json={"tokens": [1], "model": "b"}).status_code == 404


# What preprocess sends


def tokens(**fields: Any) -> Converted:
    return Converted(request_id="r", attempt=0, **fields)


IDS = Tensor.of_int64([5, 6])


def asked(**fields: Any) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt_kind="text", prompt=b"", **fields)


def test_results_are_read() -> None:
    assert read_converted(tokens(token_ids=IDS), asked(task="tokenize")).token_ids == [5, 6]
    named = read_converted(
        tokens(token_ids=IDS, token_names=Tensor.of_text('["a", "b"]')),
        asked(task="tokenize", returns_token_names=True),
    )
    assert named.token_names == ["a", "b"]
    assert read_converted(tokens(text=Tensor.of_text("é")), asked(task="detokenize")).text == "é"


@pytest.mark.parametrize(
    ("message", "request_"),
    [
        (tokens(), asked(task="tokenize")),
        (tokens(token_ids=IDS), asked()),
        (tokens(token_ids=IDS), asked(task="detokenize")),
        (tokens(text=Tensor.of_text("a")), asked(task="tokenize")),
        (tokens(token_ids=IDS, text=Tensor.of_text("a")), asked(task="tokenize")),
        (tokens(token_ids=Tensor.of_text("a")), asked(task="tokenize")),
        (tokens(token_ids=IDS), asked(task="tokenize", returns_token_names=True)),
        (tokens(token_ids=IDS, token_names=Tensor.of_text("[]")), asked(task="tokenize")),
        (
            tokens(token_ids=IDS, token_names=Tensor.of_text('["a"]')),
            asked(task="tokenize", returns_token_names=True),
        ),
        (
            tokens(token_ids=IDS, token_names=Tensor.of_text("{")),
            asked(task="tokenize", returns_token_names=True),
        ),
        (tokens(text=Tensor.of_bytes(b"\xff")), asked(task="detokenize")),
    ],
)
def test_malformed_results_are_errors(message: Converted, request_: GenerationRequest) -> None:
    with pytest.raises(ValueError):
        read_converted(message, request_)


# gRPC


async def test_grpc_tokenizes_texts_and_conversations(stub: Any, core: FakeCore) -> None:
    answer = await stub.Tokenize(inference_pb2.TokenizeRequest(request_id="mine", raw_text="a"))
    assert (answer.request_id, list(answer.token_ids)) == ("mine", [5, 6, 7])
    assert answer.max_model_len == core.max_model_len()
    await stub.Tokenize(inference_pb2.TokenizeRequest(text="a"))
    chat = inference_pb2.Chat(
        messages=[message("user", text("a"))],
        tools=[inference_pb2.Tool(name="look")],
        add_generation_prompt=False,
    )
    await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
    kinds = [(request.task, request.prompt_kind) for request in core.requests]
    assert kinds == [("tokenize", kind) for kind in ("text", "messages", "messages")]
    assert json.loads(core.requests[2].chat_options)["add_generation_prompt"] is False


async def test_grpc_detokenizes(stub: Any, core: FakeCore) -> None:
    core.script = (Conversion([], None, "Hello"),)
    ids = inference_pb2.TokenIds(ids=[5, 6])
    answer = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids))
    assert answer.text == "Hello" and core.requests[0].task == "detokenize"


# Conversations over gRPC


def text(text: str) -> inference_pb2.ContentPart:
    return inference_pb2.ContentPart(text=text)


def message(role: str, *parts: inference_pb2.ContentPart, **fields: Any) -> Any:
    return inference_pb2.ChatMessage(role=role, parts=parts, **fields)


IMAGE = inference_pb2.ContentPart(image=inference_pb2.Placeholder())


async def prompt_of(stub: Any, core: FakeCore, *messages: Any, **fields: Any) -> Any:
    """Return the messages that the core gets of a conversation."""
    chat = inference_pb2.Chat(messages=messages, **fields)
    await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
    return json.loads(core.requests[-1].prompt)


async def test_a_conversation_with_calls_and_images(stub: Any, core: FakeCore) -> None:
    call = inference_pb2.ToolCall(id="1", name="look", arguments='{"at": 2}')
    found = await prompt_of(
        stub,
        core,
        message("developer", text("Be brief.")),
        message("user", text("What is"), IMAGE, text("?")),
        message("assistant", tool_calls=[call]),
        message("tool", IMAGE, tool_call_id="1"),
    )
    assert found == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is"},
                {"type": "image"},
                {"type": "text", "text": "?"},
            ],
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "look", "arguments": {"at": 2}},
                }
            ],
        },
        {"role": "tool", "content": [{"type": "image"}], "tool_call_id": "1"},
    ]


async def test_the_options_of_a_conversation(stub: Any, core: FakeCore) -> None:
    await prompt_of(
        stub,
        core,
        message("user", text("a")),
        message("assistant", text("b")),
        continue_final_message=True,
        template_kwargs='{"colour": "red"}',
    )
    options = json.loads(core.requests[0].chat_options)
    assert (options["continue_final_message"], options["add_generation_prompt"]) == (True, False)
    assert options["template_kwargs"] == {"colour": "red"}


@pytest.mark.parametrize(
    ("messages", "fields", "problem"),
    [
        ([], {}, "chat.messages"),
        ([message("robot", text("a"))], {}, r"chat.messages\[0\].role"),
        ([message("user", inference_pb2.ContentPart())], {}, r"parts\[0\]"),
        ([message("assistant", IMAGE)], {}, r"parts\[0\]"),
        ([message("tool", text("a"))], {}, "tool_call_id"),
        (
            [message("assistant", tool_calls=[inference_pb2.ToolCall(id="1", name="a")])] * 5000,
            {},
            "fields|4096",
        ),
        ([message("user", text("a"))], {"continue_final_message": True}, "continue_final_message"),
        ([message("user", text("a"))], {"template_kwargs": "[]"}, "template_kwargs"),
        ([message("user", text("a"))], {"template_kwargs": "{"}, "template_kwargs"),
    ],
)
async def test_wrong_conversations_are_refused(
    stub: Any, core: FakeCore, messages: Any, fields: Any, problem: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=problem) as error:
        await prompt_of(stub, core, *messages, **fields)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and not core.requests
