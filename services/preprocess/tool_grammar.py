"""The grammar of answers that call tools, in the form that Hermes and Qwen models are trained on.

Calls that the answer must make stand alone. Otherwise they stand anywhere in a text, and only what
follows the mark of a call is bound.
"""

import json
from typing import Any

import msgspec

from common.errors import InvalidRequest
from common.tool_calls import CLOSE, OPEN
from common.vocabulary import Vocabulary

MAX_CALLS = 16
"""The most calls that an answer is made to have. A model that is held by a grammar may not find the
end by itself."""
OTHER = "otherwise"
"""The name of the grammar of an answer without calls."""
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

ALWAYS_COMBINING = {"allOf", "not", "if", "dependentSchemas"}
COMBINING = ALWAYS_COMBINING | {"$ref", "anyOf", "oneOf"}
"""Keywords that combine properties with those of other schemas."""
OTHER_PROPERTIES = {"additionalProperties", "patternProperties", "unevaluatedProperties"}


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the answer may call."""

    name: str
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool = False
    """Whether the whole schema must be followed, or refused."""


class OtherGuide(msgspec.Struct, forbid_unknown_fields=True):
    """What an answer follows that has no call."""

    kind: str
    text: str


class ToolGuide(msgspec.Struct, forbid_unknown_fields=True):
    """What the gateway says about the calls of an answer."""

    functions: list[Function]
    parallel: bool = True
    """Whether the answer may have more than one call."""
    required: bool = True
    """Whether the answer has a call, and no text."""
    otherwise: OtherGuide | None = None
    """What the answer follows if it has no call; None if it may be any text with calls in it."""

    @property
    def can_be_left_out(self) -> bool:
        """Whether the guide only keeps the model from mistakes."""
        is_strict = any(function.strict for function in self.functions)
        return self.parallel and not (self.required or self.otherwise or is_strict)


def read_tool_guide(text: str) -> ToolGuide:
    """Return the guide that a gateway wrote. Raises InvalidRequest if it is malformed."""
    try:
        guide = msgspec.json.decode(text, type=ToolGuide)
    except (msgspec.DecodeError, RecursionError) as e:
        raise InvalidRequest(f"the tools cannot be read: {e}") from e
    if not guide.functions:
        raise InvalidRequest("an answer that calls tools needs at least one tool")
    return guide


def tool_grammar(guide: ToolGuide, vocabulary: Vocabulary, otherwise: str = "") -> str:
    """Return the grammar of an answer, in llguidance's form.

    `otherwise` is the grammar that the guide asks for if there is no call.
    """
    bodies = [f"body_{n}" for n in range(len(guide.functions))]
    close = either_spelling(CLOSE, vocabulary)
    rules = [
        "%llguidance {}",
        *start_rules(guide, vocabulary),
        f'inner: "\\n" ({" | ".join(bodies)}) "\\n" {close}',
    ]
    for body, function in zip(bodies, guide.functions, strict=True):
        begin = f'{{"name": {json.dumps(function.name)}, "arguments": '
        is_bound = guide.required or function.strict
        rules.append(f'{body}: {json.dumps(begin)} args_{body} "}}"')
        rules.append(f"args_{body}: %json {json.dumps(arguments_schema(function, is_bound))}")
    lark = "\n".join(rules)
    if not otherwise:
        return lark
    [other] = json.loads(otherwise)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": lark}, other | {"name": OTHER}]})


def start_rules(guide: ToolGuide, vocabulary: Vocabulary) -> list[str]:
    """Return the rules of an answer, down to what stands inside the marks of a call."""
    if not guide.required and not guide.otherwise:
        return free_rules(guide, vocabulary)
    other = f" | @{OTHER}" if guide.otherwise else ""
    more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if guide.parallel else ""
    return [f"start: call{more}{other}", f"call: {either_spelling(OPEN, vocabulary)} inner"]


def free_rules(guide: ToolGuide, vocabulary: Vocabulary) -> list[str]:
    """Return the rules of a text that may have calls. Without parallel calls, one ends it."""
    ids = sorted(vocabulary.markup_ids)
    markup = f"(TEXT <[{','.join(map(str, ids))}]>)*" if ids else ""
    token = vocabulary.id_of(OPEN)
    heads = ["spelled"] if token is None else ["spelled", f"TEXT <[{token}]>"]
    call = f"{markup} ({' | '.join(heads)}) inner"
    text = f"{markup} TEXT"
    return [
        f"start: ({call})* {text}" if guide.parallel else f"start: {text} | {call}",
        f"spelled[lazy]: TEXT {json.dumps(OPEN)}",
        r"TEXT: /(.|\n)*/",
    ]


def either_spelling(mark: str, vocabulary: Vocabulary) -> str:
    """Return what matches a mark, as one token or spelled with others.

    For llguidance they differ, because a token of such a name is special.
    """
    token = vocabulary.id_of(mark)
    return json.dumps(mark) if token is None else f"({json.dumps(mark)} | <[{token}]>)"


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose objects have no other properties than those that it names.

    One that combines the properties of several objects stays as it is.
    """
    return schema if is_combined(schema) else close(schema)


def is_combined(value: Any) -> bool:
    """Whether an object of a schema may have properties of several schemas."""
    if isinstance(value, list):
        return any(map(is_combined, value))
    if not isinstance(value, dict):
        return False
    names = COMBINING if "properties" in value else ALWAYS_COMBINING
    return not value.keys().isdisjoint(names) or any(map(is_combined, value.values()))


def close(schema: Any) -> Any:
    if isinstance(schema, list):
        return list(map(close, schema))
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name in found.keys() & {"properties", "$defs", "definitions"}:
        if isinstance(found[name], dict):
            found[name] = {key: close(value) for key, value in found[name].items()}
    for name in found.keys() & {"items", "prefixItems", "anyOf", "oneOf"}:
        found[name] = close(found[name])
    if "properties" in found and found.keys().isdisjoint(OTHER_PROPERTIES):
        found["additionalProperties"] = False
    return found


def arguments_schema(function: Function, is_bound: bool) -> dict[str, Any]:
    """Return the schema that the arguments of a call follow. It is any object, if not `is_bound`.

    Between the tokens of JSON there may be one space, which the models were trained to write after
    colons and commas, and no more: a model may write white space for ever. Likewise, objects have
    no properties but those that the schema names, unless it says more about others. What llguidance
    does not know of a schema counts only if the tool is strict.
    """
    if is_bound:
        schema = NO_ARGUMENTS if function.parameters is None else function.parameters
    else:
        schema = {}
    if not function.strict:
        schema = closed(schema)
    options = {"whitespace_pattern": " ?", "lenient": not function.strict}
    return schema | {"type": "object", "x-guidance": options}
