"""What a chat completion may ask for, and the texts of refusals."""

import base64
import json
from typing import Any

import pytest

from common.errors import InvalidRequest, TooLarge, UnreadableImage
from services.gateway import images
from services.gateway.generation import GenerationRequest
from services.gateway.schema import chat_to_generation, parse_chat
from services.gateway.unsupported import IN_REQUEST

HELLO = [{"role": "user", "content": "hi"}]


def uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def image_part(image: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(image)}}


def generation(
    messages: Any = HELLO, max_model_len: int | None = 4096, **body: Any
) -> GenerationRequest:
    chat = parse_chat(json.dumps({"messages": messages, **body}).encode())
    return chat_to_generation(chat, "id", None, max_model_len)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def refusal(kind: type[InvalidRequest] = InvalidRequest, **body: Any) -> Any:
    with pytest.raises(kind) as caught:
        generation(**body)
    return caught.value


def test_images_are_replaced_by_placeholders_in_the_messages() -> None:
    text = {"type": "text", "text": "é?"}
    plain = {"type": "image_url", "image_url": uri(b"second")}
    asked = generation(user(image_part(b"first"), text, plain))
    assert asked.images == (b"first", b"second")
    assert json.loads(asked.prompt) == [
        {"role": "user", "content": [{"type": "image"}, text, {"type": "image"}]}
    ]
    assert asked.prompt_kind == "messages"


def test_developer_becomes_system_and_missing_content_becomes_empty() -> None:
    roles = [
        {"role": role, "content": None} for role in ("system", "developer", "user", "assistant")
    ]
    assert [m["role"] for m in json.loads(generation(roles).prompt)] == [
        "system",
        "system",
        "user",
        "assistant",
    ]
    assert json.loads(generation([{"role": "user"}]).prompt) == [{"role": "user", "content": ""}]


def test_sampling_and_stopping_values_are_passed_on() -> None:
    asked = generation(
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=7,
        logprobs=True,
        top_logprobs=20,
        max_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        stop="x",
        stop_token_ids=[3],
        skip_special_tokens=False,
        return_token_ids=True,
    )
    sampling = asked.sampling
    stopping = asked.stopping
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0,
        0.5,
        0,
        0.1,
    )
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.1,
        1,
        -1,
    )
    assert (sampling.seed, sampling.num_logprobs) == (7, 20)
    assert (
        stopping.max_tokens,
        stopping.min_tokens,
        stopping.ignore_eos,
        stopping.skip_special_tokens,
    ) == (9, 2, True, False)
    assert (stopping.stop, stopping.stop_token_ids) == (("x",), (3,))
    assert asked.return_prompt_token_ids


def test_a_value_that_is_absent_or_null_means_the_default() -> None:
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "max_tokens",
        "stop",
        "seed",
        "logprobs",
        "min_tokens",
        "stream",
    )
    for asked in (generation(), generation(**dict.fromkeys(names))):
        sampling = asked.sampling
        stopping = asked.stopping
        assert (
            sampling.temperature,
            sampling.top_k,
            sampling.presence_penalty,
            sampling.num_logprobs,
        ) == (None, None, 0, None)
        assert (stopping.max_tokens, stopping.stop, stopping.min_tokens) == (None, (), 0)


def test_max_completion_tokens_has_priority_over_max_tokens() -> None:
    assert generation(max_tokens=5, max_completion_tokens=6).stopping.max_tokens == 6


def test_logprobs_without_top_logprobs_means_zero_alternatives() -> None:
    assert generation(logprobs=True).sampling.num_logprobs == 0


def test_a_missing_seed_is_drawn_and_a_seed_is_reduced_to_63_bits() -> None:
    assert generation().sampling.seed != generation().sampling.seed, (
        "each request gets a seed of its own"
    )
    assert generation(seed=-1).sampling.seed == 2**63 - 1
    assert generation(seed=-(2**63)).sampling.seed == 0
    assert refusal(seed=2**64).param == "seed"


@pytest.mark.parametrize(
    "harmless",
    [
        {
            "user": "me",
            "metadata": {"a": "b"},
            "store": True,
            "service_tier": "auto",
            "parallel_tool_calls": True,
            "no_such_key": 1,
        },
        {
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        {
            "n": 1,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "logit_bias": {},
            "bad_words": [],
            "include_stop_str_in_output": False,
            "modalities": ["text"],
        },
        dict.fromkeys(IN_REQUEST),
    ],
)
def test_fields_that_do_not_change_the_answer_are_accepted(harmless: dict[str, Any]) -> None:
    assert generation(seed=1, **harmless) == generation(seed=1)


UNSUPPORTED_VALUES = {
    "n": 2,
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{}],
    "modalities": ["text", "audio"],
    "best_of": 2,
    "echo": True,
    "use_beam_search": True,
    "continue_final_message": True,
    "add_generation_prompt": False,
}


@pytest.mark.parametrize("name", IN_REQUEST)
def test_unsupported_fields_that_would_change_the_answer_are_refused_by_name(name: str) -> None:
    error = refusal(**{name: UNSUPPORTED_VALUES.get(name, "something")})
    subject = "value" if IN_REQUEST[name] else "field"
    assert error.param == name
    assert error.message.startswith(f"{name}: this {subject} is not supported")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -1, "temperature: expected float >= 0.0, got -1.0"),
        ("temperature", "hot", "temperature: input should be a valid number"),
        ("temperature", True, "temperature: input should be a valid number"),
        ("top_k", -2, "top_k: expected int >= 0, got -2"),
        ("top_p", 1.5, "top_p: expected float <= 1.0, got 1.5"),
        ("max_tokens", 0, "max_tokens: expected int >= 1, got 0"),
        ("max_tokens", 1.5, "max_tokens: input should be a valid integer"),
        (
            "max_tokens",
            4097,
            "This model's maximum context length is 4096 tokens. You asked for an answer of up "
            "to 4097 tokens: ask for fewer.",
        ),
        (
            "max_completion_tokens",
            4097,
            "This model's maximum context length is 4096 tokens. You asked for an answer of up "
            "to 4097 tokens: ask for fewer.",
        ),
        ("max_tokens", 10**30, "max_tokens: input should be less than or equal to 2147483648"),
        ("stop", "", "stop[0]: expected str of length >= 1"),
        ("stop", ["x"] * 17, "stop: expected array of length <= 16"),
        ("stop", ["x" * 257], "stop[0]: expected str of length <= 256"),
        ("stop", 5, "stop: input should be a valid array"),
        ("stop_token_ids", [-1], "stop_token_ids[0]: expected int >= 0"),
        ("logprobs", 5, "logprobs: input should be a valid boolean"),
        ("top_logprobs", 21, "top_logprobs: input should be less than or equal to 20"),
        ("top_logprobs", 1, "top_logprobs: requires logprobs: true"),
        ("messages", [], "messages: list should have at least 1 item after validation, not 0"),
        ("messages", None, "messages: input should be a valid array"),
        ("messages", [{"content": "x"}], "messages[0].role: field required"),
        (
            "messages",
            [{"role": "function"}],
            "messages[0].role: 'function' is not supported; use system, developer, user, "
            "assistant, tool",
        ),
        (
            "messages",
            [{"role": "user", "content": 5}],
            "messages[0].content: must be a string, a list of parts, or null",
        ),
        (
            "messages",
            user(5),
            "messages[0].content[0]: must be an object with a type, such as text or image_url",
        ),
        ("messages", user({"type": "text"}), "messages[0].content[0].text: must be a string"),
        (
            "messages",
            user({"type": "image_url"}),
            "messages[0].content[0].image_url: must be an object with a url, or a string",
        ),
        (
            "messages",
            user({"type": "video_url"}),
            "messages[0].content[0].video_url: must be an object with a url, or a string",
        ),
        (
            "messages",
            [*HELLO, {"role": "system", "content": [image_part(b"x")]}],
            "messages[1].content[0]: an image is not allowed in a message of role 'system'; send "
            "it in a user message",
        ),
    ],
)
def test_a_refusal_names_the_field_and_what_is_wrong(name: str, value: Any, expected: str) -> None:
    assert refusal(**{name: value}).message == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://example.org/a.png", "by-URL images are not enabled; send a data: URI"),
        ("HTTP://example.org/a.png", "by-URL images are not enabled; send a data: URI"),
        ("file:///etc/passwd", "only images inside the request are accepted; send a data: URI"),
        ("/etc/passwd", "only images inside the request are accepted; send a data: URI"),
        (
            "data:image/png,abc",
            "a data: URI must have the form data:<type>;base64,<file in base64>",
        ),
        (
            "data:image/png;base64",
            "a data: URI must have the form data:<type>;base64,<file in base64>",
        ),
        (
            "data:image/png;base64,abcde",
            "the image after ;base64, is not valid base64: its length is not that of base64; a "
            "part of it is missing",
        ),
        (
            "data:image/png;base64,ab*d",
            "the image after ;base64, is not valid base64: character 3, '*', does not occur in "
            "base64",
        ),
    ],
)
def test_a_wrong_image_url_is_refused_with_its_path(url: str, expected: str) -> None:
    path = "messages[0].content[0].image_url"
    assert (
        refusal(messages=user({"type": "image_url", "image_url": url})).message
        == f"{path}: {expected}"
    )


def test_an_empty_image_is_refused_with_its_index() -> None:
    error = refusal(UnreadableImage, messages=user(image_part(b"x"), image_part(b"")))
    assert error.item == 1


def test_too_many_or_too_large_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    generation(user(*[image_part(b"x")] * 32))
    refusal(TooLarge, messages=user(*[image_part(b"x")] * 33))
    monkeypatch.setitem(images.MAX_FILE_BYTES, "image", 2000)
    generation(user(image_part(b"x" * 2000)))
    assert refusal(TooLarge, messages=user(image_part(b"x" * 2001))).item == 0
    assert refusal(TooLarge, messages=user(image_part(b"x" * 9000))).item == 0


def test_min_tokens_above_max_tokens_is_refused() -> None:
    assert (
        refusal(min_tokens=3, max_tokens=2).message
        == "min_tokens: 3 is more than max_tokens, which is 2"
    )


def test_max_tokens_is_not_checked_while_the_context_length_is_unknown() -> None:
    assert generation(max_model_len=None, max_tokens=10**6).stopping.max_tokens == 10**6


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'{"messages":' * 5000,
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b"\xff",
        b'{"seed":NaN}',
    ],
)
def test_a_body_that_is_not_a_valid_object_is_refused_with_a_message(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(body)
    assert caught.value.message


def test_messages_and_parts_are_counted_together() -> None:
    parts = [{"type": "text", "text": ""}] * 4000
    messages = [*user(*parts), *HELLO * 95]
    generation(messages)
    assert "4096 messages" in refusal(messages=[*messages, *HELLO]).message


def test_text_that_cannot_fit_into_the_context_is_refused() -> None:
    halves = [{"type": "text", "text": "x" * 4096 * 128}] * 2
    generation(user(*halves))
    more = {"role": "user", "content": "x"}
    assert "context" in refusal(messages=[*user(*halves), more]).message


def test_a_large_schema_is_refused() -> None:
    schema = {"type": "object", "description": "x" * 2**20}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert "smaller" in refusal(response_format=form).message
