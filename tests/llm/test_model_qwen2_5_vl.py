"""What a configuration or a file must not be for the language model to be loaded."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from compute.kernels.library import bfloat16_kernels
from services.llm.decoder import Decoder
from services.llm.families import load
from services.llm.families.qwen2_5_vl import TextConfig
from services.llm.loading import Bounds, ShardLoader
from services.llm.parallel import Shard
from tests.golden import GoldenCase

CPU = torch.device("cpu")


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Checkpoint:
    shutil.copytree(GoldenCase("a_image").checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("num_hidden_layers"), "lacks num_hidden_layers"),
        (lambda c: c.pop("rope_scaling"), "lacks 'rope_scaling'"),
        (lambda c: c["rope_scaling"].update(type="yarn"), "rope of type 'yarn'"),
        (lambda c: c["rope_scaling"].update(mrope_section=[4, 6, 5]), "does not fill heads of 32"),
        (lambda c: c.update(use_sliding_window=True), "sliding-window"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(BadCheckpoint, match=message):
        TextConfig.of(changed(tmp_path, change))


def test_nested_and_flat_configurations_are_read_alike() -> None:
    checkpoints = [
        open_checkpoint(GoldenCase(name).checkpoint) for name in ("a_image", "c_gqa_tp8")
    ]
    flat, nested = (checkpoint.sizes for checkpoint in checkpoints)
    configs = [TextConfig.of(checkpoint) for checkpoint in checkpoints]
    assert (flat.num_heads, flat.num_kv_heads, flat.head_dim) == (4, 2, 32)
    assert (nested.num_heads, nested.num_kv_heads, nested.head_dim) == (8, 2, 32)
    assert [config.mrope_section for config in configs] == [(4, 6, 6), (4, 6, 6)]
    assert [config.rope_theta for config in configs] == [1e6, 1e6]


def test_heads_that_the_ranks_cannot_share_are_refused() -> None:
    checkpoint = open_checkpoint(GoldenCase("a_image").checkpoint)
    with pytest.raises(
        BadCheckpoint, match=r"4 heads, .* cannot be shared by 8 ranks: use --tp 1, 2, 4"
    ):
        load(checkpoint, torch.float32, CPU, Shard(0, 8))


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path, lambda c: None)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"has no tensor lm_head\.weight"):
        load(open_checkpoint(checkpoint.path), torch.float32, CPU)


def test_loading_reports_its_fraction() -> None:
    told: list[float] = []
    load(
        open_checkpoint(GoldenCase("b_two_images_tied").checkpoint),
        torch.float32,
        CPU,
        report_loading=told.append,
    )
    assert told == sorted(told) and len(told) > 10 and told[-1] == 1


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_rank_reads_its_share_of_the_weights(world_size: int) -> None:
    """Norms and key heads that ranks share come on top; in a model this small they are more than in
    a real one."""
    checkpoint = open_checkpoint(GoldenCase("c_gqa_tp8").checkpoint)
    whole = load(checkpoint, torch.float32, CPU).num_bytes_read
    assert whole == sum(
        info.num_bytes for name, info in checkpoint.tensors.items() if "visual" not in name
    )
    config = checkpoint.sizes
    kv_heads = (
        2 * config.num_layers * config.num_kv_heads * config.head_dim * (config.hidden_size + 1) * 2
    )
    replicated = kv_heads * max(0, world_size // config.num_kv_heads - 1) / world_size
    norms = (2 * config.num_layers + 1) * config.hidden_size * 2
    for rank in range(world_size):
        read = load(checkpoint, torch.float32, CPU, Shard(rank, world_size)).num_bytes_read
        assert read == pytest.approx((whole - norms) / world_size + norms + replicated, rel=0.001)


@pytest.mark.skipif(bfloat16_kernels() is None, reason="no kernels for this CPU, or no compiler")
def test_a_vocabulary_that_embedding_and_head_share_is_held_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint(GoldenCase("b_two_images_tied").checkpoint)
    loaded: list[weakref.ref[torch.Tensor]] = []
    read = ShardLoader.rows

    def remembered(
        loader: ShardLoader, name: str, shape: tuple[int, ...], bounds: Bounds
    ) -> torch.Tensor:
        tensor = read(loader, name, shape, bounds)
        if name == checkpoint.family.embedding_name:
            loaded.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(ShardLoader, "rows", remembered)
    model = load(checkpoint, torch.bfloat16, CPU)
    assert isinstance(model, Decoder) and model.head.packed is not None
    assert [tensor() for tensor in loaded] == [None]
