"""How a checkpoint with random weights is made, whatever its family."""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

MAX_FILE_BYTES = 2**30
CPU = torch.device("cpu")
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One size of one family."""

    write_files: Callable[[Path], None]
    """Writes everything but the weights to a folder."""
    tensors: Callable[[], Iterator[tuple[str, Shape]]]
    """The names of the tensors in the files, and their shapes."""
    write_weights: Callable[[Path, "Recipe"], None]
    head: str
    """The name of the tensor that makes logits."""
    silent: tuple[slice, ...] = ()
    """The rows of the head that are zero: tokens that no greedy answer holds."""
    store: Callable[[str, Tensor], dict[str, Tensor]] | None = None
    """Returns the tensors that a file holds instead of a tensor, by their names."""

    def values(self, name: str, shape: Shape, device: torch.device = CPU) -> Tensor:
        """Return random bfloat16 values that keep activations near one, drawn on the device."""
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        random = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        scale = 0.02 if len(shape) == 1 else prod(shape[1:]) ** -0.5
        drawn = torch.randn(shape, generator=random, device=device)
        tensor = drawn.mul_(scale).bfloat16()
        for rows in self.silent if name == self.head else ():
            tensor[rows] = 0
        return tensor


def write_safetensors(folder: Path, recipe: Recipe) -> None:
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(files_of(recipe)):
        file = f"model-{number:05}.safetensors"
        values: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            value = recipe.values(name, shape)
            values |= {name: value} if recipe.store is None else recipe.store(name, value)
        save_file(values, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def files_of(recipe: Recipe) -> Iterator[dict[str, Shape]]:
    """Yield the tensors of each file; those written at once must fit into memory."""
    shapes: dict[str, Shape] = {}
    for name, shape in recipe.tensors():
        if shapes and 2 * sum(map(prod, (*shapes.values(), shape))) > MAX_FILE_BYTES:
            yield shapes
            shapes = {}
        shapes[name] = shape
    yield shapes


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def layer_norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def linear(name: str, num_outputs: int, num_inputs: int) -> Iterator[tuple[str, Shape]]:
    """A product with a bias."""
    yield f"{name}.weight", (num_outputs, num_inputs)
    yield f"{name}.bias", (num_outputs,)
