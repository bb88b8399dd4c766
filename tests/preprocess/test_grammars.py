"""Response formats become grammars, or are refused with the reason."""

import json

import pytest

from common.checkpoint import open_checkpoint
from common.errors import InvalidRequest
from common.vocabulary import open_vocabulary
from services.preprocess.grammars import Grammars
from tests.system.running import ROOT

VOCABULARY = open_vocabulary(open_checkpoint(ROOT / "models" / "tiny-ocr"))


def grammars() -> Grammars:
    return Grammars(VOCABULARY)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("json_object", ""), ("json_schema", '{"type": "integer"}'), ("regex", "[a-z]+")],
)
def test_a_valid_guide_becomes_a_grammar(kind: str, text: str) -> None:
    assert grammars().grammar(kind, text)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", '{"type": "nonsense"}', "nonsense"),
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[" * 100_000, "not valid JSON"),
        ("json_schema", "3", "must be an object"),
        ("regex", "[a-", "regex"),
        ("json_schema", '{"$ref": "#"}', "begin an answer"),
        ("regex", r"[^\s\S]", "begin an answer"),
    ],
)
def test_an_invalid_guide_is_refused_with_the_reason(kind: str, text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        grammars().grammar(kind, text)


def accepts(grammar: str, text: str) -> bool:
    """Return whether an answer with this grammar may be this text, and end there."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer = LLTokenizer(VOCABULARY.grammar_tokenizer_json())
    matcher = LLMatcher(tokenizer, grammar)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


OBJECT = '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}}'


@pytest.mark.parametrize(("kind", "text"), [("json_object", ""), ("json_schema", OBJECT)])
def test_json_is_compact_unless_white_space_is_asked_for(kind: str, text: str) -> None:
    compact = grammars().grammar(kind, text)
    assert accepts(compact, '{"a":1,"b":[2,{}]}')
    for spaced in ('{"a": 1}', '{ "a":1}', '{"a":1 }', '{"b":[1, 2]}', '{"a":1,\n"b":[]}'):
        assert not accepts(compact, spaced), spaced
    assert accepts(grammars().grammar(kind, text, r"[ \n]?"), '{"a": 1,\n"b":[ ]}')


def test_a_choice_is_one_of_its_texts_exactly() -> None:
    texts = ["yes", 'say "no"\n/\\', "größe", *map(str, range(4000))]
    grammar = grammars().grammar("choice", json.dumps(texts))
    assert all(accepts(grammar, text) for text in (*texts[:3], "3999"))
    assert not any(accepts(grammar, text) for text in ("", "ye", "yesno", "yes ", "4000"))


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "a" digit+\ndigit ::= [0-9]',
        'start: "a" DIGIT+\nDIGIT: /[0-9]/',
        '?start: "a" d\nd: /[0-9]+/',
        'root ::= root [0-9] | "a" [0-9]',
    ],
)
def test_grammars_are_read_in_both_forms(text: str) -> None:
    grammar = grammars().grammar("grammar", text)
    assert accepts(grammar, "a12") and not accepts(grammar, "a")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("grammar", "root ::= nowhere"),
        ("grammar", "root ::= " + "(" * 50_000),
        ("grammar", "start: nowhere"),
        ("grammar", "nonsense"),
        ("choice", "[]"),
        ("choice", "[1]"),
        ("choice", "{"),
    ],
)
def test_a_grammar_or_a_choice_that_cannot_be_read_is_refused(kind: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=kind):
        grammars().grammar(kind, text)


def test_a_pattern_of_white_space_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="json_object"):
        grammars().grammar("json_object", "", "[")
