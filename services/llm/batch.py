"""What a forward pass gets to know of a step: one object, made from the step plan."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from services.llm.attention import StepAttention
from services.llm.step_plan import StepPlan

ROWS = "rows of adapter "
SAMPLED_ROWS = f"sampled {ROWS}"


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Which rows of a batch an adapter changes."""

    adapter: int
    rows: Tensor
    """int64 [n], in rising order."""
    sampled_rows: Tensor
    """int64: indices into the batch's `sampled_rows`, in rising order."""


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of several sequences, on the model's device."""

    positions: Tensor
    """int64 [num_components, T]."""
    sampled_rows: Tensor
    """int64 [S]: the rows whose logits are wanted."""
    item_rows: Tensor | None
    """int64 [I]: the rows that hold an item's embedding; None if there are none."""
    sampled_item_rows: Tensor | None
    """int64: indices into `sampled_rows` of the rows that hold an item's embedding; None if there
    are none."""
    rope_parameters: Tensor
    """int64 [T]: the rope parameter of each token's sequence."""
    attention: StepAttention | None
    """None if one kernel computes the whole step."""
    adapters: tuple[AdapterRows, ...] = ()
    """The rows of each adapter that the step uses."""


def arrays_of(plan: StepPlan) -> dict[str, np.ndarray]:
    """Return the arrays that a device needs to make a Batch, int64 each."""
    is_item = np.isin(plan.sampled_rows, plan.item_rows)
    return {
        "token_ids": plan.token_ids,
        "positions": plan.positions,
        "sampled_rows": plan.sampled_rows,
        "item_rows": plan.item_rows,
        "sampled_item_rows": np.flatnonzero(is_item),
        "rope_parameters": np.repeat(plan.rope_parameters, plan.query_lens),
        **arrays_of_adapters(plan),
    }


def arrays_of_adapters(plan: StepPlan) -> dict[str, np.ndarray]:
    """Return the two arrays of each AdapterRows of a step."""
    if not plan.adapters.any():
        return {}
    adapters = np.repeat(plan.adapters, plan.query_lens)
    sampled = adapters[plan.sampled_rows]
    arrays = {}
    for adapter in np.unique(adapters[adapters > 0]):
        arrays[f"{ROWS}{adapter}"] = np.flatnonzero(adapters == adapter)
        arrays[f"{SAMPLED_ROWS}{adapter}"] = np.flatnonzero(sampled == adapter)
    return arrays


def batch_of(tensors: dict[str, Tensor], attention: StepAttention | None) -> Batch:
    """Return the batch of the tensors that `arrays_of` names."""
    return Batch(
        positions=tensors["positions"],
        sampled_rows=tensors["sampled_rows"],
        item_rows=none_if_empty(tensors["item_rows"]),
        sampled_item_rows=none_if_empty(tensors["sampled_item_rows"]),
        rope_parameters=tensors["rope_parameters"],
        attention=attention,
        adapters=tuple(
            AdapterRows(int(name.removeprefix(ROWS)), rows, tensors[f"sampled {name}"])
            for name, rows in tensors.items()
            if name.startswith(ROWS)
        ),
    )


def none_if_empty(rows: Tensor) -> Tensor | None:
    return rows if len(rows) else None
