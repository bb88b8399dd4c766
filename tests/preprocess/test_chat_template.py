"""Chat templates render the same text as in transformers, and errors name their cause."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.checkpoint import BadCheckpoint
from common.errors import InvalidRequest
from services.preprocess.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, load, normalise
from tests.preprocess.cases import CASES, checkpoint_path, expected, request

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("case", CASES)
def test_golden_prompts_come_out_exactly(case: str) -> None:
    messages, _ = request(case)
    assert load(checkpoint_path(case)).render(messages) == expected(case)["prompt_text"]


TRICKY: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "a\n\n  {{ messages }} {% raw %} <b>&amp;</b> \n"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": [text("é 图"), IMAGE, IMAGE, text("")]},
    ],
    [
        {"role": "user", "content": []},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [text("<|im_end|>")]},
    ],
    [
        {"role": "assistant", "content": " x"},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "\u2028'\""},
    ],
]


@pytest.mark.parametrize("messages", TRICKY)
def test_tricky_messages_render_as_in_transformers(messages: list[dict[str, Any]]) -> None:
    path = checkpoint_path("a_image")
    reference = AutoTokenizer.from_pretrained(path)
    want = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert load(path).render(messages) == want


HELPERS = """
{%- for m in messages %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {{ m | tojson }}{{ [1, {"a": "é<"}] | tojson(indent=2) }}
    {% if m.role == 'user' %}
user{{ eos_token }}
    {% endif %}
{% endfor %}"""


def test_helpers_and_whitespace_are_as_in_transformers() -> None:
    reference = AutoTokenizer.from_pretrained(checkpoint_path("a_image"))
    messages = [
        {"role": "user", "content": "é < \"x\" 'y'"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    want = reference.apply_chat_template(messages, chat_template=HELPERS, tokenize=False)
    assert '"é < ' in want and reference.eos_token in want
    assert ChatTemplate(HELPERS, {"eos_token": reference.eos_token}).render(messages) == want


def test_strftime_now_formats_the_date() -> None:
    found = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render(
        [{"role": "user", "content": ""}]
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found)


def test_a_developer_speaks_as_the_system_and_no_content_is_empty_text() -> None:
    template = load(checkpoint_path("a_image"))
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None},
    ]
    found = template.render(normalise(messages))
    assert found.startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )


def test_what_a_template_raises_is_reported_to_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(
        InvalidRequest, match="chat template refuses the messages: roles must alternate"
    ):
        template.render([{"role": "user", "content": "x"}])


def test_a_template_cannot_leave_its_sandbox() -> None:
    for source in (
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(InvalidRequest):
            ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ({"role": "user"}, "must be a list"),
        (["hi"], r"messages\[0\].role must be one of system, developer, user, assistant"),
        ([{"role": "king", "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content must be text or a list"),
        (
            [{"role": "user", "content": [text("a"), {"type": "audio"}]}],
            r"messages\[0\].content\[1\] must be a text, an image or a video",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\]"),
    ],
)
def test_malformed_messages_are_refused_by_name(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        normalise(messages)


def render_from(path: Path) -> str:
    return load(path).render([{"role": "user", "content": "x"}])


def test_the_template_is_found_in_each_of_its_places(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="has no chat template"):
        load(tmp_path)
    named = [
        {"name": "rag", "template": "rag"},
        {"name": "default", "template": "named {{ bos_token }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}, "eos_token": None})
    )
    assert render_from(tmp_path) == "named <s>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert render_from(tmp_path) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert render_from(tmp_path) == "jinja"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BadCheckpoint, match="cannot be compiled: line 1"):
        load(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{" + "(" * 100_000,
        "{% if a %}" * 5_000 + "{% endif %}" * 5_000,
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ a" + ".b" * 20_000 + " }}",
        "{{ a" + "|upper" * 20_000 + " }}",
    ],
    ids=["brackets", "conditions", "loops", "attributes", "filters"],
)
def test_a_template_that_is_nested_too_deeply_is_a_bad_checkpoint(source: str) -> None:
    with pytest.raises(BadCheckpoint, match="the chat template cannot be compiled"):
        ChatTemplate(source, {})


BAD_TOKEN = b'{"bos_token": {"content": 5}}'


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
        ({"chat_template.jinja": b"x" * (MAX_TEMPLATE_BYTES + 1)}, "larger than 1 MiB"),
        (
            {"chat_template.json": json.dumps({"chat_template": "x" * 2**21}).encode()},
            "the chat template is larger",
        ),
        ({"chat_template.json": b'{"chat_template": 5}'}, "chat_template is not a text"),
        ({"chat_template.json": b'{"chat_template": [5, {}]}'}, "has no chat template"),
        (
            {
                "chat_template.jinja": b"x",
                "tokenizer_config.json": b'{"bos_token": {"content": 5}}',
            },
            "bos_token is not a text",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_file_is_told_by_name(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=said):
        load(tmp_path)
