"""Bodies of requests as objects of pydantic."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from services.gateway.invalid_field import explain_body_error
from services.gateway.json_bounds import check_json

M = TypeVar("M", bound=BaseModel)


def read_body(body: bytes | bytearray, kind: type[M]) -> M:
    """Return a body as an object of this kind.

    Raises
    ------
    InvalidRequest
        if the body is malformed, exceeds a bound of JSON, or has a value of a wrong type.
    """
    check_json(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise explain_body_error(error) from None
