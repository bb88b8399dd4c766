"""Response formats become grammars, or are refused with the reason."""

import pytest

from common.errors import InvalidRequest
from services.preprocess.grammars import Guides
from tests.system.running import ROOT


def guides() -> Guides:
    return Guides(ROOT / "models" / "tiny-ocr" / "tokenizer.json")


@pytest.mark.parametrize(
    ("kind", "text"),
    [("json_object", ""), ("json_schema", '{"type": "integer"}'), ("regex", "[a-z]+")],
)
def test_what_can_be_followed_becomes_a_grammar(kind: str, text: str) -> None:
    assert guides().grammar(kind, text)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", '{"type": "nonsense"}', "nonsense"),
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[" * 100_000, "no JSON"),
        ("json_schema", "3", "must be an object"),
        ("regex", "[a-", "regex"),
    ],
)
def test_what_cannot_is_refused_with_the_reason(kind: str, text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        guides().grammar(kind, text)
