"""The error for one field of a request, and its texts for errors of pydantic and msgspec."""

import msgspec
from pydantic import ValidationError

from common.errors import ContextLengthExceeded, InvalidRequest, context_message


class InvalidField(InvalidRequest):
    """An InvalidRequest that names the field which is wrong, as `param` does in OpenAI's errors."""

    code = "InvalidRequest"

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}", stage="gateway")
        self.param = param


class BeyondContext(ContextLengthExceeded):
    """A ContextLengthExceeded that names the field which asks for too much."""

    code = "ContextLengthExceeded"

    def __init__(self, param: str, max_model_len: int, problem: str) -> None:
        super().__init__(context_message(max_model_len, problem), stage="gateway")
        self.param = param


def explain_body_error(error: ValidationError) -> InvalidRequest:
    """Return pydantic's first complaint as one sentence, which does not repeat the input."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(
            f"the body is not valid JSON: {first['ctx']['error']}", stage="gateway"
        )
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object", stage="gateway")
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]]
    return InvalidField("".join(steps).lstrip("."), lower_first(first["msg"]))


def explain_value_error(
    error: msgspec.ValidationError, values: dict[str, object], client_names: dict[str, str]
) -> InvalidField:
    """Return msgspec's complaint about one of the values.

    `client_names` has the name under which the client sent a value, if it differs from the field's.
    """
    problem, _, path = str(error).rstrip("`").partition(" - at `$.")
    value = values.get(path)
    got = f", got {value}" if isinstance(value, int | float) else ""
    return InvalidField(client_names.get(path, path), lower_first(problem).replace("`", "") + got)


def lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
