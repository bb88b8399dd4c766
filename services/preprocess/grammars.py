"""Response formats and regular expressions as grammars of llguidance.

They are checked here, before anything is computed for a request.
"""

import importlib.util
import json
from typing import Any

from common.errors import InvalidRequest
from common.vocabulary import Vocabulary
from services.preprocess.tool_grammar import ToolGuide, read_tool_guide, tool_grammar

ANY_OBJECT = '{"type": "object"}'
# A model that is forced into JSON it would not write may indent for ever.
JSON_STYLE = {"whitespace_pattern": r"[ \n\t]{0,20}"}


class Grammars:
    """Makes the grammars that answers of one model can follow."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: Any = None

    def is_needless(self, kind: str, text: str) -> bool:
        """Whether a guide need not be followed here, because llguidance is not installed."""
        is_installed = importlib.util.find_spec("llguidance") is not None
        return kind == "tool_calls" and not is_installed and read_tool_guide(text).can_be_left_out

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
        if kind == "tool_calls":
            return self._tool_grammar(read_tool_guide(text))
        from llguidance import LLMatcher

        if kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            schema = checked_schema(text) if kind == "json_schema" else ANY_OBJECT
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
        if problem := self._objection_to(grammar):
            raise InvalidRequest(f"the {kind} cannot be followed: {problem}")
        return grammar

    def _tool_grammar(self, guide: ToolGuide) -> str:
        other = guide.otherwise
        otherwise = self.grammar(other.kind, other.text) if other else ""
        try:
            grammar = tool_grammar(guide, self._vocabulary, otherwise)
        except RecursionError as e:
            raise InvalidRequest("the parameters of the tools are nested too deeply") from e
        if not self._objection_to(grammar):
            return grammar
        for function in guide.functions:
            alone = ToolGuide([function], required=guide.required)
            if problem := self._objection_to(tool_grammar(alone, self._vocabulary)):
                name = function.name
                raise InvalidRequest(f"the parameters of {name} cannot be followed: {problem}")
        raise InvalidRequest("the tools are too many or too large to be followed: send fewer")

    def _objection_to(self, grammar: str) -> str:
        """Return why no answer can follow a grammar; empty if one can."""
        from llguidance import LLMatcher

        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        return problem.splitlines()[0][:300] if problem else ""


def checked_schema(text: str) -> str:
    """Return a JSON schema in one form. Raises InvalidRequest if the text is not one."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("the JSON schema is not valid JSON") from e
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("the JSON schema must be an object")
    return json.dumps(schema)
