"""Parts of quantized weights are read from any place, padded and stacked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.quantized import Format, fp8, gptq, w4a16
from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from compute.quantized_weights import (
    Fp8Weight,
    Int4Weight,
    QuantizedTensor,
    can_stack,
    stacked,
    with_zeros,
)
from compute.weights import Weights
from tests.quantized import FORMATS

CPU = torch.device("cpu")
SHAPE = (72, 128)
WHOLE = slice(None)
CUTS = [(0, 8), (3, 5), (7, 41), (13, 72), (31, 33), (0, 72), (64, 72)]


def random_weight(shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def checkpoint_of(path: Path, format: Format, tensors: dict[str, Tensor]) -> Checkpoint:
    for name, content in {
        "config.json": {"model_type": "qwen2_5_vl", "quantization_config": format.config},
        "tokenizer.json": {},
        "preprocessor_config.json": {},
    }.items():
        (path / name).write_text(json.dumps(content))
    stored = {f"m.{last}": tensor for last, tensor in tensors.items()}
    save_file(stored | {"other": torch.ones(1)}, path / "model.safetensors")
    return open_checkpoint(path)


def part_of(weights: Weights, *index: slice, shape: tuple[int, int] = SHAPE) -> QuantizedTensor:
    part = weights.quantized("m.weight", shape, index, CPU)
    assert part is not None
    return part


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_is_that_part_of_the_whole(name: str, tmp_path: Path) -> None:
    tensors, meant = FORMATS[name].store(random_weight())
    weights = Weights(checkpoint_of(tmp_path, FORMATS[name], tensors))
    assert part_of(weights).dequantized().equal(meant)
    for first, last in CUTS:
        cut = slice(first, last)
        rows = part_of(weights, cut)
        columns = part_of(weights, WHOLE, cut)
        assert rows.shape == (last - first, SHAPE[1])
        assert rows.dequantized().equal(meant[cut])
        assert columns.dequantized().equal(meant[:, cut])
        assert columns.groups.max() + 1 == columns.scales.shape[1], "only the groups in use"
        found = weights.slice("m.weight", SHAPE, 1, first, last, torch.float32, CPU)
        assert found.equal(meant[:, cut])
    assert weights.tensor("m.weight", SHAPE, torch.bfloat16, CPU).equal(meant.bfloat16())


def test_no_more_is_read_than_a_part_needs(tmp_path: Path) -> None:
    tensors, _ = FORMATS["awq"].store(random_weight((256, 512)))
    weights = Weights(checkpoint_of(tmp_path, FORMATS["awq"], tensors))
    part_of(weights, slice(8, 16), shape=(256, 512))
    assert weights.num_bytes_read == 512 * 4 + 16 * 8 * 2 + 16 * 4


def test_packed_weights_need_not_fill_their_integers(tmp_path: Path) -> None:
    shape = (20, 44)
    tensors, meant = w4a16(-1, symmetric=False).store(random_weight(shape))
    assert tensors["weight_packed"].shape == (20, 6)
    checkpoint = checkpoint_of(tmp_path, w4a16(-1, symmetric=False), tensors)
    assert part_of(Weights(checkpoint), shape=shape).dequantized().equal(meant)


@pytest.mark.parametrize("shape", [(72, 136), (80, 128), (72,), (72, 120)])
def test_another_shape_than_that_of_config_json_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors, _ = w4a16(32).store(random_weight())
    weights = Weights(checkpoint_of(tmp_path, w4a16(32), tensors))
    with pytest.raises(BadCheckpoint, match=r"m.weight_packed holds weights of shape \(72, 128\)"):
        weights.tensor("m.weight", shape, torch.float32, CPU)


@pytest.mark.parametrize("group", [-1, 4, 2**31 - 1])
def test_a_group_that_does_not_exist_is_refused(group: int, tmp_path: Path) -> None:
    tensors, _ = FORMATS["gptq ordered"].store(random_weight())
    tensors["g_idx"][77] = group
    weights = Weights(checkpoint_of(tmp_path, FORMATS["gptq ordered"], tensors))
    assert part_of(weights, WHOLE, slice(0, 77)).shape == (72, 77)
    with pytest.raises(BadCheckpoint, match=r"group of an input of m.qweight is not one of its 4"):
        part_of(weights)


def test_zero_points_of_zero_are_read_from_the_first_version(tmp_path: Path) -> None:
    """They borrowed from the next one when one was subtracted."""
    format = gptq(32, symmetric=False)
    weight = random_weight()
    weight[::3] = weight[::3].abs()
    tensors, meant = format.store(weight)
    part = part_of(Weights(checkpoint_of(tmp_path, format, tensors)))
    assert isinstance(part, Int4Weight)
    assert part.zeros[::3].eq(0).all() and part.zeros[1::3].ne(0).any()
    assert part.dequantized().equal(meant)


@pytest.mark.parametrize("name", ["fp8 block", "fp8 tensor", "awq", "gptq ordered"])
@pytest.mark.parametrize("dim", [0, 1])
def test_zeros_follow_a_part(name: str, dim: int, tmp_path: Path) -> None:
    tensors, meant = FORMATS[name].store(random_weight())
    part = part_of(Weights(checkpoint_of(tmp_path, FORMATS[name], tensors)), slice(0, 70))
    padded = with_zeros(part, dim, 5)
    assert isinstance(padded, type(part))
    zeros = meant.new_zeros((5, 128) if dim == 0 else (70, 5))
    assert padded.dequantized().equal(torch.cat((meant[:70], zeros), dim))
    assert with_zeros(part, dim, 0) is part


def test_weights_of_one_kind_are_stacked(tmp_path: Path) -> None:
    for format in (gptq(32), fp8("block", (8, 16))):
        tensors, meant = format.store(random_weight())
        weights = Weights(checkpoint_of(tmp_path, format, tensors))
        parts = [part_of(weights, slice(*cut)) for cut in CUTS]
        assert can_stack(parts)
        joined = stacked(parts)
        assert isinstance(joined, Int4Weight | Fp8Weight)
        assert joined.dequantized().equal(torch.cat([meant[slice(*cut)] for cut in CUTS]))
        assert not can_stack([parts[0], meant])
        assert not can_stack([meant, parts[0]])
        assert not can_stack([parts[0], part_of(weights, WHOLE, slice(0, 64))])
