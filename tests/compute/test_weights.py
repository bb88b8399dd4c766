"""Weights are found under one name in both layouts, read no further than asked, and refused where
they do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from common.families import FAMILIES
from compute.weights import Weights

CPU = torch.device("cpu")
NORM = "model.language_model.norm.weight"


FORMATS = {"model.safetensors": save_file, "pytorch_model.bin": torch.save}


def checkpoint_of(
    path: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors"
) -> Checkpoint:
    for name, content in {
        "config.json": {"model_type": "qwen2_5_vl"},
        "tokenizer.json": {},
        "preprocessor_config.json": {},
    }.items():
        (path / name).write_text(json.dumps(content))
    FORMATS[file](tensors, path / file)
    return open_checkpoint(path)


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_both_layouts_become_one(stored: str, canonical: str) -> None:
    assert FAMILIES["qwen2_5_vl"].canonical_name(stored) == canonical


@pytest.mark.parametrize("stored", ["model.norm.weight", NORM])
def test_a_tensor_is_found_in_either_layout(tmp_path: Path, stored: str) -> None:
    given = torch.arange(4, dtype=torch.bfloat16)
    found = Weights(checkpoint_of(tmp_path, {stored: given})).tensor(NORM, (4,), torch.float32, CPU)
    assert found.dtype == torch.float32 and found.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_is_that_part_of_the_tensor(
    tmp_path: Path, dim: int, file: str, dtype: torch.dtype
) -> None:
    given = torch.arange(24.0).view(4, 6).to(dtype)
    weights = Weights(checkpoint_of(tmp_path, {"before": torch.ones(3), "w": given}, file))
    found = weights.slice("w", (4, 6), dim, 1, 3, torch.float32, CPU)
    assert found.equal(given.narrow(dim, 1, 2).float())
    assert weights.num_bytes_read == found.numel() * dtype.itemsize
    assert weights.slice("w", (4, 6), dim, 1, 3, dtype, CPU).equal(given.narrow(dim, 1, 2))


@pytest.mark.parametrize("file", FORMATS)
def test_a_scalar_and_a_tensor_at_an_odd_place_are_read(tmp_path: Path, file: str) -> None:
    tensors = {"byte": torch.ones(1, dtype=torch.uint8), "one": torch.tensor(2.5)}
    weights = Weights(checkpoint_of(tmp_path, tensors, file))
    assert weights.tensor("one", (), torch.float32, CPU).item() == 2.5


@pytest.mark.parametrize("file", FORMATS)
def test_what_was_read_does_not_change_with_the_file(tmp_path: Path, file: str) -> None:
    checkpoint = checkpoint_of(tmp_path, {"w": torch.ones(4)}, file)
    found = Weights(checkpoint).tensor("w", (4,), torch.float32, CPU)
    with (tmp_path / file).open("r+b") as f:
        f.seek(checkpoint.tensors["w"].offset)
        f.write(bytes(16))
    assert found.tolist() == [1, 1, 1, 1]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=f"has no tensor {NORM}"):
        Weights(checkpoint_of(tmp_path, {"w": torch.ones(4)})).tensor(
            NORM, (4,), torch.float32, CPU
        )


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"w has shape \(4,\), config.json makes it \(2, 2\)"):
        Weights(checkpoint_of(tmp_path, {"w": torch.ones(4)})).tensor(
            "w", (2, 2), torch.float32, CPU
        )


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    weights = Weights(checkpoint_of(tmp_path, {"w": torch.ones(4).to(torch.float8_e4m3fn)}))
    with pytest.raises(BadCheckpoint, match="w is F8_E4M3, supported are F32, F16, BF16, and"):
        weights.tensor("w", (4,), torch.float32, CPU)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"w": torch.ones(4)})
    assert checkpoint.tensors
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        Weights(checkpoint).tensor("w", (4,), torch.float32, CPU)


def test_progress_counts_the_bytes_of_its_prefixes_once(tmp_path: Path) -> None:
    told: list[float] = []
    tensors = {
        "visual.a": torch.ones(3),
        "visual.b": torch.ones(1),
        "lm_head.weight": torch.ones(100),
    }
    weights = Weights(
        checkpoint_of(tmp_path, tensors), lambda name: name.startswith("model.visual."), told.append
    )
    for name, size in (
        ("model.visual.a", 3),
        ("model.visual.a", 3),
        ("lm_head.weight", 100),
        ("model.visual.b", 1),
    ):
        weights.tensor(name, (size,), torch.float32, CPU)
    assert told == [0.75, 0.75, 0.75, 1]
