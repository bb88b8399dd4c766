"""Answers that call tools follow their grammar, whichever tokens the marks of a call are."""

import contextlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from common.checkpoint import open_checkpoint
from common.errors import InvalidRequest
from common.vocabulary import Vocabulary, open_vocabulary
from services.preprocess.grammars import Grammars
from tests.system.running import ROOT

EMBEDDED = open_vocabulary(open_checkpoint(ROOT / "models" / "tiny-ocr"))
MARKS = {name: EMBEDDED.id_of(name) for name in ("<tool_call>", "</tool_call>", "<|box_start|>")}
BY_BYTES = {data: id for id, data in EMBEDDED.bytes_by_id.items()}
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "s": {"type": "string", "maxLength": 4}},
    "required": ["x"],
    "additionalProperties": False,
}
F = {"name": "f", "parameters": SCHEMA}
G = {"name": "g"}


def without_marks() -> Vocabulary:
    """Return a vocabulary in which the marks of a call are no tokens."""
    described = json.loads(EMBEDDED.tokenizer_json)
    added = [token for token in described["added_tokens"] if "tool_call" not in token["content"]]
    described["added_tokens"] = added
    return replace(EMBEDDED, tokenizer_json=json.dumps(described))


def with_special_marks() -> Vocabulary:
    """Return a vocabulary in which the marks of a call are special tokens."""
    described = json.loads(EMBEDDED.tokenizer_json)
    for token in described["added_tokens"]:
        token["special"] |= "tool_call" in token["content"]
    return replace(EMBEDDED, tokenizer_json=json.dumps(described))


def spelled(text: str, as_tokens: bool) -> list[int]:
    """Return the tokens of a text, with one token for each mark or none."""
    if not as_tokens:
        return [BY_BYTES[bytes([byte])] for byte in text.encode()]
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text):
        ids += [MARKS[part]] if part in MARKS else spelled(part, as_tokens=False)
    return ids


class Followed:
    """What answers follow a guide."""

    def __init__(self, vocabulary: Vocabulary = EMBEDDED, **guide: Any) -> None:
        self.grammar = Grammars(vocabulary).grammar("tool_calls", json.dumps(guide))
        self.tokenizer = LLTokenizer(vocabulary.grammar_tokenizer_json())

    def verdict(self, text: str, as_tokens: bool = True) -> str:
        """Return whether a text is a whole answer, the beginning of one, or none; and "end" if it
        must end."""
        matcher = LLMatcher(self.tokenizer, self.grammar)
        ids = spelled(text, as_tokens)
        if matcher.try_consume_tokens(ids) < len(ids):
            return "none"
        if matcher.is_stopped():
            return "end"
        return "whole" if matcher.is_accepting() else "begin"

    def both(self, text: str) -> str:
        """Return the verdict on a text, which does not depend on how its marks are spelled."""
        verdict = self.verdict(text)
        assert self.verdict(text, as_tokens=False) == verdict
        return verdict


def call(arguments: str, name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_one_required_call_ends_the_answer() -> None:
    followed = Followed(functions=[F, G], parallel=False)
    assert followed.both(call('{"x":1}')) == "end"
    assert followed.both(call('{"x":1,"s":"<a>"}')) == "end"
    assert followed.both(call("{}", "g")) == "end"
    assert followed.both(call('{"x":1}')[:-20]) == "begin"
    assert followed.both(call('{ "x": 1, "s": "<a>" }')) == "end"
    wrong = [
        "text",
        "\n",
        call("{}"),
        call('{"x":  1}'),
        call('{"x":1}', "h"),
        call('{"x":1}', "g"),
    ]
    assert {followed.both(text) for text in wrong} == {"none"}


def test_several_required_calls_are_bounded() -> None:
    followed = Followed(functions=[F], parallel=True)
    one = call('{"x":1}')
    assert followed.both(one) == "whole"
    assert followed.both("\n".join([one] * 16)) == "end"
    assert followed.both("\n".join([one] * 17)) == "none"
    assert followed.both(one + "\ntext") == "none"


def test_a_free_answer_is_bound_from_the_mark_of_a_call_on() -> None:
    followed = Followed(functions=[F, G], required=False)
    free = ["", "text", "a < b, <tool", '{"x":1}', call('{"y": [1]}'.replace(" ", ""))]
    free += [f"text\n{call('{}')}", f"{call('{}')}\n{call('{}')}, and text"]
    assert {followed.both(text) for text in free} == {"whole"}
    assert {followed.both(f"text <tool_call>{end}") for end in ("x", '\n{"name": "h', "\n[")} == {
        "none"
    }
    assert followed.both("text <tool_call>\n{") == "begin"


def test_a_free_answer_follows_the_schema_of_a_strict_tool() -> None:
    followed = Followed(functions=[F | {"strict": True}, G], required=False)
    assert followed.both(call('{"x":1}')) == "whole"
    assert followed.both(call("{}")) == "none"
    assert followed.both(call('{"any":1}', "g")) == "whole"


def test_without_parallel_calls_a_free_answer_ends_with_the_first_one() -> None:
    followed = Followed(functions=[F], required=False, parallel=False)
    assert followed.both("text") == "whole"
    assert followed.both(f"text{call('{}')}") == "end"
    assert followed.both(f"text{call('{}')}\n") == "none"


@pytest.mark.parametrize(
    ("kind", "text", "right", "wrong"),
    [
        ("json_schema", '{"type": "object", "required": ["z"]}', '{"z":1}', "{}"),
        ("json_object", "", "{}", "text"),
        ("regex", "[ab]+", "ab", "c"),
    ],
)
def test_an_answer_without_a_call_follows_the_other_guide(
    kind: str, text: str, right: str, wrong: str
) -> None:
    other = {"kind": kind, "text": text}
    followed = Followed(functions=[F], required=False, otherwise=other)
    assert followed.both(right) in ("whole", "end")
    assert followed.both(call("{}")) in ("whole", "end")
    mixed = [wrong, "", f"{right}\n{call('{}')}", f"{call('{}')}\n{right}"]
    assert {followed.both(text) for text in mixed} <= {"none", "begin"}


def test_a_guide_that_only_helps_is_left_out_without_llguidance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammars = Grammars(EMBEDDED)
    free = {"functions": [F], "required": False}
    assert not grammars.is_needless("tool_calls", json.dumps(free))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert grammars.is_needless("tool_calls", json.dumps(free))
    other = {"kind": "json_object", "text": ""}
    needed = [free | {"required": True}, free | {"parallel": False}, free | {"otherwise": other}]
    for guide in [*needed, free | {"functions": [F | {"strict": True}]}]:
        assert not grammars.is_needless("tool_calls", json.dumps(guide))
    assert not grammars.is_needless("json_object", "")


def test_the_tool_whose_parameters_cannot_be_followed_is_named() -> None:
    bad = {"name": "bad", "parameters": {"$ref": "#/$defs/none"}}
    with pytest.raises(InvalidRequest, match="the parameters of bad cannot be followed"):
        Followed(functions=[F, bad])


def test_markup_of_the_family_may_stand_in_a_free_answer() -> None:
    boxes = EMBEDDED.with_markup(["<|box_start|>"])
    text = "a<|box_start|>b"
    assert Followed(boxes, functions=[F], required=False).verdict(text + call("{}")) == "whole"
    assert Followed(functions=[F], required=False).verdict(text) == "none"


def test_marks_may_be_special_tokens_or_none() -> None:
    for required in (True, False):
        special = Followed(with_special_marks(), functions=[F], required=required)
        assert special.both(call('{"x":1}')) == "whole"
        plain = Followed(without_marks(), functions=[F], required=required)
        assert plain.verdict(call('{"x":1}'), as_tokens=False) == "whole"
        assert plain.verdict(call('{"x":1}'), as_tokens=True) == "none"


def test_what_a_schema_asks_beyond_llguidance_counts_only_if_the_tool_is_strict() -> None:
    odd = {"name": "f", "parameters": {"type": "object", "unevaluatedItems": {"type": "null"}}}
    assert Followed(functions=[odd], parallel=False).both(call('{"a":1}')) == "end"
    with pytest.raises(InvalidRequest, match="unevaluatedItems"):
        Followed(functions=[odd | {"strict": True}])


OPEN_SCHEMA = {
    "$defs": {"d": {"properties": {"y": {"type": "integer"}}}},
    "properties": {"x": {"$ref": "#/$defs/d"}, "l": {"items": {"$ref": "#/$defs/d"}}},
}


def test_a_required_call_has_no_properties_that_the_schema_does_not_name() -> None:
    followed = Followed(functions=[{"name": "f", "parameters": OPEN_SCHEMA}], parallel=False)
    assert followed.both(call('{"x":{"y":1},"l":[{"y":2}]}')) == "end"
    for arguments in ('{"z":1}', '{"x":{"z":1}}', '{"l":[{"z":1}]}'):
        assert followed.both(call(arguments)) == "none"


@pytest.mark.parametrize(
    "more",
    [
        {"additionalProperties": {"type": "integer"}},
        {"anyOf": [{"properties": {"z": {"type": "integer"}}}]},
        {"allOf": [{"properties": {"z": {"type": "integer"}}}]},
    ],
)
def test_a_schema_that_says_more_about_other_properties_is_followed(more: dict[str, Any]) -> None:
    function = {"name": "f", "parameters": OPEN_SCHEMA | more}
    assert Followed(functions=[function], parallel=False).both(call('{"z":1}')) == "end"


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "#/$defs/none"},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
        {"type": "object", "properties": 5},
    ],
)
def test_parameters_that_no_call_can_follow_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Followed(functions=[{"name": "f", "parameters": parameters}])


@pytest.mark.parametrize(
    "guide", ["", "[]", '{"functions": []}', '{"functions": [{}]}', "[" * 5000]
)
def test_a_malformed_guide_is_refused(guide: str) -> None:
    with pytest.raises(InvalidRequest):
        Grammars(EMBEDDED).grammar("tool_calls", guide)


@pytest.mark.parametrize("depth", [100, 800, 5000])
def test_parameters_that_are_nested_deeply_are_followed_or_refused(depth: int) -> None:
    items = '{"items": ' * depth + "{}" + "}" * depth
    guide = f'{{"functions": [{{"name": "f", "parameters": {{"properties": {{"x": {items}}}}}}}]}}'
    with contextlib.suppress(InvalidRequest):
        assert Grammars(EMBEDDED).grammar("tool_calls", guide)
