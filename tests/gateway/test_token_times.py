"""`token_timestamps`, as the vastgenx benchmark reads them from a stream."""

import json
from itertools import pairwise
from typing import Any

import pytest
from starlette.testclient import TestClient

from common.messages import Usage
from services.gateway.generation import Began, Ended, Piece
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.token_times import TokenTimes
from tests.gateway.fake_core import TIMINGS, FakeCore

ENDED = Ended("stop", Usage(), TIMINGS)
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
PREFILL_MICROSECONDS = round(1e6 * TIMINGS["prefill_seconds"])  # type: ignore[operator]


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(MeasuredCore(FakeCore())))


def chunks_of(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream line by line, which is how that benchmark reads them."""
    lines = client.post(path, json=ASK | {"stream": True} | body).text.split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"token_timestamps": True}),
        ("/v1/token_timestamps/chat/completions", {}),
    ],
)
def test_the_first_chunk_has_the_prefill_and_the_time_in_vision(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    first, *later = chunks_of(client, path, **body)
    begin, end = first["token_timestamps"][-1]
    assert end - begin == PREFILL_MICROSECONDS
    begin_seconds, end_seconds = first["custom_data"]["vit_timestamp"]
    assert end_seconds - begin_seconds == pytest.approx(0.5, abs=1e-6)
    assert not any("custom_data" in chunk for chunk in later)


def test_every_token_has_an_interval_and_they_join(client: TestClient) -> None:
    body = {"token_timestamps": True, "return_token_ids": True}
    chunks = chunks_of(client, "/v1/chat/completions", **body)
    intervals = [pair for chunk in chunks for pair in chunk.get("token_timestamps", ())]
    assert len(intervals) == 3
    assert all(before[1] == after[0] for before, after in pairwise(intervals))
    whole = client.post("/v1/chat/completions", json=ASK | {"token_timestamps": True}).json()
    assert len(whole["token_timestamps"]) == 3


def test_the_last_chunk_has_the_intervals_of_tokens_without_a_chunk_of_their_own() -> None:
    core = FakeCore(Began(None, {}), Piece(0, [1], "a", []), Piece(1, [2], "", []), ENDED)
    client = TestClient(create_app(MeasuredCore(core)))
    *_, text, last = chunks_of(client, "/v1/chat/completions", token_timestamps=True)
    assert text["choices"][0]["delta"]["content"] == "a" and "token_timestamps" not in text
    assert last["choices"][0]["finish_reason"] and len(last["token_timestamps"]) == 1


def test_tokens_that_arrive_together_share_the_time() -> None:
    times = TokenTimes()
    times.note(Began(None, {"prefill_seconds": 1.0}))
    times.note(Piece(0, [1, 2, 3, 4], "abcd", []))
    intervals = times.whole()["token_timestamps"]
    assert len(intervals) == 4
    lengths = [end - begin for begin, end in intervals[1:]]
    assert max(lengths) - min(lengths) <= 1
    assert "custom_data" not in times.first()


def test_nothing_of_it_comes_unasked(client: TestClient) -> None:
    chunks = chunks_of(client, "/v1/chat/completions")
    assert not any("token_timestamps" in chunk or "custom_data" in chunk for chunk in chunks)
    assert "token_timestamps" not in client.post("/v1/chat/completions", json=ASK).json()
