"""When an answer that is caught in a loop ends, as both APIs say it."""

from collections.abc import Mapping

import msgspec
from pydantic import BaseModel, ConfigDict

from common.messages import Repetition
from services.gateway.invalid_field import InvalidField, explain_value_error

NAME = "repetition_detection"


class RepetitionDetection(BaseModel):
    """vLLM's object of this name. The ranges of its values are those of `Repetition`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_pattern_size: int | None = None
    min_pattern_size: int | None = None
    min_count: int | None = None


def make_repetition(values: Mapping[str, int | None] | None) -> Repetition | None:
    """Return the values as a Repetition, or None for the model's default.

    Raises
    ------
    InvalidField
        if a value is out of range, or the values do not fit together.
    """
    if values is None:
        return None
    given: dict[str, object] = {name: v for name, v in values.items() if v is not None}
    try:
        repetition = msgspec.convert(given, Repetition)
    except msgspec.ValidationError as error:
        names = {name: f"{NAME}.{name}" for name in given}
        raise explain_value_error(error, given, names) from None
    if repetition.objection:
        raise InvalidField(NAME, repetition.objection)
    return repetition
