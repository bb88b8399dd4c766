"""Response formats and regular expressions as grammars of llguidance.

They are checked here, before anything is computed for a request.
"""

import json
from typing import Any

from common.errors import InvalidRequest
from common.vocabulary import Vocabulary
from services.preprocess.tool_grammar import read_tool_guide, tool_grammar

ANY_OBJECT = '{"type": "object"}'
# A model that is forced into JSON it would not write may indent for ever.
JSON_STYLE = {"whitespace_pattern": r"[ \n\t]{0,20}"}


class Grammars:
    """Makes the grammars that answers of one model can follow."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: Any = None

    def load(self) -> None:
        """Load what all grammars need, once. Raises InvalidRequest if it is not installed."""
        try:
            from llguidance import LLTokenizer
        except ImportError as e:
            raise InvalidRequest(
                "guided answers need the extra `guided` (llguidance): install it for the "
                "preprocess and llm services"
            ) from e
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._vocabulary.grammar_tokenizer_json())

    def grammar(self, kind: str, text: str) -> str:
        """Return the grammar of "json_object", or of a "json_schema", "regex" or "tool_calls" in
        `text`.

        Raises
        ------
        InvalidRequest
            if no answer can follow it, or llguidance is not installed.
        """
        self.load()
        from llguidance import LLMatcher

        if kind == "tool_calls":
            grammar = tool_grammar(read_tool_guide(text), self._vocabulary)
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            schema = checked_schema(text) if kind == "json_schema" else ANY_OBJECT
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
        if problem := LLMatcher.validate_grammar(grammar, self._tokenizer):
            reason = problem.splitlines()[0][:300]
            raise InvalidRequest(f"the {kind} cannot be followed: {reason}")
        return grammar


def checked_schema(text: str) -> str:
    """Return a JSON schema in one form. Raises InvalidRequest if the text is not one."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("the JSON schema is not valid JSON") from e
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("the JSON schema must be an object")
    return json.dumps(schema)
