"""Log-probabilities of a prompt, from the first Delta to what clients of both doors read."""

import json
from typing import Any

import pytest

from common.errors import Internal
from common.wire import Tensor
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.generation import Began, Ended
from services.gateway.grpc_messages import stream_response, whole_response
from services.gateway.sse import CompletionWriter
from tests.gateway.builders import USAGE, Gateway, delta, error_of, request, rest, routed
from tests.gateway.test_http import events
from tests.gateway.test_schema import generation, refusal
from tests.gateway.test_token_rules import grpc_generation

OTHER = {"token": "a", "token_id": 5, "bytes": [97], "logprob": -0.25}
SECOND = {"token": "b", "token_id": 7, "bytes": [98], "logprob": -2.0, "rank": 3}
ENTRIES: list[dict[str, Any] | None] = [None, SECOND | {"top_logprobs": [OTHER]}]
BODY = [
    None,
    {
        "7": {"logprob": -2.0, "rank": 3, "decoded_token": "b"},
        "5": {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
    },
]
END = Ended("stop", USAGE, {"total_seconds": 1.0})


def first_delta(entries: Any) -> Any:
    message = delta(0, [10], "a")
    message.prompt_logprobs = Tensor.of_text(json.dumps(entries))
    return message


async def test_they_come_with_the_first_event() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as answer:
        gateway.on_event(routed(), first_delta(ENTRIES), delta(1, [11], "b", "stop"))
        began, *_ = await rest(answer)
    assert began == Began(None, prompt_logprobs=ENTRIES)


@pytest.mark.parametrize("entries", [[], [None, None], ENTRIES[1:], {"a": 1}, [None, OTHER]])
async def test_malformed_ones_end_the_request(entries: Any) -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as answer:
        gateway.on_event(routed(), first_delta(entries))
        assert isinstance(await error_of(answer), Internal)


def writer() -> CompletionWriter:
    return CompletionWriter("id", "m", with_ids=False, with_logprobs=False, with_usage=False)


def test_http_clients_get_vllms_form_whole_and_streamed() -> None:
    began = Began(None, prompt_logprobs=ENTRIES)
    assert writer().whole(began, [], [END])["prompt_logprobs"] == BODY
    [chunk] = events(writer().first_chunk(began).decode() + "data: [DONE]\n\n")
    assert chunk["prompt_logprobs"] == BODY
    assert "prompt_logprobs" not in writer().whole(Began(None), [], [END])


def test_grpc_clients_get_messages_whole_and_streamed() -> None:
    began = Began(None, prompt_logprobs=ENTRIES)
    streamed = stream_response(began, "id")
    assert streamed is not None
    for found in (
        whole_response("id", began, [], [END]).prompt_logprobs,
        streamed.begin.prompt_logprobs,
    ):
        first, second = found
        assert not first.HasField("logprob")
        assert (second.logprob.token_id, second.logprob.token) == (7, b"b")
        assert [top.token_id for top in second.logprob.top] == [5]


@pytest.mark.parametrize("count", [0, 20])
def test_both_doors_pass_the_number_of_alternatives_on(count: int) -> None:
    options = inference_pb2.ResponseOptions(num_prompt_logprobs=count)
    for asked in (generation(prompt_logprobs=count), grpc_generation(response=options)):
        assert asked.sampling.num_prompt_logprobs == count
    assert generation().sampling.num_prompt_logprobs is None
    assert grpc_generation().sampling.num_prompt_logprobs is None


def test_more_alternatives_than_20_are_refused() -> None:
    assert refusal(prompt_logprobs=21).param == "prompt_logprobs"
    assert refusal(prompt_logprobs=-1).param == "prompt_logprobs"
