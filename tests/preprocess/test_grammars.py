"""Response formats become grammars, or are refused with the reason."""

import pytest

from common.checkpoint import open_checkpoint
from common.errors import InvalidRequest
from common.vocabulary import open_vocabulary
from services.preprocess.grammars import Grammars
from tests.system.running import ROOT


def grammars() -> Grammars:
    return Grammars(open_vocabulary(open_checkpoint(ROOT / "models" / "tiny-ocr")))


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
    ],
)
def test_an_invalid_guide_is_refused_with_the_reason(kind: str, text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        grammars().grammar(kind, text)
