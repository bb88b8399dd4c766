"""Checkpoints in whose files all layers share the bytes of one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.families import RECIPES
from benchmarks.families.qwen2_5_vl import SHAPES, recipe
from benchmarks.gpu import made
from benchmarks.quantized import FORMATS
from common.checkpoint import open_checkpoint
from compute.weights import Weights
from services.llm import families

CPU = torch.device("cpu")
SMALL = replace(SHAPES["plumbing"], num_layers=2, vision_depth=2)


def test_layers_share_bytes_and_have_the_values_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = recipe(SMALL)
    monkeypatch.setitem(RECIPES, "small", small)
    path = made.make("small", tmp_path, CPU)
    checkpoint = open_checkpoint(path)
    shapes = dict(small.tensors())
    assert checkpoint.tensors.keys() == shapes.keys()
    weights = Weights(checkpoint)
    for name, shape in shapes.items():
        first = name.replace(".1.", ".0.")
        assert checkpoint.tensors[name].offset == checkpoint.tensors[first].offset
        stored = weights.tensor(checkpoint.family.canonical_name(name), shape, torch.bfloat16, CPU)
        assert stored.equal(small.values(first, shape)), name
    offsets = {info.offset for info in checkpoint.tensors.values()}
    assert len(offsets) == len({name.replace(".1.", ".0.") for name in shapes})
    assert made.make("small", tmp_path, CPU) == path


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_are_shared_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "small", recipe(SMALL, FORMATS[name]))
    checkpoint = open_checkpoint(made.make("small", tmp_path, CPU))
    model = families.load(checkpoint, torch.float32, CPU)
    value = RECIPES["small"].values("model.layers.0.mlp.down_proj.weight", (128, 128))
    _, meant = FORMATS[name].store(value)
    for layer in model.layers:
        torch.testing.assert_close(layer.down.product(torch.eye(128)).T, meant)
