"""The plan of any family's tower as the inputs of a compiled program.

A plan is a dataclass of tensors and plain values. The tensors are inputs of the program, computed
outside of it: rotary tables, the order of patches, masks. The values are part of the program.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def tensors_of(plan: Any) -> dict[str, Tensor]:
    """Return the tensors of a plan by the names of their fields, in the order of the fields."""
    return {name: value for name, value in fields_of(plan).items() if isinstance(value, Tensor)}


def values_of(plan: Any) -> str:
    """Return a text that is equal for plans with equal plain values."""
    values = {name: x for name, x in fields_of(plan).items() if not isinstance(x, Tensor)}
    return repr(values)


def with_tensors(plan: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the plan with other tensors."""
    return dataclasses.replace(plan, **tensors)


def fields_of(plan: Any) -> dict[str, Any]:
    assert dataclasses.is_dataclass(plan), f"{type(plan).__name__} is not a dataclass"
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
