"""Checkpoints in whose files all layers share the bytes of one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.families import RECIPES
from benchmarks.families.qwen2_5_vl import SHAPES, recipe
from benchmarks.gpu import made
from common.checkpoint import open_checkpoint
from compute.weights import Weights

CPU = torch.device("cpu")


def test_layers_share_bytes_and_have_the_values_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = recipe(replace(SHAPES["plumbing"], num_layers=2, vision_depth=2))
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
