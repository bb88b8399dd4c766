"""What an answer must follow: response formats, vLLM's structured outputs, and older fields.

A request has one of them at most.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from services.gateway.chat_messages import Body
from services.gateway.invalid_field import InvalidField
from services.gateway.json_bounds import check_json
from services.gateway.limits import MAX_GUIDE_BYTES
from services.gateway.unsupported import refuse_extra

MAX_WHITESPACE_CHARS = 256
MAX_TEXTS = 4096
"""The most texts that an answer may be chosen from."""
JSON_KINDS = ("json_object", "json_schema")
NOT_SUPPORTED = "this is not supported; use text, json_object or json_schema"


@dataclass(frozen=True, slots=True)
class Guide:
    """What an answer must follow, in the form of a GenerationRequest; empty for a free answer."""

    kind: str = ""
    text: str = ""
    whitespace: str = ""


NO_GUIDE = Guide()


class JsonSchema(Body):
    """The schema of a response format. Its other fields describe it, and `strict` always holds."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's response format, with the `schema` of a json_object that others know."""

    type: str
    json_schema: JsonSchema | None = None
    object_schema: dict[str, Any] | None = Field(None, alias="schema")

    def guide(self, path: str = "response_format") -> Guide:
        """Return what the answer follows. Raises InvalidField if it cannot be followed."""
        if self.type not in ("text", *JSON_KINDS):
            raise InvalidField(f"{path}.type", f"{self.type[:40]!r}: {NOT_SUPPORTED}")
        refuse_extra(self, path)
        if self.json_schema and self.type != "json_schema":
            raise InvalidField(f"{path}.json_schema", 'is allowed with type "json_schema" only')
        if self.object_schema is not None and self.type != "json_object":
            raise InvalidField(f"{path}.schema", 'is allowed with type "json_object" only')
        match self.type:
            case "json_schema":
                return self._guide_of_schema(f"{path}.json_schema")
            case "json_object" if self.object_schema is not None:
                return schema_guide(self.object_schema, f"{path}.schema")
            case "json_object":
                return Guide("json_object")
        return NO_GUIDE

    def _guide_of_schema(self, path: str) -> Guide:
        if self.json_schema:
            refuse_extra(self.json_schema, path)
        if self.json_schema is None or self.json_schema.json_schema is None:
            raise InvalidField(f"{path}.schema", "must be a JSON schema (an object)")
        return schema_guide(self.json_schema.json_schema, f"{path}.schema")


class StructuredOutputs(Body):
    """vLLM's object of this name."""

    guided_json: Any = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    """JSON has no white space anyway, unless a pattern asks for it."""
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None
    """Is about other servers' backends."""

    def guide(self, path: str = "structured_outputs") -> Guide:
        """Return what the answer follows. Raises InvalidField if it is not exactly one thing."""
        refuse_extra(self, path)
        if self.disable_any_whitespace and self.whitespace_pattern:
            raise InvalidField(f"{path}.whitespace_pattern", "contradicts disable_any_whitespace")
        schema = self.guided_json
        if self.disable_additional_properties and schema is not None:
            schema = closed(read_schema(schema, f"{path}.json"))
        found = dict(
            guides_of(
                {
                    f"{path}.json": ("json_schema", schema),
                    f"{path}.regex": ("regex", self.regex),
                    f"{path}.choice": ("choice", self.choice),
                    f"{path}.grammar": ("grammar", self.grammar),
                    f"{path}.json_object": ("json_object", self.json_object),
                }
            )
        )
        if not found:
            raise InvalidField(path, "needs one of json, regex, choice, grammar and json_object")
        return only_one(found)


class Guided(Body):
    """The fields of a body that say what an answer follows."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None
    json_schema: Any = None
    """SGLang's and llama.cpp's name of `guided_json`."""
    regex: str | None = None
    """SGLang's name of `guided_regex`."""
    ebnf: str | None = None
    """SGLang's name of `guided_grammar`."""
    grammar: Any = None
    """llama.cpp's name of `guided_grammar`."""

    def guide(self) -> Guide:
        """Return what the answer follows.

        Raises
        ------
        InvalidField
            if that is several things, or cannot be followed.
        """
        if self.model_fields_set.isdisjoint(Guided.model_fields):
            return NO_GUIDE  # most requests
        found = dict(
            guides_of(
                {
                    "guided_json": ("json_schema", self.guided_json),
                    "guided_regex": ("regex", self.guided_regex),
                    "guided_choice": ("choice", self.guided_choice),
                    "guided_grammar": ("grammar", self.guided_grammar),
                    "guided_json_object": ("json_object", self.guided_json_object),
                    "json_schema": ("json_schema", self.json_schema),
                    "regex": ("regex", self.regex),
                    "ebnf": ("grammar", self.ebnf),
                    "grammar": ("grammar", self.grammar),
                }
            )
        )
        if self.response_format and (guide := self.response_format.guide()) != NO_GUIDE:
            found["response_format"] = guide
        if self.structured_outputs:
            found["structured_outputs"] = self.structured_outputs.guide()
        return with_whitespace(only_one(found), *self._whitespace())

    def _whitespace(self) -> tuple[str, str]:
        """Return the path and the value of the pattern of white space; it may be empty."""
        outputs = self.structured_outputs
        inner = outputs.whitespace_pattern if outputs else None
        outer = self.guided_whitespace_pattern
        if inner and outer and inner != outer:
            problem = "structured_outputs.whitespace_pattern has another value; send one of them"
            raise InvalidField("guided_whitespace_pattern", problem)
        if inner:
            return "structured_outputs.whitespace_pattern", inner
        return "guided_whitespace_pattern", outer or ""


def guides_of(fields: dict[str, tuple[str, Any]]) -> Iterator[tuple[str, Guide]]:
    """Yield the path and the guide of each field that is set: by its path, its kind and value."""
    for path, (kind, value) in fields.items():
        if value is None or (kind == "json_object" and not value):
            continue
        match kind:
            case "json_object":
                yield path, Guide(kind)
            case "json_schema":
                yield path, schema_guide(read_schema(value, path), path)
            case "choice":
                yield path, choice_guide(value, path)
            case _:
                yield path, text_guide(kind, value, path)


def only_one(found: dict[str, Guide]) -> Guide:
    """Return the one guide that a request has. Raises InvalidField if it has several."""
    if len(found) > 1:
        first, second, *_ = found
        raise InvalidField(second, f"{first} is set, too; an answer follows only one of them")
    return next(iter(found.values()), NO_GUIDE)


def with_whitespace(guide: Guide, path: str, pattern: str) -> Guide:
    """Return a guide of JSON whose white space follows a pattern."""
    if not pattern:
        return guide
    if guide.kind not in JSON_KINDS:
        raise InvalidField(path, "is about JSON; ask for JSON, too, or leave it out")
    if len(pattern) > MAX_WHITESPACE_CHARS:
        raise InvalidField(path, f"has more than {MAX_WHITESPACE_CHARS} characters")
    return replace(guide, whitespace=pattern)


def read_schema(value: Any, path: str) -> dict[str, Any]:
    """Return a JSON schema that is an object, or the text of one."""
    if isinstance(value, str):
        check_json(value.encode(errors="replace"))
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidField(path, "this is not valid JSON") from None
    if not isinstance(value, dict):
        raise InvalidField(path, "must be a JSON schema (an object)")
    return value


def schema_guide(schema: dict[str, Any], path: str) -> Guide:
    return text_guide("json_schema", json.dumps(schema), path)


def choice_guide(texts: list[str], path: str) -> Guide:
    """Return the guide of an answer that is one of some texts."""
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise InvalidField(path, f"must have 1 to {MAX_TEXTS} texts")
    if not all(texts):
        raise InvalidField(path, "a text is empty; leave it out")
    return text_guide("choice", json.dumps(texts), path)


def text_guide(kind: str, text: Any, path: str) -> Guide:
    if not isinstance(text, str) or not text:
        raise InvalidField(path, "must be a text that is not empty")
    if len(text.encode(errors="replace")) > MAX_GUIDE_BYTES:
        raise InvalidField(path, f"it has more than {MAX_GUIDE_BYTES} bytes; send a smaller one")
    return Guide(kind, text)


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties but those that it names."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed_part(name, one) for name, one in schema.items()}
    is_open = "properties" in schema and "additionalProperties" not in schema
    return inner | ({"additionalProperties": False} if is_open else {})


def closed_part(name: str, part: Any) -> Any:
    """Return what a schema has under a keyword, with its schemas closed."""
    if name in ("const", "enum", "default", "examples"):
        return part
    if name in ("properties", "patternProperties", "$defs", "definitions") and isinstance(
        part, dict
    ):
        return {key: closed(one) for key, one in part.items()}
    return closed(part)
