"""Which matrix products and attention calls a pass makes: they are counted while it runs.

Nothing is computed meanwhile. Each call that counts returns zeros, so recording takes little time
even where a pass takes minutes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor

from compute.int4_linear import Int4Linear
from compute.kernels import operations
from compute.linear import Linear
from compute.quantization import Int8Linear

AnyLinear: TypeAlias = Linear | Int8Linear | Int4Linear
WeightKind: TypeAlias = Literal["plain", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Product:
    """A product [num_rows, num_inputs] -> [num_rows, num_outputs]."""

    label: str
    num_rows: int
    num_outputs: int
    num_inputs: int
    kind: WeightKind


@dataclass(frozen=True, slots=True)
class Attention:
    """A call of `operations.attention` for sequences of equal lengths."""

    num_seqs: int
    query_len: int
    context_len: int
    num_heads: int
    num_kv_heads: int
    dim: int
    causal: bool
    has_bias: bool
    has_mask: bool


@dataclass(slots=True)
class Calls:
    """How often a pass makes each call."""

    products: Counter[Product] = field(default_factory=Counter)
    attentions: Counter[Attention] = field(default_factory=Counter)


@contextmanager
def recording(model: object) -> Iterator[Calls]:
    """Count the calls that are made meanwhile. `model` holds the products, which names them."""
    calls = Calls()
    labels = {id(product): label for label, product in products_in(model)}

    def multiply(product: AnyLinear, x: Tensor, residual: Tensor | None = None) -> Tensor:
        num_outputs, num_inputs = shape_of(product)
        label = labels.get(id(product), "product")
        kind = kind_of(product)
        calls.products[Product(label, len(x), num_outputs, num_inputs, kind)] += 1
        return x.new_zeros(len(x), num_outputs)

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num_seqs: int,
        causal: bool,
        bias: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        calls.attentions[
            Attention(
                num_seqs,
                len(q) // num_seqs,
                len(k) // num_seqs,
                q.shape[1],
                k.shape[1],
                q.shape[2],
                causal,
                bias is not None,
                visible is not None,
            )
        ] += 1
        return q.new_zeros(len(q), q.shape[1] * q.shape[2])

    def by_torch(x: Tensor) -> None:
        """No operation finds a kernel, so attention calls `attend` instead."""

    with (
        patch.object(operations, "kernels_for", by_torch),
        patch.object(operations, "attention_by_torch", attend),
        patch.object(Linear, "__call__", multiply),
        patch.object(Int8Linear, "__call__", multiply),
        patch.object(Int4Linear, "__call__", multiply),
    ):
        yield calls


def recorded(model: object, run: Callable[[], object]) -> Calls:
    """Return the calls that a pass makes."""
    with recording(model) as calls:
        run()
    return calls


def shape_of(product: AnyLinear) -> tuple[int, int]:
    """Return the outputs and the inputs of a product."""
    if isinstance(product, Linear):
        return product.shape
    assert product.packed is not None
    return product.packed.structure.num_outputs, product.packed.structure.num_inputs


def kind_of(product: AnyLinear) -> WeightKind:
    if isinstance(product, Linear):
        return "plain"
    return "int8" if isinstance(product, Int8Linear) else "int4"


def products_in(model: object, label: str = "") -> Iterator[tuple[str, AnyLinear]]:
    """Yield the products that an object holds, with the names of the attributes that lead to them.

    Attributes that hold lists of other objects, such as layers, do not count.
    """
    if isinstance(model, AnyLinear):
        yield label or "product", model
    elif isinstance(model, list | tuple):
        for each in model:
            yield from products_in(each, label)
    elif isinstance(model, dict):
        for each in model.values():
            yield from products_in(each, label)
    else:
        for name, value in attributes_of(model).items():
            is_list = isinstance(value, list) and not isinstance(next(iter(value), None), AnyLinear)
            is_counted = not is_list and name != "product"
            own = name.strip("_").replace("_", " ") if is_counted else ""
            yield from products_in(value, " ".join(filter(None, (label, own))))


def attributes_of(model: object) -> dict[str, Any]:
    """Return the attributes of an object of ours that may hold products; nothing for others."""
    if isinstance(model, Tensor | torch.dtype | torch.device | type):
        return {}
    if not type(model).__module__.startswith(("services.", "compute.", "tests.")):
        return {}
    if is_dataclass(model):
        return {each.name: getattr(model, each.name) for each in fields(model)}
    return getattr(model, "__dict__", {})
