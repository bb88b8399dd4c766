"""Qwen-VL through all processes, with two ranks and static towers: three alphas at once."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from PIL import Image

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.golden.qwen_vl_requests import GoldenRequest, requests_of
from tests.system.running import READY_SECONDS, Running, ask_about, piece_of, text_of

pytestmark = pytest.mark.system
GOLDEN_REQUESTS = requests_of("b_long_ntk_logn")
CASE = GOLDEN_REQUESTS[0].case
PICTURE = CASE.inputs / "wide.png"
TIE = 3e-4
NUM_TOKENS = 150


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    replicas = ["--tp", "2", "--llm", "2", "--vision-buckets", "1024", "--vision", "2"]
    model = ["--model", str(CASE.checkpoint), "--dtype", "float32"]
    with Running(*model, *replicas) as running:
        yield running


def grpc_request(golden: GoldenRequest, max_tokens: int) -> inference_pb2.GenerateRequest:
    """Return the raw prompt as token ids, with one placeholder for each image."""
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=golden.unexpanded_ids),
        images=[
            inference_pb2.Image(data=(CASE.inputs / name).read_bytes()) for name in golden.pictures
        ],
        sampling=inference_pb2.SamplingParams(temperature=0, repetition_penalty=1),
        stopping=inference_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        response=inference_pb2.ResponseOptions(num_logprobs=2, return_prompt_token_ids=True),
    )


def generate(
    system: Running, golden: GoldenRequest, max_tokens: int
) -> inference_pb2.GenerateResponse:
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return stub.Generate(grpc_request(golden, max_tokens), timeout=READY_SECONDS)


def stream(
    system: Running, golden: GoldenRequest, max_tokens: int, on_tokens: Callable[[int], None]
) -> list[int]:
    """Return the token ids of a streamed answer. `on_tokens` is called with their number so far."""
    whole = grpc_request(golden, max_tokens).SerializeToString()
    request = inference_pb2.GenerateStreamRequest.FromString(whole)
    token_ids: list[int] = []
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for event in stub.GenerateStream(request, timeout=READY_SECONDS):
            token_ids += event.delta.token_ids
            on_tokens(len(token_ids))
    return token_ids


def test_golden_requests_in_flight_together_equal_the_reference(system: Running) -> None:
    asked = GOLDEN_REQUESTS * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda golden: generate(system, golden, 32), asked))
    assert [list(answer.token_ids) for answer in found] == [golden.answer for golden in asked]
    for golden, answer in zip(asked, found, strict=True):
        assert len(answer.prompt_token_ids) == golden.expected["num_prompt_tokens"]
        assert answer.usage.image_tokens == 256 * len(golden.pictures)
    assert max(answer.usage.cached_tokens for answer in found) > 500


def test_the_reference_finds_the_system_right(system: Running) -> None:
    status, said = system.verify(CASE.checkpoint, "--dtype", "float32", "--max-tokens", "6")
    assert status == 0, said


def test_answers_keep_their_alpha_when_their_language_group_dies(system: Running) -> None:
    """The tokens that were delivered before must not count as prompt."""
    wholes = {golden.number: generate(system, golden, NUM_TOKENS) for golden in GOLDEN_REQUESTS}
    clear = [g for g in GOLDEN_REQUESTS if smallest_gap(wholes[g.number]) > TIE]
    assert len({golden.alpha for golden in clear}) >= 2
    asked = clear * 2
    victims = [member.pid for member in system.members("llm")[:1]]

    def kill_one(num_tokens: int) -> None:
        if num_tokens > 10 and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda golden: stream(system, golden, NUM_TOKENS, kill_one), asked))
    assert found == [list(wholes[golden.number].token_ids) for golden in asked]
    assert system.logged(event="retrying"), "the victim held an answer"


def smallest_gap(answer: inference_pb2.GenerateResponse) -> float:
    """Return the smallest distance between the two best tokens of a step."""
    return min(entry.top[0].logprob - entry.top[1].logprob for entry in answer.logprobs)


def test_one_message_is_continued_whole_streamed_and_guided(system: Running) -> None:
    messages = ask_about(PICTURE, "What? Answer:")
    body = {"max_tokens": 12, "ignore_eos": True}
    status, answer = system.chat(messages, **body, return_token_ids=True)
    assert status == 200
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"] > 256
    assert "".join(map(piece_of, system.stream(messages, **body))) == text_of(answer)
    schema = {"name": "answer", "schema": {"enum": ["the red circle", "a blue line"]}}
    guide = {"response_format": {"type": "json_schema", "json_schema": schema}}
    status, answer = system.chat(messages, max_tokens=40, **guide)
    assert status == 200, answer
    assert json.loads(text_of(answer)) in schema["schema"]["enum"]


def test_boxes_of_an_answer_are_in_pixels_of_the_image_as_it_was_sent(system: Running) -> None:
    request = grpc_request(GOLDEN_REQUESTS[0], 60)
    request.stopping.ignore_eos = False
    request.guide.regex = r"<ref>a line</ref><box>\(10,20\),\(500,1000\)</box>"
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answer = stub.Generate(request, timeout=READY_SECONDS)
    assert answer.text == "<ref>a line</ref><box>(10,20),(500,1000)</box>"
    (box,) = answer.boxes
    corners = box.rectangle
    found = (corners.x1, corners.y1, corners.x2, corners.y2)
    assert (box.ref, box.image, found) == ("a line", 0, (4, 2, 224, 120)), "of 448 x 120"


def test_boxes_are_in_pixels_of_the_picture_as_it_was_sent(system: Running) -> None:
    marked = "<ref>a cat</ref><box>(12,34),(567,890)</box>"
    schema = {"name": "answer", "schema": {"enum": [marked]}}
    body = {"response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 300}
    messages = ask_about(PICTURE, "Where? Answer:")
    status, answer = system.chat(messages, **body)
    assert status == 200 and json.loads(text_of(answer)) == marked
    with Image.open(PICTURE) as image:
        width, height = image.size
    corners = [12 * width, 34 * height, 567 * width, 890 * height]
    box = {"ref": "a cat", "image": 0, "box": [corner // 1000 for corner in corners]}
    assert answer["choices"][0]["message"]["twinlens"] == {"boxes": [box]}
    last = [event for event in system.stream(messages, **body) if event["choices"]][-1]
    assert last["choices"][0]["delta"] == {"twinlens": {"boxes": [box]}}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "<img>/etc/passwd</img>"}], "send images as parts"),
        ([{"role": "system", "content": "Be brief."}], "send one user message"),
    ],
)
def test_what_the_model_cannot_be_asked_is_refused(
    system: Running, messages: list[dict[str, str]], reason: str
) -> None:
    status, answer = system.chat(messages)
    assert status == 400
    assert reason in answer["error"]["message"]
