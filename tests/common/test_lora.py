"""What a directory of a LoRA adapter may hold. Whatever is not supported is refused by name."""

import argparse
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import lora
from common.adapter_names import adapters_of, parse_adapters
from common.checkpoint import BadCheckpoint, open_checkpoint
from common.config import BadSetting, load
from common.lora import open_adapter
from common.settings import LoraSettings
from tests.golden import GoldenCase
from tests.lora import PREFIX, write_adapter

MODEL = open_checkpoint(GoldenCase("d_text").checkpoint)
LAYER = "model.language_model.layers.0"
Q = f"{PREFIX}{LAYER}.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", MODEL.path)


def reconfigure(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(adapter: Path, change: Callable[[Tensors], object]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refusal(adapter: Path, max_rank: int = 64) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        open_adapter(adapter, MODEL, max_rank)
    return str(caught.value)


def test_an_adapter_names_its_pairs_their_scales_and_its_content(adapter: Path) -> None:
    files = open_adapter(adapter, MODEL, 64)
    assert {(pair.layer, pair.module) for pair in files.pairs} == {
        (layer, module)
        for layer in range(MODEL.sizes.num_layers)
        for module in MODEL.family.lora_modules
    }
    assert {pair.scale for pair in files.pairs} == {24 / 4}
    reconfigure(adapter, lora_alpha=25)
    assert open_adapter(adapter, MODEL, 64).identity != files.identity


def test_names_of_older_transformers_are_read(adapter: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(".language_model.", ".")] = tensors.pop(name)

    known = {(pair.layer, pair.module) for pair in open_adapter(adapter, MODEL, 64).pairs}
    change_tensors(adapter, rename)
    assert {(p.layer, p.module) for p in open_adapter(adapter, MODEL, 64).pairs} == known


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"r": 0}, "a rank of 1 or more"),
        ({"r": True}, "a rank of 1 or more"),
        ({"lora_alpha": "16"}, "lora_alpha has '16'"),
        ({"lora_alpha": 1e300}, "below a million"),
        ({"rank_pattern": {r".*q_proj": 4}}, "regular expressions"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"rank_pattern": {"q_proj": 5}}, "lora_A of"),
        ({"r": 8}, "lora_A of"),
    ],
)
def test_a_configuration_is_refused_by_name(
    adapter: Path, changes: dict[str, Any], reason: str
) -> None:
    reconfigure(adapter, **changes)
    assert reason in refusal(adapter)


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (f"{PREFIX}model.visual.blocks.0.attn.qkv.lora_A.weight", "vision tower"),
        (f"{PREFIX}visual.blocks.0.attn.qkv.lora_A.weight", "vision tower"),
        (f"{PREFIX}lm_head.lora_A.weight", "no module that adapters may change"),
        (f"{PREFIX}model.language_model.embed_tokens.lora_embedding_A", "is no lora_A.weight"),
        (f"{Q}.lora_magnitude_vector", "is no lora_A.weight"),
        (f"{Q}.lora_A.default.weight", "is no lora_A.weight"),
        (f"{PREFIX}{LAYER.replace('0', '99')}.self_attn.q_proj.lora_A.weight", "no module"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "is no lora_A.weight"),
    ],
)
def test_a_tensor_of_another_kind_is_refused_by_name(
    adapter: Path, added: str, reason: str
) -> None:
    change_tensors(adapter, lambda tensors: tensors.update({added: torch.zeros(4, 4)}))
    message = refusal(adapter)
    assert reason in message and added[:60] in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "has no lora_B.weight"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 3)}), "lora_A of (4, 3)"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(4)}), "lora_B of (4,)"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(2, 2).int()}), "is 'I32'"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    adapter: Path, change: Callable[[Tensors], object], reason: str
) -> None:
    change_tensors(adapter, change)
    assert reason in refusal(adapter)


def test_a_rank_above_the_limit_names_the_setting(adapter: Path) -> None:
    assert "--max-lora-rank 4" in refusal(adapter, max_rank=3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 16,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 8) + b"[1, 2]  ",
        struct.pack("<Q", 20_000) + b'{"a":' * 4_000,
        struct.pack("<Q", 4) + b'{"a"',
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(adapter: Path, data: bytes) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(data)
    assert "is not a safetensors file" in refusal(adapter)


def test_a_file_is_read_only_as_far_as_an_adapter_can_be_large(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "MAX_TABLE_BYTES", 2**20)
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(2**40)
    assert "is larger than" in refusal(adapter)


def test_a_file_that_was_cut_off_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "cut off" in refusal(adapter)


def test_weights_are_never_unpickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "weights in other formats are not read" in refusal(adapter)


def test_a_configuration_that_leads_out_of_the_directory_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.rename(adapter.parent / "elsewhere.json")
    file.symlink_to(adapter.parent / "elsewhere.json")
    assert "is a link to a file outside" in refusal(adapter)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, missing: str) -> None:
    (adapter / missing).unlink()
    assert missing in refusal(adapter)
    assert "no directory" in refusal(adapter / "nowhere")


def test_other_families_refuse_adapters_by_name(adapter: Path) -> None:
    wemm = open_checkpoint(GoldenCase("a_image", family="wemm").checkpoint)
    with pytest.raises(BadCheckpoint, match="no LoRA adapters for WeMM"):
        open_adapter(adapter, wemm, 64)
    with pytest.raises(BadSetting, match="no LoRA adapters for WeMM"):
        adapters_of(LoraSettings(lora_root="/"), wemm.family, "tiny")


def test_adapters_are_named_by_one_setting() -> None:
    assert parse_adapters("") == {}
    assert parse_adapters("a=/x,b=y=z") == {"a": "/x", "b": "y=z"}
    for text in ("a", "=x", "a=", "a=x,a=y", f"{'n' * 200}=x", f"a={'x' * 300}", "a\nb=x"):
        with pytest.raises(BadSetting, match=r"^--lora"):
            parse_adapters(text)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora": "tiny=/x"}, "the name of the served model"),
        ({"lora": "a=/x,b=/y", "max_loras": 1}, "names 2 adapters, --max-loras is 1"),
        ({"lora_root": "/nowhere"}, "--lora-root /nowhere: no such folder"),
    ],
)
def test_settings_that_no_group_can_have_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSetting, match=reason):
        adapters_of(LoraSettings(**settings), MODEL.family, "tiny")


def test_the_flag_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINLENS_LORA", "c=/z")
    for given, expected in (
        ([], "c=/z"),
        (["--lora", "a=/x"], "a=/x"),
        (["--lora", "a=/x", "--lora=b=/y"], "a=/x,b=/y"),
    ):
        parser = argparse.ArgumentParser()
        assert load(LoraSettings, parser, given, ["lora"]).lora == expected
