"""POST /v1/completions, read by the types of the openai client."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openai.types import Completion
from starlette.testclient import TestClient

from common.errors import Unavailable
from common.messages import Usage
from services.gateway.generation import Began, Ended, Piece
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from tests.gateway.fake_core import HELLO, TIMINGS, FakeCore, logprob

PATH = "/v1/completions"
PROMPT_LOGPROBS = [None, logprob(1, "o"), logprob(2, "ld")]


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def client(core: FakeCore) -> Iterator[TestClient]:
    with TestClient(create_app(MeasuredCore(core), max_body_bytes=10_000)) as client:
        yield client


def create(client: TestClient, prompt: Any = "Old", **body: Any) -> Completion:
    """Return a completion as the openai client reads it."""
    found = client.post(PATH, json={"prompt": prompt} | body)
    assert found.status_code == 200, found.text
    return Completion.construct(**found.json())


def stream(client: TestClient, prompt: Any = "Old", **body: Any) -> list[Completion]:
    text = client.post(PATH, json={"prompt": prompt, "stream": True} | body).text
    *events, end, nothing = text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [Completion.construct(**json.loads(event.removeprefix("data: "))) for event in events]


def test_a_text_is_continued_without_a_template(client: TestClient, core: FakeCore) -> None:
    found = create(client, seed=3, stop="x")
    assert (found.object, found.id[:5]) == ("text_completion", "cmpl-")
    [choice] = found.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("Hello", "stop", None)
    assert found.usage and (found.usage.prompt_tokens, found.usage.completion_tokens) == (9, 3)
    [asked] = core.requests
    assert (asked.prompt_kind, asked.prompt) == ("text", b"Old")
    assert asked.stopping.max_tokens == 16  # as OpenAI has it
    assert (asked.sampling.seed, asked.stopping.stop) == (3, ("x",))


def test_token_ids_are_a_prompt(client: TestClient, core: FakeCore) -> None:
    create(client, [5, 6])
    [asked] = core.requests
    assert asked.prompt_kind == "token_ids"
    assert np.frombuffer(asked.prompt, "<i8").tolist() == [5, 6]


@pytest.mark.parametrize("prompts", [["a", "b"], [[1], [2, 3]]])
def test_several_prompts_are_answered_in_their_order(
    client: TestClient, core: FakeCore, prompts: Any
) -> None:
    found = create(client, prompts)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage and (found.usage.prompt_tokens, found.usage.completion_tokens) == (18, 6)
    assert len({asked.request_id for asked in core.requests}) == 2
    chunks = stream(client, prompts, stream_options={"include_usage": True})
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(choice.text for choice in own) == "Hello"
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == 24


def test_several_answers_to_several_prompts_have_their_places(
    client: TestClient, core: FakeCore
) -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=2)
    core.script = (
        Began(None),
        Began(None, choice=1),
        Piece(0, [1], "b", [], choice=1),
        Piece(0, [1], "a", []),
        Ended("stop", usage, TIMINGS, is_last=False),
        Ended("length", usage, TIMINGS, choice=1),
    )
    found = create(client, ["x", "y"], n=2, best_of=2)
    assert [(c.index, c.text) for c in found.choices] == [(0, "a"), (1, "b"), (2, "a"), (3, "b")]
    assert [c.finish_reason for c in found.choices] == ["stop", "length"] * 2
    assert core.requests[0].n == 2


def test_a_stream_has_the_text_and_one_end(client: TestClient) -> None:
    chunks = stream(client)
    assert [chunk.choices[0].text for chunk in chunks] == ["Hel", "lo", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]


def test_an_echo_stands_before_the_answer(client: TestClient) -> None:
    assert create(client, echo=True).choices[0].text == "OldHello"
    assert "".join(chunk.choices[0].text for chunk in stream(client, echo=True)) == "OldHello"


def test_an_echo_alone(client: TestClient) -> None:
    found = create(client, echo=True, max_tokens=0)
    assert found.choices[0].text == "Old"
    assert found.usage and found.usage.completion_tokens == 0


def test_log_probabilities_have_the_offsets_of_their_tokens(
    client: TestClient, core: FakeCore
) -> None:
    logprobs = create(client, logprobs=1).choices[0].logprobs
    assert logprobs
    assert (logprobs.tokens, logprobs.text_offset) == (["Hel", "l", "o"], [0, 3, 4])
    assert logprobs.top_logprobs == [{"Hel": -0.5}, {"l": -0.5}, {"o": -0.5}]
    assert core.requests[0].sampling.num_logprobs == 1
    assert core.requests[0].sampling.num_prompt_logprobs is None


def test_log_probabilities_of_an_echo_begin_with_the_prompt(
    client: TestClient, core: FakeCore
) -> None:
    core.script = (Began(None, prompt_logprobs=PROMPT_LOGPROBS), *HELLO[1:])
    whole = create(client, "Hold", echo=True, logprobs=0).choices[0].logprobs
    assert whole
    assert whole.tokens == ["H", "o", "ld", "Hel", "l", "o"]
    assert whole.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5, -0.5]
    assert whole.text_offset == [0, 1, 2, 4, 7, 8]
    assert core.requests[0].sampling.num_prompt_logprobs == 0
    chunks = stream(client, "Hold", echo=True, logprobs=0)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset or []] == whole.text_offset


def test_fields_of_chats_that_fit_are_taken(client: TestClient, core: FakeCore) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    create(client, response_format=schema, logit_bias={"7": 5}, priority=-1)
    [asked] = core.requests
    assert (asked.guide_kind, asked.priority) == ("json_schema", -1)
    assert asked.token_rules is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"messages": []}, "messages"),
        ({"tools": []}, "tools"),
        ({"best_of": 2}, "best_of"),
        ({"n": 17}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: TestClient, body: dict[str, Any], param: str
) -> None:
    found = client.post(PATH, json={"prompt": "Old"} | body)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == param


def test_a_failure_of_one_prompt_fails_the_whole_body(client: TestClient, core: FakeCore) -> None:
    core.script = (Unavailable("the llm is gone", stage="llm"),)
    for streamed in (False, True):
        found = client.post(PATH, json={"prompt": ["a", "b"], "stream": streamed})
        assert found.status_code == 503
    core.script = (*HELLO[:2], Unavailable("the llm is gone", stage="llm"))
    text = client.post(PATH, json={"prompt": "a", "stream": True}).text
    error = json.loads(text.split("\n\n")[-3].removeprefix("data: "))
    assert error["error"]["message"] == "the llm is gone"


def test_an_echo_of_token_ids_is_their_text(client: TestClient, core: FakeCore) -> None:
    core.spellings = {b"".join(n.to_bytes(8, "little") for n in (5, 6)): "Old"}
    assert create(client, [5, 6], echo=True).choices[0].text == "OldHello"
    assert [asked.task for asked in core.requests] == ["detokenize", "generate"]


def test_each_chunk_has_the_usage_so_far_if_it_is_asked_for(
    client: TestClient, core: FakeCore
) -> None:
    prompt = Usage(prompt_tokens=9)
    core.script = (Began(None, usage=prompt), *HELLO[1:])
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, ["a", "b"], stream_options=options)
    totals = [chunk.usage.total_tokens for chunk in chunks if chunk.usage]
    assert len(totals) == len(chunks)
    assert totals == sorted(totals)
    assert totals[-1] == 24
