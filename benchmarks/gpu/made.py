"""Checkpoints with random weights that take little time and disk.

All layers of a model share the bytes of one in the file. In memory each has its own copy, so that
a step reads as much as with different weights.
"""

import json
import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import RECIPES
from benchmarks.recipe import Recipe

NUMBER = re.compile(r"\.\d+\.")
ALIGNMENT = 64


def make(name: str, folder: Path, device: torch.device) -> Path:
    """Return the checkpoint of that name in the folder; if it is missing, make it on the device."""
    path = folder / f"{name}-shared"
    if path.exists():
        return path
    unfinished = folder / f"{path.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    RECIPES[name].write_files(unfinished)
    write(unfinished / "model.safetensors", RECIPES[name], device)
    return unfinished.rename(path)


def write(file: Path, recipe: Recipe, device: torch.device) -> None:
    """Write a safetensors file in which tensors of the same place in their layers overlap."""
    table: dict[str, Any] = {}
    drawn: dict[tuple[str, tuple[int, ...]], str] = {}
    end = 0
    for name, shape in recipe.tensors():
        first = drawn.setdefault((NUMBER.sub(".N.", name), shape), name)
        if first == name:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + 2 * prod(shape)
            table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
        else:
            table[name] = table[first]
    header = json.dumps(table).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with file.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for name in drawn.values():
            f.seek(8 + len(header) + table[name]["data_offsets"][0])
            values = recipe.values(name, table[name]["shape"], device).cpu()
            f.write(values.flatten().view(torch.int16).numpy())
