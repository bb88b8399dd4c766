"""Checkpoints with random weights that take little time and disk.

All layers of a model share the bytes of one in the file. In memory each has its own copy, so that
a step reads as much as with different weights.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import RECIPES
from benchmarks.recipe import Recipe, Shape

NUMBER = re.compile(r"\.\d+\.")
ALIGNMENT = 64
HEADER_BYTES = 2**20
"""Room for the table of contents, which is written last."""
TYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.int64: "I64",
}


def make(name: str, folder: Path, device: torch.device) -> Path:
    """Return the checkpoint of that name in the folder; if it is missing, make it on the device."""
    path = folder / f"{name}-shared"
    if path.exists():
        return path
    unfinished = folder / f"{path.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    RECIPES[name].write_files(unfinished)
    # Whatever a format of quantized weights computes, it computes there.
    with device:
        write(unfinished / "model.safetensors", RECIPES[name], device)
    return unfinished.rename(path)


def write(file: Path, recipe: Recipe, device: torch.device) -> None:
    """Write a safetensors file in which tensors of the same place in their layers overlap."""
    table: dict[str, Any] = {}
    drawn: dict[tuple[str, Shape], dict[str, Any]] = {}
    with file.open("wb") as f:
        f.seek(HEADER_BYTES)
        for name, shape in recipe.tensors():
            module = name.rpartition(".")[0]
            place = NUMBER.sub(".N.", name), shape
            if place not in drawn:
                value = recipe.values(name, shape, device)
                stored = {name: value} if recipe.store is None else recipe.store(name, value)
                drawn[place] = {
                    key.removeprefix(module): append(f, tensor) for key, tensor in stored.items()
                }
            table |= {module + ending: entry for ending, entry in drawn[place].items()}
        header = json.dumps(table).encode().ljust(HEADER_BYTES - 8)
        assert len(header) == HEADER_BYTES - 8, "the table of contents is too long"
        f.seek(0)
        f.write(len(header).to_bytes(8, "little") + header)


def append(f: Any, tensor: Tensor) -> dict[str, Any]:
    """Write a tensor at the end of the file, and return its entry in the table of contents."""
    f.seek(-f.tell() % ALIGNMENT, 1)
    begin = f.tell() - HEADER_BYTES
    f.write(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
    end = f.tell() - HEADER_BYTES
    return {"dtype": TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
