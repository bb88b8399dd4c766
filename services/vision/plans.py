"""The plan of any family's tower as the inputs of a compiled program.

A plan is a dataclass of tensors and plain values. The tensors are inputs of the program, computed
outside of it: rotary tables, the order of patches, masks. The values are part of the program.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.vision_artefact import ProgramInput


class UnfitPlan(ValueError):
    """A plan cannot be the inputs of a compiled program."""


def tensors_of(plan: Any) -> dict[str, Tensor]:
    """Return the tensors of a plan by the names of their fields, in the order of the fields.

    Raises
    ------
    UnfitPlan
        if one of them was computed from weights that are not there.
    """
    tensors = {name: x for name, x in fields_of(plan).items() if isinstance(x, Tensor)}
    if made_of_weights := [name for name, x in tensors.items() if x.is_meta]:
        raise UnfitPlan(
            f"{', '.join(made_of_weights)} of the plan depends on weights, which only the forward "
            "pass may use"
        )
    return tensors


def values_of(plan: Any) -> str:
    """Return a text that is equal for plans with equal plain values."""
    values = {name: x for name, x in fields_of(plan).items() if not isinstance(x, Tensor)}
    return repr(values)


def inputs_of(patches: Tensor, plan: Any) -> dict[str, Tensor]:
    """Return the inputs of a program by their names, in order."""
    return {"patches": patches, **tensors_of(plan)}


def described(inputs: Mapping[str, Tensor]) -> tuple[ProgramInput, ...]:
    """Return what a program must know of its inputs."""
    return tuple(
        ProgramInput(name, str(x.dtype).removeprefix("torch."), tuple(x.shape))
        for name, x in inputs.items()
    )


def with_tensors(plan: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the plan with other tensors."""
    return dataclasses.replace(plan, **tensors)


def fields_of(plan: Any) -> dict[str, Any]:
    assert dataclasses.is_dataclass(plan), f"{type(plan).__name__} is not a dataclass"
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
