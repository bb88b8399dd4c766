"""What is read of a Pooled, checked where it enters the gateway."""

from typing import NamedTuple

import msgspec
import numpy as np

from common.messages import Pooled, Task
from common.timings import Timings, read_timings

labels_decoder = msgspec.json.Decoder(list[str])


class Pool(NamedTuple):
    """The result of a request that generates no text."""

    values: np.ndarray
    """float32 [n]: the probability of each label, or an embedding."""
    labels: list[str]
    """The n labels; empty for an embedding."""

    @property
    def best_label(self) -> str:
        return self.labels[best_classes(self.values, 1)[0]]


def read_pooled(pooled: Pooled, task: Task) -> tuple[Pool, Timings]:
    """Return the result that a message carries, and the stage timings.

    Raises
    ------
    ValueError
        if the message is malformed, or is not a result of this task.
    """
    tensor = pooled.values
    if tensor.dtype != "float32" or len(tensor.shape) != 1 or tensor.shape == (0,):
        raise ValueError(f"the values are {tensor}, float32 [n] is wanted")
    values = tensor.numpy()
    if not np.isfinite(values).all():
        raise ValueError("a value is not a finite number")
    if task == "generate" or (task == "classify") != (pooled.labels is not None):
        raise ValueError(f"this is not a result of the task {task}")
    try:
        labels = labels_decoder.decode(pooled.labels.data) if pooled.labels else []
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as e:
        raise ValueError("the labels are not a JSON list of texts") from e
    if task == "classify" and len(labels) != len(values):
        raise ValueError(f"{len(labels)} labels came for {len(values)} probabilities")
    return Pool(values, labels), read_timings(pooled.timings) if pooled.timings else {}


def best_classes(probabilities: np.ndarray, count: int) -> list[int]:
    """Return the indices of the `count` largest probabilities, the largest first."""
    return np.argsort(-probabilities, kind="stable")[:count].tolist()
