"""Messages made from their types: any of a kind for hypothesis, the least and the largest of a
kind, and the tensors in one."""

import re
import typing
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st
from msgspec import inspect

from common.messages import HOPS, TRACEPARENT
from common.wire import NUMPY_DTYPES, Tensor

MAX_IMAGES = 32
"""The gateway's limit: the only number of things in a message that its type leaves open."""


def kinds(union: Any) -> tuple[type[msgspec.Struct], ...]:
    return typing.get_args(union)


MESSAGES = sorted(
    {kind for union in HOPS.values() for kind in kinds(union)}, key=lambda kind: kind.__name__
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(NUMPY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = int(np.prod(shape)) * NUMPY_DTYPES[dtype].itemsize
    return Tensor(dtype, shape, np.random.default_rng(draw(st.integers(0, 99))).bytes(size))


def anything(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Every value that the type allows."""
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: anything(field.type) for field in fields})
        case inspect.UnionType(types=types):
            return st.one_of(*map(anything, types))
        case inspect.VarTupleType(item_type=item, max_length=most):
            return st.lists(anything(item), max_size=min(most or 3, 3)).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(anything, items))
        case inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern)
        case inspect.StrType(min_length=least, max_length=most):
            return st.text(st.characters(codec="utf-8"), min_size=least or 0, max_size=most)
        case inspect.IntType(ge=least, le=most):
            return st.integers(
                -(2**63) if least is None else least, 2**63 - 1 if most is None else most
            )
        case inspect.FloatType(ge=least, gt=above, le=most):
            return st.floats(above if least is None else least, most, exclude_min=least is None)
        case inspect.CustomType(cls=cls) if cls is Tensor:
            return tensors()
        case inspect.BytesType(max_length=most):
            return st.binary(max_size=most)
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
    raise AssertionError(f"no strategy for {kind}")


def any_message(kind: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    return anything(inspect.type_info(kind))


def sample(kind: type[msgspec.Struct], tensor: Tensor, largest: bool = False) -> Any:
    """A message whose every tensor is `tensor`, and whose every other field is small, or as large
    as its type allows."""
    return filled(inspect.type_info(kind), tensor, largest)


def filled(kind: inspect.Type, tensor: Tensor, largest: bool) -> Any:
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            return cls(**{field.name: filled(field.type, tensor, largest) for field in fields})
        case inspect.UnionType(types=types):
            return filled(
                next(t for t in types if not isinstance(t, inspect.NoneType)), tensor, largest
            )
        case inspect.VarTupleType(item_type=item, max_length=most):
            return (filled(item, tensor, largest),) * ((most or MAX_IMAGES) if largest else 1)
        case inspect.TupleType(item_types=items):
            return tuple(filled(item, tensor, largest) for item in items)
        case inspect.StrType(pattern=str(pattern)) if pattern == TRACEPARENT:
            return f"00-{'5' * 32}-{'6' * 16}-01"
        case inspect.StrType(pattern=str(pattern)):
            return re.findall(r"\w+", pattern)[0]  # the first of the alternatives
        case inspect.StrType(max_length=most):
            return "\U0001f9fe" * most if largest and most else "x"
        case inspect.IntType(le=most):
            return (2**63 - 1 if most is None else most) if largest else 1
        case inspect.BytesType(max_length=most):
            return b"x" * (most if largest and most else 1)
        case inspect.LiteralType(values=values):
            return values[0]
        case inspect.CustomType():
            return tensor
    return {inspect.FloatType: 1.0, inspect.BoolType: True}[type(kind)]


def tensors_in(value: Any) -> list[Tensor]:
    """In the order of the fields, which is the order of the frames."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, msgspec.Struct):
        value = tuple(getattr(value, name) for name in value.__struct_fields__)
    return (
        [tensor for item in value for tensor in tensors_in(item)]
        if isinstance(value, tuple)
        else []
    )
