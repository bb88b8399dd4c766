"""The client of OpenAI-compatible servers against what servers really send."""

import argparse
from typing import Any

import aiohttp
import pytest

from services.commands.chat_client import (
    Answer,
    ChatClient,
    add_url_argument,
    api_key_of_user,
    choose_model,
    complete_patiently,
    image_part,
    read_retry_after,
)
from services.commands.client import ClientError
from services.commands.event_stream import EventReader
from tests.commands.scripted_server import (
    CHUNKED,
    STREAM,
    Script,
    event,
    response,
    scripted_server,
    text_event,
)
from tests.gateway.fake_core import TIMINGS, FakeCore, http_server
from tests.loopback import free_port

ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
END = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2})
DONE = b"data: [DONE]\n\n"


async def ask(*pieces: bytes, stream: bool = True) -> Answer:
    async with scripted_server(Script(list(pieces))) as url, ChatClient(url) as client:
        return await client.complete({"stream": stream})


def numbers(answer: Answer) -> list[int]:
    return [number for _, number in answer.token_times]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_events_are_found_whatever_ends_their_lines_and_however_they_are_cut(
    end: bytes, size: int
) -> None:
    lines = [b": ping", b"", b"data: a", b"", b"event: x", b"data:b", b"data:  c", b"", b"data: d"]
    sent = end.join(lines)
    reader = EventReader()
    events = [e for n in range(0, len(sent), size) for e in reader.feed(sent[n : n + size])]
    assert events + reader.close() == [b"a", b"b\n c", b"d"]


@pytest.mark.parametrize("separator", [b"\n\n", b"\r\n\r\n"])
async def test_a_stream_is_read_with_either_separator(separator: bytes) -> None:
    events = [ROLE, text_event("Hel"), b": ping\n\n", text_event("lo"), END, USAGE, DONE]
    answer = await ask(STREAM + b"".join(events).replace(b"\n\n", separator))
    assert (answer.text, answer.finish_reason, answer.error) == ("Hello", "stop", "")
    assert answer.usage == {"prompt_tokens": 3, "completion_tokens": 2}
    assert numbers(answer) == [1, 1]
    (first, _), (second, _) = answer.token_times
    assert 0 < first <= second <= answer.finish_seconds <= answer.seconds


async def test_tokens_are_counted_by_their_ids_or_by_continuous_usage() -> None:
    ids = text_event("Hel", token_ids=[1, 2])
    counted = event(choices=[{"delta": {"content": "lo"}}], usage={"completion_tokens": 3})
    answer = await ask(STREAM, ids, text_event("", token_ids=[3]), END, DONE)
    assert numbers(answer) == [2, 1]
    assert answer.token_ids == [1, 2, 3]
    assert numbers(await ask(STREAM, counted, END, DONE)) == [3]


async def test_reasoning_counts_as_tokens_but_not_as_text() -> None:
    thought = event(choices=[{"delta": {"reasoning_content": "hm"}}])
    answer = await ask(STREAM, thought, text_event("yes"), END, DONE)
    assert (answer.text, numbers(answer)) == ("yes", [1, 1])


async def test_calls_of_tools_count_as_tokens_and_their_arguments_as_text() -> None:
    parts = [{"name": "f", "arguments": ""}, {"arguments": '{"x"'}, {"arguments": ":1}"}]
    deltas = [{"tool_calls": [{"index": 0, "function": part}]} for part in parts]
    sent = [event(choices=[{"index": 0, "delta": delta}]) for delta in deltas]
    answer = await ask(STREAM, ROLE, *sent, END, DONE)
    assert (answer.text, numbers(answer)) == ('{"x":1}', [1, 1, 1])


async def test_done_may_be_missing_and_so_may_the_finish_reason_but_not_both() -> None:
    assert (await ask(STREAM, text_event("a"), END)).error == ""
    assert (await ask(STREAM, text_event("a"), DONE)).finish_reason == "stop"
    answer = await ask(STREAM, text_event("a"))
    assert (answer.error, answer.finish_reason) == ("the stream ended before the answer did", "")
    assert answer.is_broken


async def test_an_error_in_the_stream_fails_the_answer() -> None:
    answer = await ask(STREAM, text_event("a"), event(error={"message": "no llm"}), END, DONE)
    assert (answer.error, answer.text, answer.status) == ("no llm", "a", 200)
    assert answer.finish_reason == ""


async def test_a_connection_lost_in_the_middle_fails_the_answer() -> None:
    event = text_event("a")
    chunk = f"{len(event):x}\r\n".encode() + event + b"\r\n"
    answer = await ask(CHUNKED, chunk)
    assert (answer.text, answer.status, answer.is_broken) == ("a", 200, True)
    assert answer.error.startswith("the connection failed")


@pytest.mark.parametrize("sent", [b"data: nonsense\n\n", b'data: {"choices": [1]}\n\n'])
async def test_a_malformed_event_fails_the_answer(sent: bytes) -> None:
    assert "cannot be read" in (await ask(STREAM, sent, END, DONE)).error


async def test_a_whole_answer_is_read() -> None:
    choice = {"message": {"content": "Hello"}, "finish_reason": "length", "token_ids": [1]}
    body = {"choices": [choice], "usage": {"completion_tokens": 1}, "timings": {"a": 1.0}}
    answer = await ask(response(200, body), stream=False)
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("Hello", "length", [1])
    assert (answer.usage, answer.timings) == ({"completion_tokens": 1}, {"a": 1.0})
    assert answer.token_times == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"error": {"message": "full"}}, "full"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"detail": "Not Found"}, "Not Found"),
        (b"<html>", "<html>"),
        (b"", "status 429"),
    ],
    ids=str,
)
async def test_an_error_status_is_recorded_with_the_servers_words(body: Any, text: str) -> None:
    answer = await ask(response(429, body, "retry-after: 2"))
    assert (answer.status, answer.error, answer.retry_after) == (429, text, 2.0)
    assert not answer.is_broken


async def test_anything_but_a_chat_completion_fails_the_answer() -> None:
    assert "<html>" in (await ask(response(200, b"<html>"))).error
    assert "oops" in (await ask(response(200, {"error": {"message": "oops"}}))).error


async def test_a_patient_request_waits_for_a_busy_server_and_survives_a_lost_connection() -> None:
    busy = response(429, {"error": {"message": "full"}}, "retry-after-ms: 1")
    script = Script([busy], [STREAM, text_event("a")], [STREAM, text_event("b"), END, DONE])
    async with scripted_server(script) as url, ChatClient(url) as client:
        assert (await complete_patiently(client, {"stream": True})).text == "b"
    assert len(script.bodies) == 3


async def test_patience_ends() -> None:
    script = Script([response(503, b"starting", "retry-after: 9")])
    async with scripted_server(script) as url, ChatClient(url) as client:
        answer = await complete_patiently(client, {}, patience=8)
    assert (answer.error, len(script.bodies)) == ("starting", 1)


async def test_a_refused_request_is_not_repeated() -> None:
    script = Script([response(400, b"bad")])
    async with scripted_server(script) as url, ChatClient(url) as client:
        assert (await complete_patiently(client, {})).error == "bad"
    assert len(script.bodies) == 1


async def test_a_server_that_is_not_there_is_recorded() -> None:
    async with ChatClient(f"http://127.0.0.1:{free_port()}/v1") as client:
        answer = await client.complete({})
        assert (answer.status, answer.is_broken) == (0, True)
        with pytest.raises(ClientError, match=r"nothing answers at .*--url"):
            await client.models()


async def test_a_slow_answer_ends_with_the_timeout() -> None:
    async with http_server(FakeCore()) as port:
        url = f"http://127.0.0.1:{port}/v1"
        async with ChatClient(url, timeout=1e-6) as client:
            answer = await client.complete({})
    assert "within 1e-06 s" in answer.error and answer.has_timed_out


async def test_the_model_is_the_first_or_one_that_is_served() -> None:
    script = Script([response(200, {"data": [{"id": "a"}, {"id": "b"}]})])
    async with scripted_server(script) as url, ChatClient(url) as client:
        assert await choose_model(client, "") == "a"
        assert await choose_model(client, "b") == "b"
        with pytest.raises(ClientError, match="has no model 'c'; it serves a, b"):
            await choose_model(client, "c")


async def test_a_server_that_does_not_list_its_models_is_believed_to_have_the_wanted_one() -> None:
    async with (
        scripted_server(Script([response(404, b"no such path")])) as url,
        ChatClient(url) as client,
    ):
        assert await choose_model(client, "a") == "a"
        with pytest.raises(ClientError, match="status 404: no such path"):
            await choose_model(client, "")


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    script = Script([response(200, {"data": [{"id": "a"}]})])
    async with scripted_server(script) as url, ChatClient(url) as client:
        await client.models()
    assert "authorization: bearer secret\r\n" in script.heads[0].lower()


async def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a secret\n")
    assert api_key_of_user() == "a secret"
    monkeypatch.setenv("OPENAI_API_KEY", "a\nsecret")
    with pytest.raises(ClientError, match="OPENAI_API_KEY") as failed:
        await ChatClient("http://h/v1").__aenter__()
    assert "secret" not in str(failed.value)


async def test_an_address_that_does_not_answer_is_no_late_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def connect(*_: Any, **__: Any) -> None:
        raise aiohttp.ConnectionTimeoutError("no route")

    async with ChatClient("http://h/v1", timeout=60) as client:
        monkeypatch.setattr(aiohttp.ClientSession, "post", connect)
        answer = await client.complete({})
    assert (answer.error, answer.is_broken) == ("the connection failed: no route", True)
    assert not answer.has_timed_out


@pytest.mark.parametrize(
    ("sent", "seconds"),
    [("retry-after", 2.0), ("retry-after-ms", 0.002), ("x", None), ("retry-after-ms nan", None)],
)
def test_only_a_number_of_seconds_is_a_time_to_wait(sent: str, seconds: float | None) -> None:
    name, _, value = sent.partition(" ")
    assert read_retry_after({name: value or "2"}) == seconds
    assert read_retry_after({"retry-after": "inf"}) is None


async def test_our_own_gateway_answers_with_usage_timings_and_ids() -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    async with (
        http_server(FakeCore()) as port,
        ChatClient(f"http://127.0.0.1:{port}/v1") as client,
    ):
        answer = await client.complete(body)
        del body["stream"], body["stream_options"]
        whole = await client.complete(body)
    assert (answer.text, answer.token_ids, answer.error) == ("Hello", [10, 11, 12], "")
    assert answer.usage["completion_tokens"] == 3
    assert answer.timings == TIMINGS
    assert (whole.text, whole.token_ids, whole.timings) == ("Hello", [10, 11, 12], TIMINGS)


def test_an_image_becomes_a_part_with_its_own_media_type() -> None:
    part = image_part(b"\xff\xd8\xff123")
    assert part["image_url"]["url"] == "data:image/jpeg;base64,/9j/MTIz"
    with pytest.raises(ClientError, match="not a PNG"):
        image_part(b"BM")


def test_the_url_must_be_one() -> None:
    parser = argparse.ArgumentParser()
    add_url_argument(parser)
    assert parser.parse_args(["--url", "http://h:1/v1/"]).url == "http://h:1/v1"
    for wrong in ("h:1", "http://", "http://h:port/v1", "http://[::1/v1"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--url", wrong])
