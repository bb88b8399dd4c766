"""A program of torch operations as data: written as JSON, checked when it is read, then run.

torch.export's own file format may name any function of torch, and parts of it are pickled: who
loads such a file runs its code. A graph in this form can only call the operations in the table, on
its inputs and weights.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from common.vision_artefact import ProgramInput
from compute.torch_tensors import DTYPES

GETITEM = "getitem"
# The assertions repeat what is static anyway.
LEFT_OUT = frozenset({"aten._assert_tensor_metadata.default"})
# How the result of an attention lies in memory depends on the device, and a view may need a copy.
RENAMED = {"aten.view.default": "aten.reshape.default"}
DEFAULTS = """
    _softmax _to_copy _unsafe_view abs addcmul addmm alias arange baddbmm bitwise_not bmm cat
    chunk clamp clone conv2d copy cos cumsum detach embedding exp expand floor_divide full
    full_like gather gelu hardtanh index_select layer_norm lift_fresh_copy linear log log1p
    logical_and logical_not logical_or matmul maximum mean minimum mm native_layer_norm neg ones
    ones_like pad permute reciprocal relu repeat reshape rms_norm round rsqrt
    scaled_dot_product_attention select_scatter sigmoid silu sin slice_scatter split_with_sizes
    sqrt stack t tanh unfold unsqueeze zeros zeros_like
"""
OVERLOADS = """
    __and__.Tensor __or__.Tensor __xor__.Tensor add.Scalar add.Tensor any.dim arange.start
    arange.start_step bitwise_or.Tensor bitwise_xor.Tensor div.Scalar div.Tensor div.Tensor_mode
    eq.Scalar eq.Tensor ge.Scalar ge.Tensor gt.Scalar gt.Tensor index.Tensor le.Scalar le.Tensor
    lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor mean.dim mul.Scalar mul.Tensor
    ne.Scalar ne.Tensor pow.Tensor_Scalar pow.Tensor_Tensor repeat_interleave.self_int rsub.Scalar
    select.int slice.Tensor softmax.int split.Tensor squeeze.dim squeeze.dims sub.Scalar
    sub.Tensor sum.dim_IntList transpose.int unbind.int upsample_bicubic2d.vec
    upsample_bilinear2d.vec var.correction where.ScalarOther where.ScalarSelf where.self
"""


OPERATIONS = frozenset(
    f"aten.{name}"
    for name in (*(f"{name}.default" for name in DEFAULTS.split()), *OVERLOADS.split())
)
"""What a graph may call. All are pure: they read and write nothing but tensors."""


class BadGraph(ValueError):
    """A graph cannot be written in this form, or a file does not hold a graph."""


class Step(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One call. An argument is a plain value, a list, or an object with one key: see `encoded`."""

    operation: str
    arguments: list[Any]
    keywords: dict[str, Any]


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values are numbered: first the inputs, then the weights, then the result of each step."""

    num_inputs: int
    weights: tuple[str, ...]
    """The names of the weights in their file."""
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    """The numbers of the values that are its results."""


@dataclass(frozen=True, slots=True)
class Value:
    """An argument that is the value of this number."""

    number: int


# Writing


def graph_of(exported: ExportedProgram, weight_names: Mapping[int, str]) -> Graph:
    """Return an exported program as a graph.

    `weight_names` are the names of its constants, by `id`.

    Raises
    ------
    BadGraph
        if it uses an operation that is not in the table, or is not static.
    """
    signature = exported.graph_signature
    constants = signature.inputs_to_lifted_tensor_constants
    nodes = {node.name: node for node in exported.graph.nodes}
    inputs = [nodes[name] for name in signature.user_inputs if isinstance(name, str)]
    weights = {nodes[name]: exported.constants[key] for name, key in constants.items()}
    calls = [
        node
        for node in exported.graph.nodes
        if node.op == "call_function" and str(node.target) not in LEFT_OUT
    ]
    numbers = {node: number for number, node in enumerate((*inputs, *weights, *calls))}
    [output] = (node for node in exported.graph.nodes if node.op == "output")
    return Graph(
        num_inputs=len(inputs),
        weights=tuple(weight_names[id(tensor)] for tensor in weights.values()),
        steps=tuple(step_of(node, numbers) for node in calls),
        outputs=tuple(numbers[node] for node in output.args[0]),
    )


def step_of(node: Node, numbers: Mapping[Node, int]) -> Step:
    name = GETITEM if node.target is operator.getitem else str(node.target)
    name = RENAMED.get(name, name)
    if name != GETITEM and name not in OPERATIONS:
        raise BadGraph(f"the tower uses {name}, which the format of graphs does not know")
    arguments = [encoded(argument, numbers) for argument in node.args]
    keywords = {key: encoded(argument, numbers) for key, argument in node.kwargs.items()}
    return Step(name, arguments, keywords)


def encoded(argument: Any, numbers: Mapping[Node, int]) -> Any:
    """Return an argument as JSON has it. It names no device: a graph runs on any."""
    match argument:
        case Node():
            return {"value": numbers[argument]}
        case torch.dtype():
            return {"dtype": str(argument).removeprefix("torch.")}
        case torch.device():
            return {"device": "any"}
        case torch.memory_format() | torch.layout():
            return {"layout": str(argument).removeprefix("torch.")}
        case float() if not math.isfinite(argument):
            return {"float": repr(argument)}
        case None | bool() | int() | float() | str():
            return argument
        case list() | tuple():
            return [encoded(item, numbers) for item in argument]
    raise BadGraph(f"the tower is not static: it computes {argument} from an item's shape")


# Reading

LAYOUTS = {
    name: getattr(torch, name)
    for name in ("strided", "contiguous_format", "preserve_format", "channels_last")
}
FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
ALL_DTYPES = DTYPES | {"bool": torch.bool, "int32": torch.int32}


def read_graph(data: bytes) -> Graph:
    """Read a graph. Raises BadGraph if it is malformed."""
    try:
        return msgspec.json.decode(data, type=Graph)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BadGraph(str(e)) from e


def decoded(argument: Any, device: torch.device) -> Any:
    """Return an argument as a call needs it, except that values are a `Value`."""
    match argument:
        case {"value": int(number), **rest} if not rest:
            return Value(number)
        case {"dtype": str(name), **rest} if not rest and name in ALL_DTYPES:
            return ALL_DTYPES[name]
        case {"device": "any", **rest} if not rest:
            return device
        case {"layout": str(name), **rest} if not rest and name in LAYOUTS:
            return LAYOUTS[name]
        case {"float": str(name), **rest} if not rest and name in FLOATS:
            return FLOATS[name]
        case None | bool() | int() | float() | str():
            return argument
        case list():
            return [decoded(item, device) for item in argument]
    raise BadGraph("an argument is malformed")


def function_of(name: str) -> Any:
    if name == GETITEM:
        return operator.getitem
    if name not in OPERATIONS:
        raise BadGraph(f"it calls {name[:80]}, which is not an operation of a tower")
    _, operation, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, operation), overload)


def numbers_in(argument: Any) -> set[int]:
    """Return the numbers of the values that an argument refers to."""
    match argument:
        case Value(number):
            return {number}
        case list() | tuple():
            return set().union(*map(numbers_in, argument))
        case dict():
            return set().union(*map(numbers_in, argument.values()))
    return set()


def filled_in(argument: Any, values: Sequence[Any]) -> Any:
    match argument:
        case Value(number):
            return values[number]
        case list():
            return [filled_in(item, values) for item in argument]
    return argument


class Program:
    """A graph that can be run with its weights, which are all on one device."""

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """Raises BadGraph if the graph is not sound, or does not fit the weights."""
        if missing := [name for name in graph.weights if name not in weights]:
            raise BadGraph(f"it needs the weight {missing[0][:80]}, which is missing")
        self.device = device
        self._outputs = graph.outputs
        self._weights = [weights[name] for name in graph.weights]
        num_given = graph.num_inputs + len(graph.weights)
        self._calls = [
            (
                function_of(step.operation),
                decoded(step.arguments, device),
                keywords_of(step, device),
            )
            for step in graph.steps
        ]
        last_uses: dict[int, int] = {}
        for index, (_, arguments, keywords) in enumerate(self._calls):
            used = numbers_in(arguments) | numbers_in(keywords)
            if any(not 0 <= number < num_given + index for number in used):
                raise BadGraph(f"step {index} needs a value that does not exist before it")
            last_uses |= dict.fromkeys(used, index)
        num_values = num_given + len(self._calls)
        if any(not 0 <= number < num_values for number in graph.outputs):
            raise BadGraph("one of its results does not exist")
        kept = set(graph.outputs)
        self._freed: list[list[int]] = [[] for _ in self._calls]
        for number, index in last_uses.items():
            if number not in kept:
                self._freed[index].append(number)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the results for inputs as the graph declares them, on the program's device."""
        values: list[Any] = [*inputs, *self._weights]
        for (function, arguments, keywords), freed in zip(self._calls, self._freed, strict=True):
            given = {key: filled_in(argument, values) for key, argument in keywords.items()}
            values.append(function(*filled_in(arguments, values), **given))
            for number in freed:
                values[number] = None
        return [values[number] for number in self._outputs]


def keywords_of(step: Step, device: torch.device) -> dict[str, Any]:
    return {key: decoded(argument, device) for key, argument in step.keywords.items()}


def check_results(
    graph: Graph,
    inputs: Sequence[ProgramInput],
    weights: Mapping[str, Tensor],
    widths: Sequence[int],
) -> None:
    """Run the graph without values: from these inputs it must return columns of these widths.

    Raises
    ------
    BadGraph
        if it cannot be run, or returns something else.
    """
    if graph.num_inputs != len(inputs):
        raise BadGraph(f"it has {graph.num_inputs} inputs, and its manifest says {len(inputs)}")
    meta = torch.device("meta")
    shapes = {name: torch.empty_like(weight, device=meta) for name, weight in weights.items()}
    program = Program(graph, shapes, meta)
    try:
        results = program.run(
            [torch.empty(x.shape, dtype=ALL_DTYPES[x.dtype], device=meta) for x in inputs]
        )
    except (RuntimeError, TypeError, IndexError, KeyError, NotImplementedError) as e:
        raise BadGraph(f"it cannot be run: {e}") from e
    if any(not isinstance(x, Tensor) or x.dim() != 2 for x in results) or [
        x.shape[1] for x in results
    ] != list(widths):
        raise BadGraph(f"it does not return columns of the widths {list(widths)}")
