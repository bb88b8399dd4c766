"""Response formats and regular expressions as grammars of llguidance.

They are checked here, before anything is computed for a request.
"""

import importlib.util
import json
import re
from typing import Any

from common.errors import InvalidRequest, shorten
from common.vocabulary import Vocabulary
from services.preprocess.tool_grammar import ToolGuide, read_tool_guide, tool_grammar

ANY_OBJECT = '{"type": "object"}'
# A model that is forced into JSON it would not write may indent for ever.
COMPACT = {"whitespace_flexible": False}
GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


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

    def grammar(self, kind: str, text: str, whitespace: str = "") -> str:
        """Return the grammar of a guide, which has a `GuideKind` and a text.

        JSON is compact, unless `whitespace` is a regular expression for what stands between its
        tokens.

        Raises
        ------
        InvalidRequest
            if no answer can follow it, or llguidance is not installed.
        """
        self.load()
        if kind == "tool_calls":
            return self._tool_grammar(read_tool_guide(text), whitespace)
        grammar = made_grammar(kind, text, whitespace)
        if problem := self._objection_to(grammar):
            raise InvalidRequest(f"the {kind} cannot be followed: {problem}")
        return grammar

    def _tool_grammar(self, guide: ToolGuide, whitespace: str) -> str:
        other = guide.otherwise
        otherwise = self.grammar(other.kind, other.text, whitespace) if other else ""
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

        if problem := LLMatcher.validate_grammar(grammar, self._tokenizer):
            return str(problem).splitlines()[0][:300]
        # A valid grammar may have no answer, such as a schema that is only a reference to itself.
        matcher = LLMatcher(self._tokenizer, grammar)
        matcher.compute_bitmask()
        return "nothing can begin an answer" if matcher.is_error() else ""


def made_grammar(kind: str, text: str, whitespace: str) -> str:
    """Return the grammar of a guide other than "tool_calls", which may not be one to follow.

    Raises
    ------
    InvalidRequest
        if the text is not of its kind.
    """
    from llguidance import LLMatcher

    match kind:
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "choice":
            return of_lark(lark_of_choice(text))
        case "grammar":
            return of_lark(lark_of(text))
    schema = checked_schema(text) if kind == "json_schema" else ANY_OBJECT
    style = {"whitespace_pattern": whitespace} if whitespace else COMPACT
    return LLMatcher.grammar_from_json_schema(schema, overrides=style)


def of_lark(lark: str) -> str:
    """Return a grammar in Lark's form as one in the form that others can refer to."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def lark_of_choice(text: str) -> str:
    """Return the grammar of exactly one of the texts in a JSON list.

    They are one terminal. As rules, each of them would be a state of the parser at every step.
    """
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("the choice is not valid JSON") from e
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise InvalidRequest("the choice must be a list of texts")
    return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, texts))}"


def lark_of(text: str) -> str:
    """Return a grammar in Lark's form, which it may have already; otherwise it is GBNF."""
    if not GBNF_RULE.search(text):
        return text
    from llguidance import grammar_from

    try:
        return str(grammar_from("gbnf", text))
    except ValueError as e:
        raise InvalidRequest(f"the grammar cannot be read as GBNF: {shorten(str(e))}") from e


def checked_schema(text: str) -> str:
    """Return a JSON schema in one form. Raises InvalidRequest if the text is not one."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("the JSON schema is not valid JSON") from e
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("the JSON schema must be an object")
    return json.dumps(schema)
