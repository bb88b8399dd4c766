"""Random messages, made from their types.

All of them are well-framed: the fields have the declared types and are within the declared bounds.
What the fields say may be anything.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import inspect

from common.wire import NUMPY_DTYPES, Tensor

T = TypeVar("T")

POOLED_SHARE = 0.85
"""How often a field that has a pool gets a value of the pool."""
MAX_REPEATS = 3
"""How often a text is drawn for a field with bounds, before the shortest one is used."""
SIDES = (0, 1, 1, 2, 3, 4, 5, 8, 9, 32)
INTS = (0, 1, 2, 3, 4, 7, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**48, 2**62, 2**63 - 1)
FLOATS = (0.0, 1e-9, 0.5, 0.9, 1.0, 2.0, 60.0, 1e6, 1e9, 1e300)
STRINGS = (
    "",
    "x",
    " ",
    "stop",
    "length",
    "repetition",
    "ipc:///tmp/nowhere",
    "tcp://127.0.0.1:1",
    "inproc://x",
    "../../etc/passwd",
    "é😀\N{ZERO WIDTH JOINER}" * 5,
    "a" * 200,
    "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 2000,
    '{"x": [}',
    "%s %n {} \\",
    "\x00\x1b[31m\n",
)
TEXTS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    b"\xff\xfe\x00",
    b"\xed\xa0\x80",
    b'{"images": 3}',
    b'{"images": [{"encode_seconds": "x"}]}',
    b'{"preprocess_seconds": 1e999, "images": []}',
    b'{"preprocess_seconds": NaN}',
    b'{"x": "\\ud800"}',
    b"[" * 3000,
    b'{"images": [' + b"{}," * 300 + b"{}]}",
    "é😀".encode() * 100,
    b'[{"role": "user", "content": "Read it."}]',
    b'[{"role": "user", "content": [{"type": "image"}]}]',
    b'{"type": "object", "properties": {"a": {"$ref": "#"}}}',
    b"(a|b)*c{1,999}",
)
"""Contents of tensors that hold text."""


class Maker:
    """Makes messages. Fields whose names have a pool mostly get one of its values, so that messages
    are about the same requests and peers."""

    def __init__(self, draw: Random, pools: Mapping[str, Sequence[Any]]) -> None:
        self.draw = draw
        self._pools = pools

    def make(self, kind: type[T]) -> T:
        """Return a message of this kind."""
        return kind(**{field.name: self._field(field) for field in fields_of(kind)})

    def mutate(self, message: T) -> T:
        """Return the message with another value at one place, at whatever depth."""
        if not fields_of(type(message)):
            return message
        field = self.draw.choice(fields_of(type(message)))
        old = getattr(message, field.name)
        return msgspec.structs.replace(message, **{field.name: self._another(field, old)})

    def _another(self, field: inspect.Field, old: Any) -> Any:
        if isinstance(old, Tensor) and self.draw.random() < 0.8:
            return self.distort(old)
        if isinstance(old, msgspec.Struct) and self.draw.random() < 0.8:
            return self.mutate(old)
        if isinstance(old, tuple) and old and self.draw.random() < 0.8:
            return self._another_tuple(field, old)
        return self._value(field.type, field.name)

    def _another_tuple(self, field: inspect.Field, old: tuple[Any, ...]) -> tuple[Any, ...]:
        match self.draw.randrange(3):
            case 0:
                return old[:-1]
            case 1 if isinstance(old[0], Tensor):
                return (self.distort(old[0]), *old[1:])
        return self._value(field.type, field.name)

    def _field(self, field: inspect.Field) -> Any:
        if not field.required and self.draw.random() < 0.5:
            return default_of(field)
        return self._value(field.type, field.name)

    def _value(self, of: inspect.Type, name: str) -> Any:
        """Return a value of a type, for a field of this name."""
        if name in self._pools and self.draw.random() < POOLED_SHARE:
            return self.draw.choice(self._pools[name])
        match of:
            case inspect.UnionType(types=types):
                return self._value(self.draw.choice(types), "")
            case inspect.StructType(cls=cls):
                return self.make(cls)
            case inspect.VarTupleType(item_type=item, min_length=least, max_length=most):
                count = self.draw.choice([0, 1, 2, 3, most or 20])
                return tuple(self._value(item, "") for _ in range(max(count, least or 0)))
            case inspect.TupleType(item_types=items):
                return tuple(self._value(item, "") for item in items)
            case inspect.LiteralType(values=values):
                return self.draw.choice(values)
            case inspect.CustomType(cls=cls) if cls is Tensor:
                return self.tensor()
            case inspect.NoneType():
                return None
        return self._plain(of)

    def _plain(self, of: inspect.Type) -> Any:
        """Return a value of a type that consists of one value, within its bounds."""
        match of:
            case inspect.BoolType():
                return self.draw.random() < 0.5
            case inspect.IntType():
                low, high = bounds_of(of, -(2**63), 2**63 - 1)
                return self._number([*INTS, *(-n for n in INTS[1:]), low, high], low, high)
            case inspect.FloatType():
                low, high = bounds_of(of, -1e300, 1e300)
                return float(self._number([*FLOATS, -0.5, -2.0, low, high], low, high))
            case inspect.StrType(min_length=least, max_length=most, pattern=pattern):
                return self._text(least or 0, most or 5000, pattern)
            case inspect.BytesType(max_length=most):
                return self.draw.randbytes(self.draw.choice([0, 1, most or 64]))
        raise AssertionError(f"a field of an unknown type: {of}")

    def _number(self, values: list[Any], low: float, high: float) -> Any:
        """Return one of the values, or the nearest that is within the bounds."""
        return min(max(self.draw.choice(values), low), high)

    def _text(self, least: int, most: int, pattern: str | None) -> str:
        words = re.findall(r"\w+", pattern) if pattern and "|" in pattern else STRINGS
        for _ in range(MAX_REPEATS):
            text = self.draw.choice(words)[:most]
            if len(text) >= least and (pattern is None or re.search(pattern, text)):
                return text
        return "x" * least if pattern is None else words[0][:most]

    # Tensors

    def tensor(self) -> Tensor:
        """Return a tensor of any dtype, shape and contents. Many hold a text."""
        if self.draw.random() < 0.3:
            return Tensor.of_bytes(self.draw.choice(TEXTS))
        dtype = self.draw.choice(tuple(NUMPY_DTYPES))
        shape = tuple(self.draw.choice(SIDES) for _ in range(self.draw.choice((0, 1, 1, 2, 2, 3))))
        return Tensor(dtype, shape, self._contents(dtype, math.prod(shape)))

    def _contents(self, dtype: str, count: int) -> bytes:
        size = NUMPY_DTYPES[dtype].itemsize * count
        match self.draw.randrange(4):
            case 0:
                return bytes(size)
            case 1:
                return b"\xff" * size
            case 2 if dtype == "int64":
                return np.array([self.draw.randrange(60) for _ in range(count)], np.int64).tobytes()
            case 2 if dtype == "float32":
                return np.full(count, 0.5, np.float32).tobytes()
        return self.draw.randbytes(size)

    def distort(self, tensor: Tensor) -> Tensor:
        """Return the tensor with another dtype, shape, or value."""
        match self.draw.randrange(7):
            case 0:
                return Tensor(tensor.dtype, (*tensor.shape, 1), tensor.data)
            case 1:
                return Tensor(tensor.dtype, (math.prod(tensor.shape),), tensor.data)
            case 2:
                return Tensor.of_bytes(bytes(tensor.data))
            case 3 if tensor.shape and tensor.shape[0]:
                row = len(tensor.data) // tensor.shape[0]
                shape = (tensor.shape[0] - 1, *tensor.shape[1:])
                return Tensor(tensor.dtype, shape, tensor.data[: len(tensor.data) - row])
            case 4 if tensor.dtype in ("int64", "float32"):
                other = np.float32 if tensor.dtype == "int64" else np.int64
                with np.errstate(all="ignore"):
                    return Tensor.of(tensor.numpy().astype(other))
            case 5:
                return self.tensor()
        return self._with_another_value(tensor)

    def _with_another_value(self, tensor: Tensor) -> Tensor:
        if not len(tensor.data):
            return tensor
        data = bytearray(tensor.data)
        width = NUMPY_DTYPES[tensor.dtype].itemsize
        place = self.draw.randrange(len(data) // width) * width
        values = {
            "int64": [-1, 0, 48, 50, 2**31, 2**63 - 1, -(2**63)],
            "float32": [0.0, math.nan, math.inf, -math.inf, 3e38],
        }
        if tensor.dtype in values:
            value = self.draw.choice(values[tensor.dtype])
            data[place : place + width] = np.array(value, tensor.dtype).tobytes()
        else:
            data[place : place + width] = self.draw.randbytes(width)
        return Tensor(tensor.dtype, tensor.shape, bytes(data))


@functools.cache
def fields_of(kind: type) -> tuple[inspect.Field, ...]:
    """Return the fields of a message or of a structure in one."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType), kind
    return described.fields


def default_of(field: inspect.Field) -> Any:
    if field.default is not inspect.NODEFAULT:
        return field.default
    return field.default_factory()


def bounds_of(of: inspect.IntType | inspect.FloatType, low: float, high: float) -> tuple[Any, Any]:
    """Return the least and the greatest value; `low` and `high` where the type has none."""
    least = of.ge if of.ge is not None else low
    if of.gt is not None:
        least = of.gt + (1 if isinstance(of, inspect.IntType) else 1e-9)
    most = of.le if of.le is not None else high
    return least, most
