"""Reads the pickle in a torch file without running anything that it names.

A pickle is a program for a small stack machine. Python's own machine calls whatever the program
names; this one knows the few operations that `torch.save` writes for tensors in dictionaries, and
refuses all others. It imports nothing and calls nothing of the file's.

The operations and their bytes are those of Python's `pickletools`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.families.family import BadCheckpoint
from common.model_files import shown
from common.tensor_info import MAX_DIMENSIONS

MAX_OPERATIONS = 2**21
"""A file with 50,000 tensors has that many. They take about two seconds."""
MAX_PROTOCOL = 5
STORAGES = {
    "torch.BFloat16Storage": "BF16",
    "torch.BoolStorage": "BOOL",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.ShortStorage": "I16",
}
"""The storages of torch that a file may name, and what safetensors calls their elements."""


@dataclass(frozen=True, slots=True)
class Storage:
    """What a pickle says about a run of elements, which are in an entry of their own."""

    key: str
    dtype: str
    """The name of the elements' type in safetensors."""
    num_items: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a pickle: where its elements are in a storage."""

    storage: Storage
    offset: int
    """Its first element."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """A function or class that a pickle names, and that this machine knows."""

    text: str


def rebuild_tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """Return the tensor of a call to `torch._utils._rebuild_tensor_v2`."""
    match arguments:
        case (Storage() as storage, offset, tuple(shape), tuple(strides), *_) if (
            all(is_count(n) for n in (offset, *shape, *strides))
            and len(shape) == len(strides) <= MAX_DIMENSIONS
        ):
            return StoredTensor(storage, offset, shape, strides)
    raise BadCheckpoint("a tensor in it is malformed")


def rebuild_parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    """Return the tensor of a call to `torch._utils._rebuild_parameter`."""
    match arguments:
        case (StoredTensor() as tensor, *_):
            return tensor
    raise BadCheckpoint("a parameter in it is malformed")


def ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise BadCheckpoint("an OrderedDict in it is malformed")
    return {}


FUNCTIONS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": ordered_dict,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
}
"""What stands here for each function that a file may call."""


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def read_pickle(data: bytes) -> Any:
    """Return what a torch file's pickle describes, with `StoredTensor`s for its tensors.

    Raises
    ------
    BadCheckpoint
        if it names something else than tensors in dictionaries, or is damaged.
    """
    try:
        return Machine(data).run()
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as e:
        raise BadCheckpoint("its pickle is damaged") from e


class Machine:
    """The state while a pickle is read. Time and memory grow with its bytes at most."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        """The heights of the stack at which the groups that are still open begin."""
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = self._take(1)
            if code == b".":
                return self._stack.pop()
            if code not in OPERATIONS:
                raise BadCheckpoint(
                    f"its pickle uses the operation {code!r}, which no tensor needs; it was not "
                    "executed"
                )
            OPERATIONS[code](self)
        raise BadCheckpoint(f"its pickle has more than {MAX_OPERATIONS} operations")

    # What operations are made of

    def _take(self, size: int) -> bytes:
        taken = self._data[self._position : self._position + size]
        if len(taken) != size:
            raise IndexError
        self._position += size
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position)
        if end < 0:
            raise IndexError
        line = self._take(end - self._position).decode()
        self._position += 1
        return line

    def _group(self) -> list[Any]:
        """Take what is on the stack since the last mark."""
        start = self._marks.pop()
        if start > len(self._stack):
            raise IndexError
        group = self._stack[start:]
        del self._stack[start:]
        return group

    # Values

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def number(self, form: str) -> None:
        self.push(self._number(form))

    def text(self, form: str) -> None:
        self.push(self._take(self._number(form)).decode())

    def long(self) -> None:
        self.push(int.from_bytes(self._take(self._number("B")), "little", signed=True))

    def push_tuple(self, size: int) -> None:
        if size > len(self._stack):
            raise IndexError
        items = self._stack[len(self._stack) - size :]
        del self._stack[len(self._stack) - size :]
        self.push(tuple(items))

    def marked_tuple(self) -> None:
        self.push(tuple(self._group()))

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    # Containers

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dictionary on top of the stack."""
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise BadCheckpoint("its pickle is damaged")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple would take time without end.
            if type(key) not in (str, int):
                raise BadCheckpoint("a dictionary in it has keys that are neither text nor numbers")
            target[key] = value

    def set_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self.set_items([key, value])

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise BadCheckpoint("its pickle is damaged")
        target.extend(items)

    def build(self) -> None:
        """Leave out the attributes of a dictionary: torch keeps the versions of modules there."""
        self._stack.pop()
        if type(self._stack[-1]) is not dict:
            raise BadCheckpoint("it sets attributes of an object; nothing was executed")

    # Memory

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    # Names

    def name(self, text: str) -> None:
        if text not in FUNCTIONS and text not in STORAGES:
            raise BadCheckpoint(
                f"it names {shown(text)}, which may not be loaded; nothing was executed. Save it "
                "again with the weights alone: torch.save of a state_dict, or safetensors"
            )
        self.push(Name(text))

    def name_on_stack(self) -> None:
        parts = (self._stack.pop(), self._stack.pop())
        self.name(".".join(str(part) for part in reversed(parts) if type(part) is str))

    def call(self) -> None:
        arguments = self._stack.pop()
        function = self._stack.pop()
        if type(function) is not Name or function.text not in FUNCTIONS:
            raise BadCheckpoint("it calls what is not a function; nothing was executed")
        if type(arguments) is not tuple:
            raise BadCheckpoint("its pickle is damaged")
        self.push(FUNCTIONS[function.text](arguments))

    def storage(self) -> None:
        match self._stack.pop():
            case ("storage", Name(text=text), str(key), str(), num_items) if (
                text in STORAGES and is_count(num_items)
            ):
                self.push(Storage(key, STORAGES[text], num_items))
            case _:
                raise BadCheckpoint("a storage in it is malformed")


Operation = Callable[[Machine], None]
OPERATIONS: dict[bytes, Operation] = {
    b"\x80": lambda m: check_protocol(m._number("B")),
    b"\x95": lambda m: m._number("Q"),  # the length of a frame, which says nothing more
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.number("i"),
    b"K": lambda m: m.number("B"),
    b"M": lambda m: m.number("H"),
    b"\x8a": Machine.long,
    b"G": lambda m: m.push(struct.unpack(">d", m._take(8))[0]),
    b"X": lambda m: m.text("I"),
    b"\x8c": lambda m: m.text("B"),
    b"(": Machine.mark,
    b")": lambda m: m.push_tuple(0),
    b"\x85": lambda m: m.push_tuple(1),
    b"\x86": lambda m: m.push_tuple(2),
    b"\x87": lambda m: m.push_tuple(3),
    b"t": Machine.marked_tuple,
    b"}": lambda m: m.push({}),
    b"s": Machine.set_item,
    b"u": lambda m: m.set_items(m._group()),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.append([m._stack.pop()]),
    b"e": lambda m: m.append(m._group()),
    b"b": Machine.build,
    b"q": lambda m: m.remember(m._number("B")),
    b"r": lambda m: m.remember(m._number("I")),
    b"\x94": lambda m: m.remember(len(m._memo)),
    b"h": lambda m: m.recall(m._number("B")),
    b"j": lambda m: m.recall(m._number("I")),
    b"c": lambda m: m.name(f"{m._line()}.{m._line()}"),
    b"\x93": Machine.name_on_stack,
    b"R": Machine.call,
    b"Q": Machine.storage,
}


def check_protocol(protocol: int) -> None:
    if protocol > MAX_PROTOCOL:
        raise BadCheckpoint(f"its pickle has protocol {protocol}, which is newer than supported")
