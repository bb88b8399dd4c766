"""Quantized checkpoints made of golden ones, each with a copy that has the dequantized weights."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quantized import Format, Stored, awq, fp8, gptq, w4a16
from tests.fine_tunes import FineTune
from tests.golden import GoldenCase


def disordered(weight: Tensor) -> Stored:
    """Quantize by GPTQ with another order of the inputs for each module."""
    seed = int(weight.float().abs().sum() * 1000)
    return gptq(32, act_order=seed).store(weight)


FORMATS = {
    "fp8 tensor": fp8("tensor", has_static_inputs=True),
    "fp8 channel": fp8("channel"),
    "fp8 block": fp8("block", (48, 40)),
    "awq": awq(32),
    "awq one group": awq(-1),
    "gptq": gptq(32),
    "gptq asymmetric": gptq(64, symmetric=False),
    "gptq v2": gptq(32, symmetric=False, version=2),
    "gptq ordered": gptq(32, act_order=7),
    "gptq disordered": Format(gptq(32, act_order=7).config, disordered),
    "gptq one group": gptq(-1),
    "w4a16": w4a16(64),
    "w4a16 asymmetric": w4a16(32, symmetric=False),
    "w4a16 one group": w4a16(-1),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A quantized checkpoint, and one with the weights that it means."""

    quantized: FineTune
    meant: FineTune


def in_layers(name: str) -> bool:
    """Whether a tensor is the weight of a product in a layer of the language model."""
    return "layers." in name and name.endswith("proj.weight")


def quantize(
    case: GoldenCase,
    format: Format,
    folder: Path,
    chosen: Callable[[str], bool] = in_layers,
    stores: Callable[[str], Callable[[Tensor], Stored]] | None = None,
) -> Pair:
    """Write both checkpoints to new folders in `folder`.

    The tensors whose names in the files are `chosen` are quantized, each as `stores` says.
    """
    given: dict[str, Tensor] = {}
    for file in sorted(case.checkpoint.glob("*.safetensors")):
        given |= load_file(file)
    quantized: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if not chosen(name):
            quantized[name] = meant[name] = tensor
            continue
        store = format.store if stores is None else stores(name)
        parts, meant[name] = store(tensor)
        module = name.removesuffix(".weight")
        quantized |= {f"{module}.{last}": part for last, part in parts.items()}
    config = json.loads((case.checkpoint / "config.json").read_text())
    said = config | {"quantization_config": format.config}
    return Pair(
        write(case, folder / "quantized", quantized, said),
        write(case, folder / "meant", meant, config),
    )


def write(
    case: GoldenCase, folder: Path, tensors: dict[str, Tensor], config: dict[str, object]
) -> FineTune:
    shutil.copytree(case.checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    return FineTune(case.name, folder=folder)


def cosine(found: Tensor, expected: Tensor) -> float:
    """Return the cosine between all logits and those that they should be."""
    return float(torch.cosine_similarity(found.flatten().double(), expected.flatten().double(), 0))
