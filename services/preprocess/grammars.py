"""Response formats and regular expressions to grammars of llguidance, checked before anything is
computed for them."""

import json
from pathlib import Path
from typing import Any

from common.errors import InvalidRequest

ANY_OBJECT = '{"type": "object"}'
# A model that is forced into JSON it would not write may indent for ever.
JSON_STYLE = {"whitespace_pattern": r"[ \n\t]{0,20}"}


class Guides:
    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer_file = tokenizer_file
        self._tokenizer: Any = None

    def grammar(self, kind: str, text: str) -> str:
        """The grammar of "json_object", or of a "json_schema" or "regex" given as `text`.

        Raises
        ------
        InvalidRequest
            where it cannot be followed, or llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as e:
            raise InvalidRequest(
                "guided answers need the extra `guided` (llguidance) on the preprocess and llm "
                "services"
            ) from e
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._tokenizer_file.read_text())
        if kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            grammar = LLMatcher.grammar_from_json_schema(
                checked_schema(text) if kind == "json_schema" else ANY_OBJECT, overrides=JSON_STYLE
            )
        if problem := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise InvalidRequest(f"the {kind} cannot be followed: {problem.splitlines()[0][:300]}")
        return grammar


def checked_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("the JSON schema is no JSON") from e
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("the JSON schema must be an object")
    return json.dumps(schema)
