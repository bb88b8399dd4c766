"""What a new user does first, and how the system reports mistakes."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.commands.client import connect
from services.commands.evaluation.command import evaluate
from tests.commands.evaluation.endpoint import parse
from tests.preprocess.cases import encoded
from tests.system.running import RECEIPT, ROOT, Running, ask_about, piece_of, text_of, until

pytestmark = pytest.mark.system


def error_rate(read: str, true: str) -> float:
    """Return the edit distance per character of the true text."""
    row = list(range(len(true) + 1))
    for i, a in enumerate(read, 1):
        previous = row[0]
        row[0] = i
        for j, b in enumerate(true, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1] / len(true)


def test_the_sample_is_read(embedded: Running) -> None:
    status, answer = embedded.chat(ask_about(RECEIPT))
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (
        error_rate(text_of(answer), (ROOT / "examples" / "receipt.txt").read_text().strip()) < 0.05
    )


def test_an_evaluation_reads_the_samples(
    embedded: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model reads the drawn samples without an error."""
    data = ("--data", str(ROOT / "examples" / "samples" / "samples.json"))
    out = ("--url", embedded.url("/v1"), "--out", str(tmp_path))
    assert evaluate(parse("cer", *data, *out)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["items"], result["failed"]) == (3, 0)
    assert result["scores"]["cer, CER"] < 0.05


def test_the_command_line_returns_what_http_returns(embedded: Running) -> None:
    ended = embedded.twinlens(
        "generate", "--image", str(RECEIPT), "OCR:", "--temperature", "0", "--json"
    )
    answer = json.loads(ended.stdout)
    _, over_http = embedded.chat(ask_about(RECEIPT), return_token_ids=True)
    assert (ended.returncode, answer["finish_reason"]) == (0, "stop")
    assert (answer["text"], answer["token_ids"]) == (
        text_of(over_http),
        over_http["choices"][0]["token_ids"],
    )
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])
    assert (
        answer["usage"]["image_tokens"]
        == over_http["usage"]["prompt_tokens_details"]["image_tokens"]
        > 0
    )
    assert answer["timings"]["images"][0].keys() >= {
        "preprocess_seconds",
        "queue_seconds",
        "encode_seconds",
    }
    assert (
        answer["timings"]["total_seconds"] >= answer["timings"]["time_to_first_token_seconds"] > 0
    )


def test_streamed_pieces_make_the_whole_answer(embedded: Running) -> None:
    whole = text_of(embedded.chat(ask_about(RECEIPT))[1])
    assert "".join(map(piece_of, embedded.stream(ask_about(RECEIPT)))) == whole


def test_several_images_between_texts_are_read_in_order(embedded: Running) -> None:
    image = ask_about(RECEIPT)[0]["content"][0]
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "first"},
                image,
                {"type": "text", "text": "second"},
                image,
            ],
        }
    ]
    status, answer = embedded.chat(messages, max_tokens=3, ignore_eos=True)
    assert status == 200
    _, single = embedded.chat(ask_about(RECEIPT), max_tokens=1)
    assert (
        answer["usage"]["prompt_tokens_details"]["image_tokens"]
        == 2 * single["usage"]["prompt_tokens_details"]["image_tokens"]
    )


def test_the_status_lists_every_member(embedded: Running) -> None:
    members = json.loads(embedded.twinlens("status", "--json").stdout)["members"]
    assert {m["state"] for m in members} == {"ready"}
    roles = sorted(m["role"] for m in members)
    assert roles == sorted(
        [*2 * ["preprocess", "vision", "detokenizer"], "controller", "gateway", "llm"]
    )
    assert all(m["pid"] > 0 for m in members)


def test_one_request_id_goes_through_every_service(embedded: Running) -> None:
    body = {"model": embedded.model, "messages": ask_about(RECEIPT), "max_tokens": 2}
    headers = {"content-type": "application/json", "x-request-id": "trace-me"}
    with urllib.request.urlopen(
        urllib.request.Request(
            embedded.url("/v1/chat/completions"), json.dumps(body).encode(), headers
        )
    ) as response:
        assert response.headers["x-request-id"] == "trace-me"
    services = {"gateway", "preprocess", "vision", "llm", "detokenizer"}
    until(lambda: services_that_logged(embedded, "trace-me") >= services, "a line of each service")


def services_that_logged(system: Running, request_id: str) -> set[str]:
    entries = system.logged()
    return {e["service"] for e in entries if e.get("request_id", "").startswith(f"{request_id}~")}


def test_a_client_that_hangs_up_frees_everything(embedded: Running) -> None:
    events = embedded.stream(ask_about(RECEIPT), max_tokens=3500, ignore_eos=True)
    next(events)
    events.close()
    embedded.await_idle()


def metric(system: Running, name: str) -> float:
    lines = system.get("/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_the_gateway_shows_what_runs_behind_it_under_the_names_of_vllm(embedded: Running) -> None:
    assert metric(embedded, "vllm:num_requests_running") == 0
    events = embedded.stream(ask_about(RECEIPT), max_tokens=3500, ignore_eos=True)
    next(events)
    assert metric(embedded, "vllm:num_requests_running") == 1
    until(lambda: metric(embedded, "vllm:kv_cache_usage_perc") > 0, "the group has reported")
    events.close()
    until(lambda: metric(embedded, "vllm:kv_cache_usage_perc") == 0, "the blocks are free")


def test_a_deadline_that_passes_ends_the_request_with_504(embedded: Running) -> None:
    body = {
        "model": embedded.model,
        "messages": ask_about(RECEIPT),
        "max_tokens": 3500,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        embedded.url("/v1/chat/completions"),
        json.dumps(body).encode(),
        {"content-type": "application/json", "x-request-timeout": "0.5"},
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    with error.value:
        assert error.value.code == 504
    embedded.await_idle()


@pytest.mark.parametrize(
    "image",
    [b"not an image", RECEIPT.read_bytes()[:2000], b""],
    ids=["garbage", "cut off", "empty"],
)
def test_an_image_that_cannot_be_read_is_named_and_the_next_request_works(
    embedded: Running, image: bytes
) -> None:
    status, answer = embedded.chat(ask_about(image))
    assert status == 400
    assert "image" in answer["error"]["message"]
    assert embedded.chat(ask_about(RECEIPT), max_tokens=1)[0] == 200


def test_what_a_picture_hides_is_not_read_and_its_format_does_not_matter(
    embedded: Running,
) -> None:
    with Image.open(RECEIPT) as opened:
        picture = opened.convert("RGB")
    _, plain = embedded.chat(ask_about(RECEIPT), max_tokens=24)
    seen = Image.new("RGBA", picture.size)
    seen.putalpha(ImageChops.invert(picture.convert("L")))
    for file in (encoded(picture, "TIFF"), encoded(picture, "BMP"), encoded(seen)):
        status, answer = embedded.chat(ask_about(file), max_tokens=24)
        assert (status, text_of(answer)) == (200, text_of(plain))
    picture.putalpha(0)
    blank = Image.new("RGB", picture.size, "white")
    answers = [embedded.chat(ask_about(encoded(one)), max_tokens=24)[1] for one in (picture, blank)]
    assert text_of(answers[0]) == text_of(answers[1]) != text_of(plain)


def image_tokens(system: Running, bounds: dict[str, Any], **body: Any) -> int:
    messages = ask_about(RECEIPT)
    messages[0]["content"][0] |= bounds
    status, answer = system.chat(messages, max_tokens=1, **body)
    assert status == 200, answer
    return answer["usage"]["prompt_tokens_details"]["image_tokens"]


def test_a_client_bounds_the_size_of_its_image_through_both_apis(embedded: Running) -> None:
    whole = image_tokens(embedded, {})
    few = image_tokens(embedded, {"max_pixels": 40 * 784})
    assert few <= 40 < whole
    assert image_tokens(embedded, {}, mm_processor_kwargs={"max_pixels": 40 * 784}) == few
    image = inference_pb2.Image(data=RECEIPT.read_bytes(), max_pixels=40 * 784)
    request = inference_pb2.GenerateRequest(
        text="OCR:", images=[image], stopping=inference_pb2.StoppingParams(max_tokens=1)
    )
    with connect(f"127.0.0.1:{embedded.grpc_port}") as channel:
        answer = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
    assert answer.usage.image_tokens == few


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(embedded: Running) -> None:
    status, answer = embedded.chat([{"role": "user", "content": "word " * 2000}])
    assert status == 400
    assert "4096" in answer["error"]["message"]


def test_a_typed_placeholder_is_text(embedded: Running) -> None:
    status, answer = embedded.chat(
        [{"role": "user", "content": "look: <|image_pad|>"}], max_tokens=1
    )
    assert status == 200
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 0


SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["total"],
    "additionalProperties": False,
}


def test_an_answer_follows_its_schema(embedded: Running) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "receipt", "schema": SCHEMA}}
    status, answer = embedded.chat(ask_about(RECEIPT), response_format=wanted, max_tokens=200)
    assert status == 200
    assert json.loads(text_of(answer))["total"] in range(100)
    assert " " not in text_of(answer), "guided JSON is compact"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_schema_that_cannot_be_followed_is_refused(embedded: Running) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    status, answer = embedded.chat(ask_about(RECEIPT), response_format=wanted)
    assert status == 400
    assert "nonsense" in answer["error"]["message"]


def test_a_second_question_about_the_same_image_computes_only_what_differs(
    embedded: Running,
) -> None:
    """The image comes first in the prompt, so its tokens are in the prefix that both share."""
    embedded.chat(ask_about(RECEIPT, "What is the total?"), max_tokens=1)
    usage = embedded.chat(ask_about(RECEIPT, "Who is it from?"), max_tokens=1)[1]["usage"]
    details = usage["prompt_tokens_details"]
    assert details["image_tokens"] <= details["cached_tokens"] < usage["prompt_tokens"]
    _, text_only = embedded.chat(
        [{"role": "user", "content": "quite another prompt"}], max_tokens=1
    )
    assert (
        text_only["usage"]["prompt_tokens_details"]["cached_tokens"]
        < text_only["usage"]["prompt_tokens"]
    )
