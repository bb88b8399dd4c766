"""A replay asks what was asked, at the recorded pace, and says which answers are different."""

import argparse
import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from common.messages import Stopping
from common.recording import (
    Answered,
    Asked,
    BadRecording,
    Exchange,
    File,
    RecordedItem,
    Started,
    file_hash,
    frame,
    read_recording,
)
from services.cli import make_parser
from services.commands.replay import sending
from services.commands.replay.bodies import grpc_request, http_body, needs_grpc
from services.commands.replay.command import run, speed
from services.commands.replay.compare import compare
from services.commands.replay.http_sender import pooled_outcome
from services.commands.replay.outcome import Outcome, Replayed
from services.commands.replay.pace import send_at_once, send_at_pace
from services.gateway.generation import GenerationRequest
from services.gateway.grpc_messages import to_request
from services.gateway.grpc_wire import split_media
from services.gateway.pooling_schema import parse_classify, parse_embeddings, to_embeddings
from services.gateway.pooling_schema import to_pooling as http_pooling
from services.gateway.recorder import asked as record_of
from services.gateway.recorder import bytes_of, recorded_item
from services.gateway.schema import chat_to_generation, parse_chat
from tests.gateway.fake_core import FakeCore, http_server
from tests.loopback import free_port

PNG = b"\x89PNG\r\n\x1a\n not decoded here"
JPEG = b"\xff\xd8\xff not decoded here"
TEXT = [{"role": "user", "content": "Hello"}]


def exchange(request: GenerationRequest, answered: Answered | None = None) -> Exchange:
    items = [recorded_item(media) for media in request.images]
    return Exchange(record_of(request, items, 0, 0.0), 0.0, answered)


def files_of(request: GenerationRequest) -> dict[str, bytes]:
    return {file_hash(bytes_of(media)): bytes(bytes_of(media)) for media in request.images}


def read_http(body: dict[str, Any], task: str = "generate") -> GenerationRequest:
    """Return the request that the gateway reads in a body."""
    encoded = msgspec.json.encode(body)
    if task == "classify":
        messages = parse_classify(encoded).messages
        assert messages
        return http_pooling("classify", messages, "r", None, 4096)
    if task == "embed":
        return to_embeddings(parse_embeddings(encoded), "r", None, 4096)[0]
    return chat_to_generation(parse_chat(encoded), "r", None, 4096)


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(data)}}


def uri(data: bytes) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(data).decode()


VIDEO_PARTS = [
    image(JPEG) | {"min_pixels": 4, "max_pixels": 9},
    {"type": "video", "video": [uri(PNG), uri(JPEG)], "fps": 4.0, "max_pixels": 9},
    {"type": "video_url", "video_url": {"url": uri(b"an MP4 file")}},
    {"type": "text", "text": "What happens?"},
]
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "number"}}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "F.", "parameters": SCHEMA, "strict": True},
}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
LOOP = [
    *TEXT,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": [image(PNG)]},
]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("generate", {"messages": TEXT, "return_token_ids": True}),
    ("generate", {"messages": TEXT, "return_token_ids": True, "temperature": 0.0, "seed": 0}),
    (
        "generate",
        {
            "messages": [
                {"role": "system", "content": "Answer."},
                {"role": "user", "content": VIDEO_PARTS},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": [image(PNG)]},
            ],
            "return_token_ids": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "seed": 2**63 - 1,
            "max_tokens": 100,
            "min_tokens": 5,
            "ignore_eos": True,
            "stop": ["\n\n", "end"],
            "stop_token_ids": [7],
            "skip_special_tokens": False,
            "logprobs": True,
            "top_logprobs": 3,
        },
    ),
    (
        "generate",
        {
            "messages": TEXT,
            "return_token_ids": True,
            "logprobs": True,
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        },
    ),
    (
        "generate",
        {"messages": TEXT, "return_token_ids": True, "response_format": {"type": "json_object"}},
    ),
    (
        "generate",
        {
            "messages": TEXT,
            "return_token_ids": True,
            "n": 3,
            "priority": -2,
            "logit_bias": {"5": -100, "7": 2.5},
            "allowed_token_ids": [3, 5],
            "bad_words": ["no"],
            "no_repeat_ngram_size": 8,
            "include_stop_str_in_output": True,
            "repetition_detection": {"max_pattern_size": 20, "min_count": 4},
            "prompt_logprobs": 1,
        },
    ),
    *[
        ("generate", {"messages": TEXT, "return_token_ids": True, "structured_outputs": guide})
        for guide in (
            {"choice": ["a", "b"]},
            {"regex": "a+"},
            {"grammar": 'root ::= "a"'},
            {"json": SCHEMA, "whitespace_pattern": " ?"},
        )
    ],
    (
        "generate",
        {
            "messages": [*TEXT, {"role": "assistant", "content": "The total is"}],
            "return_token_ids": True,
            "continue_final_message": True,
            "chat_template_kwargs": {"colour": "red"},
        },
    ),
    ("generate", {"messages": LOOP, "return_token_ids": True, "tools": [TOOL]}),
    *[
        ("generate", {"messages": TEXT, "return_token_ids": True, "tools": [TOOL], **choice})
        for choice in (
            {"tool_choice": "required"},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            {"parallel_tool_calls": False, "response_format": {"type": "json_object"}},
            {"tool_choice": "none"},
        )
    ],
    ("classify", {"messages": [{"role": "user", "content": [image(PNG)]}]}),
    ("embed", {"input": ["a text"]}),
    ("embed", {"messages": [{"role": "user", "content": [image(PNG)]}]}),
]


@pytest.mark.parametrize(("task", "body"), BODIES)
def test_over_http_the_gateway_reads_the_recorded_request_again(
    task: str, body: dict[str, Any]
) -> None:
    request = read_http(body, task)
    again = http_body(exchange(request), "m", files_of(request).__getitem__)
    assert read_http(again, task) == request


@pytest.mark.parametrize("kind", ["GenerateStreamRequest", "ClassifyRequest", "EmbedRequest"])
@pytest.mark.parametrize("ids", [True, False])
def test_over_grpc_the_gateway_reads_the_recorded_request_again(kind: str, ids: bool) -> None:
    from proto.twinlens.inference.v1 import inference_pb2 as pb

    fields: dict[str, Any] = {"images": [pb.Image(data=PNG), pb.Image(data=JPEG, max_pixels=9)]}
    fields |= {"token_ids": pb.TokenIds(ids=[1, 2, 2**32 - 1])} if ids else {"text": "What?"}
    if kind == "GenerateStreamRequest":
        fields["sampling"] = pb.SamplingParams(temperature=0.7, seed=9)
        fields["stopping"] = pb.StoppingParams(max_tokens=9, stop=["x"])
        fields["response"] = pb.ResponseOptions(num_logprobs=2, skip_special_tokens=False)
        fields["guide"] = pb.GuideParams(regex="a+")
        fields["sampling"].logit_bias[7] = 1.5
        fields["sampling"].bad_words.append("no")
        fields["stopping"].repetition_detection.max_pattern_size = 20
        fields["stopping"].repetition_detection.min_count = 4
        fields["n"] = 2
        fields["priority"] = -3
        fields["videos"] = [pb.Video(frames=[pb.Image(data=PNG)], fps=2), pb.Video(file=b"MP4")]
    request = read_grpc(getattr(pb, kind)(**fields))
    assert needs_grpc(exchange(request).asked) == ids
    again = grpc_request(exchange(request), files_of(request).__getitem__)
    assert read_grpc(again) == request


def read_grpc(message: Any) -> GenerationRequest:
    split = split_media(message.SerializeToString(), 4096)
    kind = type(message)
    return to_request(kind.FromString(split.request), split.media, "r", None, 4096)


def test_a_request_is_sent_to_its_adapter_again() -> None:
    request = replace(read_http({"messages": TEXT}, "generate"), adapter="a")
    read = files_of(request).__getitem__
    assert http_body(exchange(request), "m", read)["model"] == "a"
    assert grpc_request(exchange(request), read).model == "a"


def test_an_aborted_request_asks_for_the_tokens_that_it_got() -> None:
    request = GenerationRequest(
        request_id="r",
        prompt_kind="messages",
        prompt=json.dumps(TEXT).encode(),
        stopping=Stopping(min_tokens=50),
    )
    answered = Answered(number=0, outcome="aborted", seconds=1.0, token_ids=[1, 2, 3])
    body = http_body(exchange(request, answered), "m", {}.__getitem__)
    assert (body["max_tokens"], body["min_tokens"]) == (3, 3)


# What the comparison says


def answered(outcome: str = "stop", **fields: Any) -> Answered:
    return Answered(number=0, outcome=outcome, seconds=1.0, **fields)


def outcome(finish_reason: str = "stop", **fields: Any) -> Outcome:
    return Outcome(finish_reason=finish_reason, **fields)


def values(*numbers: float) -> bytes:
    return np.array(numbers, "<f4").tobytes()


@pytest.mark.parametrize(
    ("before", "now", "verdict", "first"),
    [
        (answered(token_ids=[1, 2]), outcome(token_ids=[1, 2]), "equal", None),
        (answered(token_ids=[1, 2]), outcome(token_ids=[1, 3]), "differs", 1),
        (answered(token_ids=[1, 2]), outcome(token_ids=[1]), "differs", 1),
        (answered(token_ids=[1]), outcome(token_ids=[1, 2]), "differs", 1),
        (answered(token_ids=[1], text="ab"), outcome(text="ab"), "equal", None),
        (answered(token_ids=[1], text="ab"), outcome(text="aX"), "differs", 1),
        (answered(token_ids=[1]), outcome("length", token_ids=[1]), "differs", None),
        (answered("tool_calls", text="{}"), outcome(text="{}"), "equal", None),
        (answered(text="{}"), outcome("tool_calls", text="{}"), "differs", None),
        (answered(token_ids=[1]), Outcome(error="no"), "failed", None),
        (answered("aborted", token_ids=[1]), outcome("length", token_ids=[1]), "equal", None),
        (answered("aborted", token_ids=[1]), outcome(token_ids=[2]), "differs", 0),
        (answered("aborted", text="ab"), outcome(text="abc"), "equal", None),
        (answered("Internal"), Outcome(error="no"), "failed_again", None),
        (answered("Internal"), outcome(text="yes"), "answered_now", None),
        (None, outcome(text="yes"), "not_comparable", None),
        (None, Outcome(error="no"), "failed", None),
        (answered(), None, "skipped", None),
        (answered("pooled", values=values(1, 2)), outcome(values=[1, 2.0001]), "equal", None),
        (answered("pooled", values=values(1, 2)), outcome(values=[1, 2.1]), "differs", 1),
        (answered("pooled", values=values(1, 2)), outcome(values=[1]), "differs", None),
        (answered("pooled", values=values(1)), outcome(values=[float("nan")]), "differs", 0),
    ],
)
def test_verdicts(
    before: Answered | None, now: Outcome | None, verdict: str, first: int | None
) -> None:
    request = GenerationRequest(request_id="r", prompt_kind="messages", prompt=b"[]")
    found = compare(Replayed(exchange(request, before), now))
    assert (found.verdict, found.first_difference) == (verdict, first)


# Pace


def at(*arrivals: float) -> list[Exchange]:
    asked = Asked(number=0, request_id="r", arrival=0, prompt_kind="messages", prompt=b"[]")
    return [Exchange(asked, arrival) for arrival in arrivals]


async def test_requests_are_sent_when_they_are_due_even_if_none_is_answered() -> None:
    sent: list[float] = []
    all_sent = asyncio.Event()

    async def send(exchange: Exchange) -> Outcome:
        sent.append(exchange.arrival)
        if len(sent) == 3:
            all_sent.set()
        await all_sent.wait()
        return Outcome()

    began = time.monotonic()
    replayed: list[Replayed] = []
    await send_at_pace(at(0.0, 0.3, 0.1), send, 10.0, replayed.append)
    assert sent == [0.0, 0.1, 0.3] and time.monotonic() - began >= 0.03
    assert {one.exchange.arrival for one in replayed} == {0.0, 0.1, 0.3}


async def test_at_most_a_number_of_requests_is_in_flight_at_full_speed() -> None:
    in_flight = 0
    most = 0

    async def send(exchange: Exchange) -> Outcome:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0)
        in_flight -= 1
        if exchange.arrival == 2.0:
            raise BadRecording("it is damaged")
        return Outcome()

    replayed: list[Replayed] = []
    await send_at_once(at(*map(float, range(9))), send, 3, replayed.append)
    assert most == 3 and {one.exchange.arrival for one in replayed} == set(range(9))
    failed = [one for one in replayed if one.outcome and one.outcome.error]
    assert [one.exchange.arrival for one in failed] == [2.0]


@pytest.mark.parametrize(("text", "value"), [("2", 2.0), ("0", np.inf), ("max", np.inf)])
def test_speeds(text: str, value: float) -> None:
    assert speed(text) == value


@pytest.mark.parametrize("text", ["-1", "nan", "fast", ""])
def test_wrong_speeds_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        speed(text)


# The command


def write(path: Path, *records: Any) -> Path:
    started = Started(twinlens="1", model="org/tiny", time=0.0)
    path.write_bytes(b"".join(part for one in [started, *records] for part in frame(one)))
    return path


def text_request(number: int, **fields: Any) -> Asked:
    prompt = json.dumps(TEXT).encode()
    whole: dict[str, Any] = {"prompt_kind": "messages", "prompt": prompt} | fields
    return Asked(number=number, request_id=f"r{number}", arrival=0.01 * number, **whole)


def run_replay(*flags: str) -> int:
    arguments = make_parser().parse_args(["replay", *flags])
    return run(arguments)


def test_ctrl_c_reports_what_was_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send_one(recording: Any, _: Any, replayed: list[Replayed]) -> None:
        replayed.append(Replayed(recording.exchanges[0], outcome(text="Hello", seconds=1.0)))
        raise KeyboardInterrupt

    monkeypatch.setattr(sending, "send_all", send_one)
    path = write(
        tmp_path / "traffic",
        text_request(0),
        Answered(number=0, outcome="stop", seconds=1.0, text="Hello"),
        text_request(1),
    )
    assert run_replay(str(path), "--json") == 130
    summary = json.loads(capsys.readouterr().out)
    assert (summary["is_interrupted"], summary["requests"], summary["equal"]) == (True, 1, 1)


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "traffic", text_request(0))
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    assert run_replay(str(path), "--url", nowhere, "--out", str(path / "out")) == 1
    assert capsys.readouterr().err == f"twinlens: cannot write {path}/out: not a directory\n"


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ({"data": [{"probs": [1, 0.5]}]}, [1.0, 0.5]),
        ({"data": [{"embedding": "AACAPw=="}]}, [1.0]),
        ({"data": [{"embedding": "A"}]}, []),
        ({"data": [{"probs": [None]}]}, []),
        ({"data": []}, []),
    ],
)
def test_the_values_of_an_answer_are_read_or_it_has_failed(
    body: dict[str, Any], numbers: list[float]
) -> None:
    found = pooled_outcome(200, msgspec.json.encode(body))
    assert found.values == numbers
    assert ("has no values" in found.error) == (not numbers)


async def test_a_recording_is_replayed_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"text": "Hello", "token_ids": [10, 11, 12]}
    path = write(
        tmp_path / "traffic",
        text_request(0),
        Answered(number=0, outcome="stop", seconds=1.0, first_token_seconds=0.5, **same),
        text_request(1, prompt_kind="token_ids", prompt=b"\1" + bytes(7)),
        text_request(2),
        Answered(number=2, outcome="stop", seconds=1.0, text="Hallo", token_ids=[10, 9]),
    )
    core = FakeCore()
    async with http_server(core) as port:
        flags = (str(path), "--url", f"http://127.0.0.1:{port}/v1", "--speed", "max")
        out = str(tmp_path / "new" / "out")
        status = await asyncio.to_thread(run_replay, *flags, "--out", out)
        whole = await asyncio.to_thread(run_replay, *flags, "--allow-differences", "--json")
    assert (status, whole) == (1, 0)
    *_, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert [summary[name] for name in ("equal", "differs", "skipped")] == [1, 1, 1]
    assert summary["recorded_e2e_p50_seconds"] == 1.0 and summary["ttft_p50_seconds"] == 0.75
    lines = (tmp_path / "new" / "out" / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["verdict"] for line in lines] == ["equal", "skipped", "differs"]
    assert (tmp_path / "new" / "out" / "requests.jsonl").stat().st_mode & 0o77 == 0


def test_a_recording_is_listed_without_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    item = RecordedItem(hash=file_hash(PNG))
    path = write(
        tmp_path / "traffic",
        File(hash=file_hash(PNG), data=PNG),
        text_request(0, items=(item,)),
        Answered(number=0, outcome="Internal", error="a\x1b[31m bug", seconds=1.0),
        text_request(1),
    )
    assert run_replay(str(path), "--list") == 0
    text = capsys.readouterr().out
    assert "2 requests" in text and "unknown" in text and "\\u001b[31m bug" in text
    assert run_replay(str(path), "--list", "--json", "--requests", "1") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["outcome"] for one in listed["requests"]] == ["Internal"]


def whole_record(body: bytes) -> bytes:
    return b"\xc6" + len(body).to_bytes(4, "big") + body


START = whole_record(msgspec.msgpack.encode(Started(twinlens="1", model="m", time=0.0)))
NEWER = whole_record(msgspec.msgpack.encode(Started(version=2, twinlens="2", model="m", time=0.0)))
DEEP = whole_record(b"\x91" * 100_000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a recording"),
        (PNG, "not a recording"),
        (b"\xc6\xff\xff\xff\xff", "not a recording"),
        (whole_record(b"\x80"), "not a recording"),
        (DEEP, "not a recording"),
        (NEWER, "version 2"),
        (START + b"garbage", "no record begins at byte"),
        (START + whole_record(b"garbage"), "cannot be read"),
        (START + DEEP, "cannot be read"),
        (START + whole_record(msgspec.msgpack.encode({"type": "unheard of"})), "cannot be read"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert run_replay(str(path), "--list") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"twinlens: cannot read {path}: ") and reason in error, error


def test_what_cannot_be_replayed_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_replay(str(tmp_path / "nothing")) == 1
    assert "no such file" in capsys.readouterr().err
    assert run_replay(str(write(tmp_path / "empty"))) == 1
    assert "holds no requests" in capsys.readouterr().err
    ids = text_request(0, prompt_kind="token_ids", prompt=bytes(8))
    assert run_replay(str(write(tmp_path / "ids", ids))) == 1
    assert "--grpc HOST:PORT" in capsys.readouterr().err


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "traffic", File(hash=file_hash(PNG), data=JPEG))
    recording = read_recording(path)
    for hash, reason in ((file_hash(PNG), "is damaged"), (file_hash(JPEG), "lacks the file")):
        with pytest.raises(BadRecording, match=reason):
            recording.read_file(hash)
