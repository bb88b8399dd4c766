"""WeMM through all processes, shared by two ranks: equal to the reference in every way to ask."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from benchmarks.serving import READY_SECONDS
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.golden import GoldenCase
from tests.system.running import Running, data_uri, piece_of, text_of

pytestmark = pytest.mark.system
CASE = GoldenCase("a_image", "wemm")
WITH_IMAGE, OTHER_IMAGE, TEXT = 0, 1, 2
PLACEHOLDER = 512
MIXED = (0, 1, 2, 0, 2, 1, 0, 1)
GREEDY = {
    "max_tokens": 32,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    """Two groups of two ranks, chunks that cut images, and towers with static shapes."""
    arguments = ("--tp", "2", "--llm", "2", "--max-num-batched-tokens", "7", "--block-size", "4")
    buckets = ("--vision-buckets", "90,170")
    model = ("--model", str(CASE.checkpoint), "--dtype", "float32")
    with Running(*model, *arguments, *buckets) as running:
        yield running


def messages(number: int) -> list[dict[str, Any]]:
    request = CASE.expected["requests"][number]
    content = [{"type": "text", "text": request["text"]}]
    if request["image"]:
        content = [image_part(request["image"]), *content]
    return [{"role": "user", "content": content}]


def image_part(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(CASE.inputs / name)}}


def expected(number: int) -> dict[str, Any]:
    request: dict[str, Any] = CASE.expected["requests"][number]
    return request


def ask(system: Running, number: int) -> dict[str, Any]:
    status, answer = system.chat(messages(number), **GREEDY)
    assert status == 200, answer
    assert answer["choices"][0]["token_ids"] == expected(number)["greedy_ids"]
    assert text_of(answer) == expected(number)["greedy_text"]
    return answer


def test_answers_equal_the_reference_alone_in_company_and_from_the_cache(system: Running) -> None:
    for number in (WITH_IMAGE, OTHER_IMAGE, TEXT):
        answer = ask(system, number)
        assert len(answer["prompt_token_ids"]) == expected(number)["num_rows"]
    for _ in range(2):
        with ThreadPoolExecutor(len(MIXED)) as pool:
            answers = list(pool.map(lambda number: ask(system, number), MIXED))
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert max(cached) > 0


def test_answers_are_streamed(system: Running) -> None:
    events = list(system.stream(messages(WITH_IMAGE), **GREEDY))
    assert len(events) > 8
    assert "".join(map(piece_of, events)) == expected(WITH_IMAGE)["greedy_text"]


def test_answers_follow_a_schema(system: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"seen": {"enum": ["yes", "no"]}},
        "required": ["seen"],
        "additionalProperties": False,
    }
    status, answer = system.chat(
        messages(WITH_IMAGE),
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    assert status == 200, answer
    assert json.loads(text_of(answer))["seen"] in ("yes", "no")
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_token_ids_name_the_image_by_the_first_id_beyond_the_vocabulary(system: Running) -> None:
    request = expected(WITH_IMAGE)
    ids = [*request["ids_before_image"], PLACEHOLDER, *request["ids_after_image"]]
    image = (CASE.inputs / request["image"]).read_bytes()
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        answer = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=ids),
                images=[inference_pb2.Image(data=image)],
                sampling=inference_pb2.SamplingParams(temperature=0),
                stopping=inference_pb2.StoppingParams(max_tokens=32, ignore_eos=True),
            ),
            timeout=READY_SECONDS,
        )
    assert list(answer.token_ids) == request["greedy_ids"]


def test_a_second_image_is_refused(system: Running) -> None:
    content = [image_part("land.png"), image_part("thin.png"), {"type": "text", "text": "?"}]
    status, answer = system.chat([{"role": "user", "content": content}])
    assert status == 400
    assert "this model takes one image, not 2" in answer["error"]["message"]


def test_the_reference_finds_the_system_right(system: Running) -> None:
    status, said = system.verify(CASE.checkpoint, "--dtype", "float32", "--max-tokens", "6")
    assert status == 0, said


def test_answers_survive_the_death_of_a_language_model(system: Running) -> None:
    victims = [system.members("llm")[0].pid]
    asked = MIXED * 2

    def stream(index: int) -> list[int]:
        token_ids: list[int] = []
        for event in system.stream(messages(asked[index]), **GREEDY):
            assert "error" not in event, event
            for choice in event["choices"]:
                token_ids += choice.get("token_ids", [])
            if index == 0 and token_ids and victims:
                os.kill(victims.pop(), signal.SIGKILL)
        return token_ids

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(stream, range(len(asked))))
    assert found == [expected(number)["greedy_ids"] for number in asked]
    assert system.logged(event="retrying"), "the victim held an answer"
