"""What config.json says about quantized weights is read, or refused by its name."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quantized import Format, awq, fp8, gptq, w4a16
from common.checkpoint import BadCheckpoint, open_checkpoint
from common.quantization import Scheme, read_schemes
from tests.golden import GoldenCase
from tests.quantized import FORMATS, quantize

Config = dict[str, Any]
Change = Callable[[Config], Any]
FILE = Path("model/config.json")
PROJECTION = "model.layers.0.mlp.down_proj"
PLAIN = GoldenCase("a_image")


def schemes_of(config: Config, key: str = "quantization_config") -> tuple[Scheme, ...]:
    return read_schemes({key: config}, FILE)


def test_a_checkpoint_that_is_not_quantized_has_no_scheme() -> None:
    assert read_schemes({}, FILE) == read_schemes({"quantization_config": None}, FILE) == ()
    assert open_checkpoint(PLAIN.checkpoint).quantized == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (awq(64), Scheme("awq", columns=64)),
        (awq(-1), Scheme("awq")),
        (gptq(64), Scheme("gptq", columns=64, zero_offset=0x11111111)),
        (gptq(64, version=2), Scheme("gptq", columns=64)),
        (gptq(act_order=1), Scheme("gptq", columns=128, zero_offset=0x11111111, is_ordered=True)),
        (w4a16(32), Scheme("packed", columns=32, has_zeros=False)),
        (w4a16(-1, symmetric=False), Scheme("packed")),
        (fp8("tensor"), Scheme("fp8", rows=0, has_zeros=False)),
        (fp8("channel"), Scheme("fp8", has_zeros=False)),
        (fp8("block", (128, 64)), Scheme("fp8", rows=128, columns=64, has_zeros=False)),
    ],
)
def test_each_format_is_a_scheme(given: Format, expected: Scheme) -> None:
    assert schemes_of(given.config) == (expected,)
    assert read_schemes({"text_config": {"quantization_config": given.config}}, FILE) == (expected,)


def test_the_older_key_of_compressed_tensors_is_read() -> None:
    config = fp8().config
    del config["quant_method"]
    for said in ({"quantization_config": config}, config | {"quant_method": "compressed-tensors"}):
        assert schemes_of(said, "compression_config") == schemes_of(fp8().config)


def test_each_group_may_have_a_scheme_and_a_format() -> None:
    four, eight = (w4a16(64).config, fp8().config)
    groups = {
        name: given["config_groups"]["group_0"] | {"format": given["format"]}
        for name, given in (("a", four), ("b", eight))
    }
    config = four | {"format": "mixed-precision", "config_groups": groups}
    assert schemes_of(config) == schemes_of(four) + schemes_of(eight)


def weights(config: Config) -> Config:
    return config["config_groups"]["group_0"]["weights"]


def activations(config: Config) -> Config:
    return config["config_groups"]["group_0"]["input_activations"]


REFUSED: list[tuple[Format, Change, str]] = [
    (gptq(), lambda c: c.update(bits=8), "GPTQ in 8 bits"),
    (gptq(), lambda c: c.update(bits=3), "GPTQ in 3 bits"),
    (gptq(), lambda c: c.pop("bits"), "GPTQ in None bits"),
    (gptq(), lambda c: c.update(checkpoint_format="marlin"), "GPTQ in the layout 'marlin'"),
    (gptq(), lambda c: c.update(checkpoint_format=["gptq"]), "GPTQ in the layout"),
    (gptq(), lambda c: c.update(is_marlin_format=True), "GPTQ in the layout 'marlin'"),
    (gptq(), lambda c: c.update(pack_dtype="int16"), "GPTQ packed in 'int16'"),
    (gptq(), lambda c: c.update(group_size=0), "a group_size of 0"),
    (gptq(), lambda c: c.update(group_size="128"), "a group_size of '128'"),
    (gptq(), lambda c: c.update(dynamic={"+:.*": {"bits": 8}}), "GPTQ in 8 bits"),
    (gptq(), lambda c: c.update(dynamic={"+:.*": {"group_size": 32}}), "in `dynamic`"),
    (gptq(), lambda c: c.update(dynamic=[1]), "a malformed dynamic"),
    (awq(), lambda c: c.update(bits=3), "AWQ in 3 bits"),
    (awq(), lambda c: c.update(version="gemv"), "AWQ in the layout 'gemv'"),
    (awq(), lambda c: c.update(version="exllama"), "AWQ in the layout 'exllama'"),
    (awq(), lambda c: c.update(zero_point=False), "AWQ without zero points"),
    (fp8(), lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "a kv_cache_scheme"),
    (fp8(), lambda c: c.update(transform_config={"a": 1}), "a transform_config"),
    (fp8(), lambda c: c.update(sparsity_config={"format": "sparse-24"}), "a sparsity_config"),
    (fp8(), lambda c: c.update(format="int-quantized"), "'int-quantized'"),
    (fp8(), lambda c: c.update(format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
    (fp8(), lambda c: weights(c).update(type="int"), "8 bits ('int')"),
    (fp8(), lambda c: weights(c).update(num_bits=4), "4 bits ('float')"),
    (fp8(), lambda c: weights(c).update(strategy="tensor_group"), "'tensor_group'"),
    (fp8("block"), lambda c: weights(c).update(block_structure=[0, 1]), "'block'"),
    (fp8("block"), lambda c: weights(c).update(block_structure="x"), "'block'"),
    (fp8(), lambda c: activations(c).update(type="int"), "activations in integers"),
    (fp8(), lambda c: c["config_groups"].update(group_0=3), "a malformed config_groups"),
    (fp8(), lambda c: c["config_groups"]["group_0"].update(weights=3), "malformed weights"),
    (
        fp8(),
        lambda c: c["config_groups"]["group_0"].update(output_activations={"a": 1}),
        "output_activations",
    ),
    (w4a16(), lambda c: weights(c).update(num_bits=8), "8 bits ('int')"),
    (w4a16(), lambda c: weights(c).update(strategy="tensor"), "'tensor'"),
    (fp8(), lambda c: c.update(quant_method="bitsandbytes"), "quant_method 'bitsandbytes'"),
    (fp8(), lambda c: c.pop("quant_method"), "quant_method None"),
]


@pytest.mark.parametrize(("given", "change", "message"), REFUSED)
def test_what_is_not_supported_is_named(given: Format, change: Change, message: str) -> None:
    config = json.loads(json.dumps(given.config))
    change(config)
    with pytest.raises(BadCheckpoint, match=re.escape(message)) as refused:
        schemes_of(config)
    assert "use a checkpoint in FP8, AWQ, GPTQ or W4A16" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_configuration_of_another_kind_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match=r"quantization_config in config.json is not an object"):
        read_schemes({"quantization_config": "awq"}, FILE)


@pytest.mark.parametrize("name", FORMATS)
def test_the_tensors_say_which_modules_are_quantized(name: str, tmp_path: Path) -> None:
    format = replace(FORMATS[name], config=FORMATS[name].config | {"ignore": ["re:.*("]})
    pair = quantize(PLAIN, format, tmp_path, lambda name: name == f"{PROJECTION}.weight")
    checkpoint = open_checkpoint(pair.quantized.checkpoint)
    (canonical,) = checkpoint.quantized
    assert canonical == "model.language_model.layers.0.mlp.down_proj.weight"
    assert checkpoint.quantized[canonical].shape == (128, 256)


Damage = Callable[[dict[str, Tensor]], Any]


def without(last: str) -> Damage:
    return lambda tensors: tensors.pop(f"{PROJECTION}.{last}")


def replaced(last: str, tensor: Tensor) -> Damage:
    return lambda tensors: tensors.update({f"{PROJECTION}.{last}": tensor})


ONES = torch.ones(8, 8)
DAMAGED: list[tuple[str, Damage, str]] = [
    ("fp8 channel", without("weight_scale"), "down_proj.weight_scale is missing"),
    (
        "fp8 channel",
        replaced("weight_scale", torch.ones(127, 1)),
        "weight_scale has shape (127, 1)",
    ),
    ("fp8 tensor", replaced("weight_scale", torch.ones(2)), "weight_scale has shape (2,)"),
    ("fp8 block", replaced("weight_scale", torch.ones(3, 6)), "makes it (3, 7)"),
    ("fp8 block", replaced("weight_scale", torch.ones(3, 7).int()), "weight_scale is I32"),
    ("awq", without("scales"), "down_proj.scales is missing"),
    ("awq", without("qzeros"), "down_proj.qzeros is missing"),
    ("awq", replaced("qzeros", ONES.int()), "qzeros has shape (8, 8)"),
    ("awq", replaced("scales", ONES), "makes it (8, 128)"),
    ("awq", replaced("qweight", ONES), "is quantized in another way"),
    ("awq", replaced("qzeros", torch.ones(8, 16)), "qzeros is F32"),
    ("gptq ordered", without("g_idx"), "down_proj.g_idx is missing"),
    ("gptq ordered", replaced("g_idx", torch.zeros(255).int()), "g_idx has shape (255,)"),
    ("gptq ordered", replaced("g_idx", torch.zeros(256)), "g_idx is F32"),
    ("w4a16", without("weight_scale"), "down_proj.weight_scale is missing"),
    ("w4a16", replaced("weight_packed", ONES.int()[0]), "is quantized in another way"),
    ("w4a16 asymmetric", without("weight_zero_point"), "weight_zero_point is missing"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED)
def test_what_does_not_fit_together_is_named(
    name: str, damage: Damage, message: str, tmp_path: Path
) -> None:
    pair = quantize(PLAIN, FORMATS[name], tmp_path)
    file = pair.quantized.checkpoint / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(BadCheckpoint, match=re.escape(message)) as refused:
        open_checkpoint(pair.quantized.checkpoint)
    assert PROJECTION in str(refused.value)


def test_packed_weights_without_a_scheme_are_refused(tmp_path: Path) -> None:
    pair = quantize(PLAIN, Format({}, awq(32).store), tmp_path)
    with pytest.raises(BadCheckpoint, match=r"qweight .* is quantized in another way than"):
        open_checkpoint(pair.quantized.checkpoint)


def test_the_scheme_of_several_is_the_one_that_fits(tmp_path: Path) -> None:
    groups = {str(size): w4a16(size).config["config_groups"]["group_0"] for size in (64, 32)}
    config = w4a16().config | {"config_groups": groups}
    sizes = {"down_proj": 32, "up_proj": 64}
    pair = quantize(
        PLAIN,
        Format(config, w4a16(64).store),
        tmp_path,
        lambda name: name.split(".")[-2] in sizes and "layers" in name,
        lambda name: w4a16(sizes[name.split(".")[-2]]).store,
    )
    quantized = open_checkpoint(pair.quantized.checkpoint).quantized
    assert {weight.scheme.columns for name, weight in quantized.items() if "up" in name} == {64}
    assert {weight.scheme.columns for name, weight in quantized.items() if "down" in name} == {32}
