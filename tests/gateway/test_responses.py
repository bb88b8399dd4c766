"""POST /v1/responses, read by the types of the openai client."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from common.errors import Unavailable, UnreadableImage
from common.messages import Usage
from services.gateway.generation import Began, Ended, Piece
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.gateway.fake_core import HELLO, TIMINGS, FakeCore

PATH = "/v1/responses"
PIXEL = "data:image/png;base64,aGVsbG8="
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
USAGE = Usage(prompt_tokens=9, image_tokens=4, completion_tokens=3)
CALLS = (
    Began(None),
    Piece(0, [1], "I look. ", []),
    Piece(
        1,
        [2],
        "",
        [],
        tool_calls=[{"index": 0, "id": "call_a", "name": "look", "arguments": ""}],
    ),
    Piece(2, [3], "", [], tool_calls=[{"index": 0, "arguments": '{"page":'}]),
    Piece(
        3,
        [4],
        "",
        [],
        tool_calls=[
            {"index": 0, "arguments": "1}"},
            {"index": 1, "id": "call_b", "name": "look", "arguments": "{}"},
        ],
    ),
    Ended("tool_calls", USAGE, TIMINGS),
)


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def client(core: FakeCore) -> Iterator[TestClient]:
    with TestClient(create_app(MeasuredCore(core), max_body_bytes=10_000)) as client:
        yield client


def create(client: TestClient, **body: Any) -> Response:
    """Return a response as the openai client reads it."""
    found = client.post(PATH, json={"input": "hi"} | body)
    assert found.status_code == 200, found.text
    return Response.model_validate(found.json(), strict=True)


def stream(client: TestClient, **body: Any) -> list[Any]:
    """Return the events of a stream as the openai client reads them."""
    text = client.post(PATH, json={"input": "hi", "stream": True} | body).text
    *events, end, nothing = text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    found = []
    for number, event in enumerate(events):
        head, data = event.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert head == f"event: {content['type']}" and content["sequence_number"] == number
        found.append(EVENT.validate_python(content))
    return found


def prompt(core: FakeCore) -> Any:
    return json.loads(core.requests[-1].prompt)


def refusal(client: TestClient, **body: Any) -> dict[str, Any]:
    found = client.post(PATH, json={"input": "hi"} | body)
    assert found.status_code == 400, found.text
    error: dict[str, Any] = found.json()["error"]
    return error


def test_a_text_is_answered_with_a_message(client: TestClient, core: FakeCore) -> None:
    found = create(client, instructions="be brief", max_output_tokens=7, temperature=0.5)
    assert (found.status, found.output_text, found.store) == ("completed", "Hello", False)
    assert found.usage and (found.usage.input_tokens, found.usage.output_tokens) == (9, 3)
    assert found.temperature == 0.5 and found.max_output_tokens == 7
    asked = core.requests[0]
    assert prompt(core) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    assert (asked.stopping.max_tokens, asked.sampling.temperature) == (7, 0.5)


def test_items_become_messages_with_their_images(client: TestClient, core: FakeCore) -> None:
    image = {"type": "input_image", "image_url": PIXEL, "detail": "auto"}
    items = [
        {"role": "developer", "content": "d"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, image],
        },
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
        },
        {"role": "user", "content": "c"},
    ]
    create(client, input=items)
    assert prompt(core) == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    assert core.requests[0].images == (b"hello",)


def test_a_stream_has_the_events_of_its_items_in_order(client: TestClient) -> None:
    events = stream(client)
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0].response.output == []
    assert [event.delta for event in events[4:6]] == ["Hel", "lo"]
    assert events[-1].response.output_text == events[6].text == "Hello"
    assert events[-2].item.status == "completed"


def test_calls_of_tools_are_items(client: TestClient, core: FakeCore) -> None:
    core.script = CALLS
    whole = create(client)
    message, first, second = whole.output
    assert message.type == "message" and whole.output_text == "I look. "
    assert first.type == second.type == "function_call"
    assert (first.call_id, first.name, first.arguments) == ("call_a", "look", '{"page":1}')
    assert (second.call_id, second.arguments, second.status) == ("call_b", "{}", "completed")
    events = stream(client)
    assert (
        events[-1].response.output
        == whole.model_copy(update={"output": events[-1].response.output}).output
    )
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[4:] == [
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.output_index for event in events[4:-1]] == [0] * 4 + [1] * 5 + [2] * 4
    assert events[11].arguments == '{"page":1}'


def test_an_answer_that_is_cut_off_is_incomplete(client: TestClient, core: FakeCore) -> None:
    core.script = (*HELLO[:-1], Ended("length", USAGE, TIMINGS))
    found = create(client)
    assert found.status == "incomplete" and found.incomplete_details
    assert found.incomplete_details.reason == "max_output_tokens"
    assert stream(client)[-1].type == "response.incomplete"


def test_an_empty_answer_is_an_empty_message(client: TestClient, core: FakeCore) -> None:
    core.script = (Began(None), Piece(0, [1], "", []), Ended("stop", USAGE, TIMINGS))
    found = create(client)
    assert [item.type for item in found.output] == ["message"] and found.output_text == ""


def test_log_probabilities_come_if_they_are_asked_for(client: TestClient, core: FakeCore) -> None:
    found = create(client, include=["message.output_text.logprobs"], top_logprobs=1)
    [message] = found.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs and (logprobs[0].token, logprobs[0].top_logprobs[0].logprob) == ("Hel", -0.5)
    assert core.requests[0].sampling.num_logprobs == 1
    assert stream(client, top_logprobs=1)[4].logprobs[0].token == "Hel"


def test_a_failure_after_the_begin_is_the_last_event(client: TestClient, core: FakeCore) -> None:
    core.script = (*HELLO[:2], Unavailable("the llm is gone", stage="llm"))
    last = stream(client)[-1]
    assert last.type == "response.failed" and last.response.error.message == "the llm is gone"


def test_a_failure_before_the_begin_is_an_http_error(client: TestClient, core: FakeCore) -> None:
    core.script = (UnreadableImage("image 0: this is no image", item=0),)
    found = client.post(PATH, json={"input": "hi", "stream": True})
    assert found.status_code == UnreadableImage.http_status
    assert found.json()["error"]["image"] == 0


def test_a_format_becomes_a_guide(client: TestClient, core: FakeCore) -> None:
    schema = {"type": "object"}
    format = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    found = create(client, text={"format": format})
    assert (core.requests[0].guide_kind, json.loads(core.requests[0].guide)) == (
        "json_schema",
        schema,
    )
    assert found.text and found.text.format and found.text.format.type == "json_schema"


def test_fields_of_chat_completions_are_taken_too(client: TestClient, core: FakeCore) -> None:
    create(client, top_k=3, seed=4, stop=["x"], ignore_eos=True)
    asked = core.requests[0]
    assert (asked.sampling.top_k, asked.sampling.seed, asked.stopping.stop) == (3, 4, ("x",))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "middle"}, "truncation"),
        ({"include": ["web"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"colour": 1}}, "reasoning.colour"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "a", "zoom": 1}]}, "input[0].zoom"),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": "a"},
                    {"role": "user", "content": [{"type": "input_image", "image_url": "ftp://x"}]},
                ]
            },
            "input[1].content[0].image_url",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a", "colour": 1}]}, "tools[0].colour"),
        ({"tools": [LOOK, LOOK]}, "tools[1].name"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "b"}}, "tool_choice.name"),
        ({"tools": [LOOK], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_own_name(
    client: TestClient, body: dict[str, Any], param: str
) -> None:
    error = refusal(client, **body)
    is_too_long = error["code"] == "context_length_exceeded"
    begin = "This model's maximum context length is 4096 tokens" if is_too_long else param
    assert error["param"] == param and error["message"].startswith(begin)


def test_nothing_is_stored_and_whoever_asks_is_told_so(client: TestClient) -> None:
    for method, path in (("GET", "/x"), ("DELETE", "/x"), ("POST", "/x/cancel")):
        found = client.request(method, PATH + path)
        assert found.status_code == 404 and "not stored" in found.json()["error"]["message"]


# Truncation

LONG: list[dict[str, Any]] = [
    {"role": "system", "content": "s" * 50},
    {"role": "user", "content": "a" * 1000},
    {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "o" * 1500},
    {"role": "assistant", "content": "b" * 1500},
    {"role": "user", "content": "c" * 1000},
]


def contents(core: FakeCore) -> list[str]:
    """Return the first letters of the messages of the request that was answered."""
    return [message["content"][:1] for message in json.loads(core.requests[-1].prompt)]


@pytest.mark.parametrize(
    ("max_output_tokens", "kept"),
    [(1, ["s", "b", "c"]), (1300, ["s", "b", "c"]), (1600, ["s", "c"]), (2900, ["s", "c"])],
)
def test_the_oldest_items_are_dropped_until_the_answer_fits(
    client: TestClient, core: FakeCore, max_output_tokens: int, kept: list[str]
) -> None:
    found = create(client, input=LONG, truncation="auto", max_output_tokens=max_output_tokens)
    assert contents(core) == kept and found.truncation == "auto"


def test_what_fits_is_not_truncated(client: TestClient, core: FakeCore) -> None:
    create(client, input=LONG[4:], truncation="auto", max_output_tokens=10)
    assert contents(core) == ["b", "c"]
    assert [asked.task for asked in core.requests] == ["tokenize", "generate"]
    create(client, input="hi", truncation="auto")
    create(client, input=LONG, truncation="disabled", max_output_tokens=10)
    assert len(contents(core)) == 6, "the core decides whether it fits"
