"""What is read of answers: of ours, of vLLM's, and of those of servers that say little."""

import http.client
import io
import json
import math
import urllib.error
import urllib.request
from typing import Any

import pytest

from common.checkpoint import open_checkpoint
from common.vocabulary import Vocabulary, open_vocabulary
from services.commands.client import ClientError
from services.commands.verification.questions import Question, sample_images
from services.commands.verification.served import NUMBERED, System, read_answer
from tests.golden import GoldenCase


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return open_vocabulary(open_checkpoint(GoldenCase("a_image").checkpoint))


def body(choice: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": "Hello"}} | choice]} | extra


def entry(**fields: Any) -> dict[str, Any]:
    return {"logprob": -0.5, "top_logprobs": [fields | {"logprob": -0.25}]} | fields


def test_an_answer_of_ours(vocabulary: Vocabulary) -> None:
    content = [entry(token="H", token_id=39), entry(token="?", token_id=7)]
    choice = {"token_ids": [39, 7], "logprobs": {"content": content}}
    served = read_answer(body(choice, prompt_token_ids=[1, 2]), vocabulary)
    assert (served.prompt_ids, served.token_ids) == ([1, 2], [39, 7])
    assert (served.log_probs, served.top) == ([-0.5, -0.5], [{39: -0.25}, {7: -0.25}])


def test_an_answer_of_vllm_names_ids_in_the_place_of_text(vocabulary: Vocabulary) -> None:
    choice = {"logprobs": {"content": [entry(token="token_id:39"), entry(token="token_id:7")]}}
    served = read_answer(body(choice), vocabulary)
    assert (served.prompt_ids, served.token_ids) == (None, [39, 7])
    assert served.top == [{39: -0.25}, {7: -0.25}]


def test_tokens_named_by_their_text_alone_are_looked_up(vocabulary: Vocabulary) -> None:
    served = read_answer(body({"logprobs": {"content": [entry(token="H")]}}), vocabulary)
    assert served.token_ids == [39]
    assert served.log_probs == [-0.5]


def test_an_answer_with_text_alone_is_tokenized(vocabulary: Vocabulary) -> None:
    served = read_answer(body({"logprobs": None}), vocabulary)
    assert served.token_ids == vocabulary.encode("Hello")
    assert (served.log_probs, served.top) == ([], [])


def test_a_text_that_is_no_single_token_leaves_only_the_answers_text(
    vocabulary: Vocabulary,
) -> None:
    choice = {"logprobs": {"content": [entry(token="\ufffd"), entry(token="Hello, world")]}}
    served = read_answer(body(choice), vocabulary)
    assert (served.token_ids, served.log_probs) == (vocabulary.encode("Hello"), [])


def test_null_is_a_log_probability_that_is_no_number(vocabulary: Vocabulary) -> None:
    content = [entry(token="H", token_id=39) | {"logprob": None}]
    served = read_answer(body({"logprobs": {"content": content}}), vocabulary)
    assert math.isnan(served.log_probs[0])


@pytest.mark.parametrize("answer", [{}, {"choices": []}, body({"message": {"content": ""}})])
def test_what_is_no_answer_is_refused(answer: dict[str, Any], vocabulary: Vocabulary) -> None:
    with pytest.raises((KeyError, IndexError, ValueError)):
        read_answer(answer, vocabulary)


class Replies:
    """Stands for a server: returns the replies to come, one for each request."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.sent: list[urllib.request.Request] = []

    def open(self, request: urllib.request.Request, timeout: float) -> Any:
        self.sent.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return io.BytesIO(json.dumps(reply).encode())


def system_with(monkeypatch: pytest.MonkeyPatch, *replies: Any) -> tuple[System, Replies]:
    server = Replies(*replies)
    monkeypatch.setattr(urllib.request, "build_opener", lambda *_: server)
    return System("http://here/v1/", "tiny"), server


def refusal(status: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("", status, "", {}, io.BytesIO(b"not known: logprobs"))  # type: ignore[arg-type]


def test_a_server_that_refuses_log_probabilities_is_asked_for_text(
    monkeypatch: pytest.MonkeyPatch, vocabulary: Vocabulary
) -> None:
    system, server = system_with(monkeypatch, refusal(400), body({}))
    served = system.answer(Question("text", "Hi"), 4, vocabulary)
    assert served.token_ids == vocabulary.encode("Hello")
    first, second = (json.loads(request.data or b"") for request in server.sent)
    assert first.keys() >= NUMBERED.keys() and not second.keys() & NUMBERED.keys()
    assert second == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4,
        "temperature": 0,
    }


@pytest.mark.parametrize(
    "failure",
    [
        refusal(503),
        OSError("connection refused"),
        http.client.BadStatusLine("what a gRPC port answers"),
        ValueError("not JSON"),
    ],
)
def test_a_server_that_does_not_answer_is_an_error(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, vocabulary: Vocabulary
) -> None:
    system, _ = system_with(monkeypatch, failure)
    with pytest.raises(ClientError, match="http://here/v1"):
        system.answer(Question("text", "Hi"), 4, vocabulary)


def test_the_key_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, vocabulary: Vocabulary
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    system, server = system_with(monkeypatch, body({}))
    system.answer(Question("text", "Hi"), 4, vocabulary)
    assert server.sent[0].get_header("Authorization") == "Bearer secret"


def test_a_question_with_images_names_their_type() -> None:
    message = Question("image", "What?", tuple(sample_images())).messages()[0]
    *images, text = message["content"]
    assert text == {"type": "text", "text": "What?"}
    assert all(part["image_url"]["url"].startswith("data:image/png;base64,") for part in images)
