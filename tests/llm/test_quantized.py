"""A quantized checkpoint computes what its dequantized weights compute, on any number of ranks."""

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import open_checkpoint
from common.config import BadSetting
from common.settings import LlmSettings
from common.sizing import Footprint
from compute.kernels.library import bfloat16_kernels
from compute.linear import Linear
from compute.products import SideBySideProducts
from services.llm.decoder import Decoder
from services.llm.families import load
from services.llm.fused_decode import FusedDecode
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from services.llm.startup import check_settings
from services.vision.eager_tower import EagerTower
from tests.fine_tunes import write as write_layout
from tests.golden import GoldenCase, max_difference
from tests.llm.test_lora import adapted_runner
from tests.llm.test_model_runner import (
    CPU,
    Sequence,
    ThreadGroup,
    blocks_of,
    forced_logits,
    runner_of,
    step,
)
from tests.llm.test_padded_heads import padded_case
from tests.lora import write_adapter
from tests.quantized import FORMATS, Pair, cosine, in_layers, quantize
from tests.vision.test_qwen2_5_vl import embed, tower_of

NUM_DECODES = 3
ONE_OF_EACH = ("fp8 block", "awq", "gptq ordered", "w4a16")
BFLOAT16 = torch.bfloat16


@pytest.fixture(scope="module", params=FORMATS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("quantized")
    return quantize(GoldenCase("a_image"), FORMATS[request.param], folder)


def logits_of(runner: ModelRunner, case: GoldenCase) -> np.ndarray:
    """The logits of the last prompt token and of some that follow."""
    sequence = Sequence(case, blocks_of(1)[0])
    logits = [step(runner, [(sequence, sequence.num_left)])]
    for token_id in case.expected["greedy_ids"][:NUM_DECODES]:
        sequence.append(token_id)
        logits.append(step(runner, [(sequence, 1)]))
    return np.concatenate(logits)


def logits_of_ranks(
    case: GoldenCase, world_size: int, dtype: torch.dtype = torch.float32
) -> list[np.ndarray]:
    return ThreadGroup(world_size).run(lambda shard: logits_of(runner_of(case, dtype, shard), case))


def check_cosine(found: np.ndarray, expected: np.ndarray) -> None:
    assert cosine(torch.from_numpy(found), torch.from_numpy(expected)) >= 0.999


def test_float32_is_that_of_the_dequantized_weights(pair: Pair) -> None:
    expected = logits_of(runner_of(pair.meant), pair.meant)
    for world_size in (1, 2):
        for logits in logits_of_ranks(pair.quantized, world_size):
            assert max_difference(logits, expected) < 1e-4


def test_bfloat16_is_near_the_dequantized_weights(pair: Pair) -> None:
    expected = logits_of(runner_of(pair.meant), pair.meant)
    for world_size in (1, 2):
        for logits in logits_of_ranks(pair.quantized, world_size, BFLOAT16):
            check_cosine(logits, expected)
    found, expected = (
        logits_of(runner_of(case, BFLOAT16, quantization="none"), case)
        for case in (pair.quantized, pair.meant)
    )
    assert max_difference(found, expected) < 1e-3, "dequantized, they are the same"


@pytest.mark.parametrize("format", ONE_OF_EACH)
@pytest.mark.parametrize("world_size", [4, 8])
def test_many_ranks_compute_what_one_computes(format: str, world_size: int, tmp_path: Path) -> None:
    pair = quantize(GoldenCase("c_gqa_tp8"), FORMATS[format], tmp_path)
    expected = logits_of(runner_of(pair.meant), pair.meant)
    for logits in logits_of_ranks(pair.quantized, world_size):
        assert max_difference(logits, expected) < 1e-4
    for logits in logits_of_ranks(pair.quantized, world_size, BFLOAT16):
        check_cosine(logits, expected)


@pytest.mark.skipif(bfloat16_kernels() is None, reason="no kernels for this CPU, or no compiler")
@pytest.mark.parametrize("format", ONE_OF_EACH)
@pytest.mark.parametrize("world_size", [1, 2])
def test_decodes_in_one_call_give_what_single_operations_give(
    format: str, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = quantize(GoldenCase("c_gqa_tp8"), FORMATS[format], tmp_path)

    def run(shard: Shard) -> tuple[bool, np.ndarray]:
        runner = runner_of(pair.quantized, BFLOAT16, shard, "auto")
        return runner._fused_decode is not None, logits_of(runner, pair.quantized)

    fused = ThreadGroup(world_size).run(run)
    monkeypatch.setattr(FusedDecode, "of", lambda *given: None)
    single = ThreadGroup(world_size).run(run)
    assert all(is_fused for is_fused, _ in fused) and not any(is_fused for is_fused, _ in single)
    assert all(a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(fused, single, strict=True))


@pytest.mark.parametrize("format", ONE_OF_EACH)
def test_heads_of_zeros_stay_zeros(format: str, tmp_path: Path) -> None:
    case = padded_case(tmp_path / "model")
    pair = quantize(case, FORMATS[format], tmp_path)
    expected = logits_of(runner_of(pair.meant), pair.meant)
    for logits in logits_of_ranks(pair.quantized, 8, BFLOAT16):
        check_cosine(logits, expected)


@pytest.mark.parametrize("format", ONE_OF_EACH)
def test_newer_names_load(format: str, tmp_path: Path) -> None:
    case = write_layout(GoldenCase("a_image"), "nested", tmp_path / "model")
    pair = quantize(case, FORMATS[format], tmp_path)
    logits = logits_of(runner_of(pair.quantized), pair.quantized)
    assert max_difference(logits, logits_of(runner_of(pair.meant), pair.meant)) < 1e-4


@pytest.mark.parametrize("format", ONE_OF_EACH)
def test_a_quantized_tower_is_dequantized(format: str, tmp_path: Path) -> None:
    pair = quantize(
        GoldenCase("a_image"),
        FORMATS[format],
        tmp_path,
        lambda name: "visual.blocks" in name and ".norm" not in name and name.endswith("weight"),
    )
    found, expected = (embed(EagerTower(tower_of(c)), c) for c in (pair.quantized, pair.meant))
    assert max_difference(found, expected) < 1e-4
    plain, quantized = (
        Footprint(open_checkpoint(c.checkpoint), 2) for c in (pair.meant, pair.quantized)
    )
    assert quantized.vision_bytes == plain.vision_bytes


def test_modules_of_several_kinds_stand_side_by_side(tmp_path: Path) -> None:
    """Only some modules of a layer are quantized, or their inputs are ordered differently."""
    case = GoldenCase("a_image")
    pair = quantize(
        case,
        FORMATS["gptq disordered"],
        tmp_path,
        lambda name: in_layers(name) and "k_proj" not in name,
    )
    runner = runner_of(pair.quantized, BFLOAT16)
    model = runner._model
    assert isinstance(model, Decoder)
    for projection in (model.layers[0].qkv, model.layers[0].gate_up):
        assert isinstance(projection.product, SideBySideProducts)
    expected = logits_of(runner_of(pair.meant), pair.meant)
    check_cosine(logits_of(runner, pair.quantized), expected)


def test_a_quantized_head_loads(tmp_path: Path) -> None:
    pair = quantize(
        GoldenCase("a_image"), FORMATS["gptq"], tmp_path, lambda name: name == "lm_head.weight"
    )
    expected = logits_of(runner_of(pair.meant), pair.meant)
    for dtype in (torch.float32, BFLOAT16):
        for logits in logits_of_ranks(pair.quantized, 2, dtype):
            check_cosine(logits, expected)


@pytest.mark.parametrize("format", ONE_OF_EACH)
def test_an_adapter_is_added_to_quantized_weights(format: str, tmp_path: Path) -> None:
    pair = quantize(GoldenCase("a_image"), FORMATS[format], tmp_path)
    adapter = write_adapter(tmp_path / "adapter", GoldenCase("a_image").checkpoint)
    found, expected = (
        forced_logits(adapted_runner(case, adapter, dtype=dtype), case, 33, 1)
        for case, dtype in ((pair.quantized, BFLOAT16), (pair.meant, torch.float32))
    )
    check_cosine(found, expected)
    plain = forced_logits(runner_of(pair.meant), pair.meant, 33)
    assert max_difference(expected, plain) > 0.1, "the adapter changes something"


def test_the_memory_that_is_planned_is_that_of_the_stored_weights(pair: Pair) -> None:
    checkpoint = open_checkpoint(pair.quantized.checkpoint)
    told: list[float] = []
    model = load(checkpoint, BFLOAT16, CPU, report_loading=told.append)
    assert told[-1] == 1
    stored = sum(weight.num_bytes for weight in checkpoint.quantized.values())
    footprint = Footprint(checkpoint, 2)
    plain = Footprint(checkpoint, 2, keeps_quantized=False)
    num_weights = sum(prod(weight.shape) for weight in checkpoint.quantized.values())
    assert plain.rank_bytes(1) == Footprint(open_checkpoint(pair.meant.checkpoint), 2).rank_bytes(1)
    assert plain.rank_bytes(1) - footprint.rank_bytes(1) == 2 * num_weights - stored
    assert Footprint(checkpoint, 4).rank_bytes(1) == 2 * plain.rank_bytes(1)
    assert model.num_bytes_read > stored
    share = load(checkpoint, BFLOAT16, CPU, Shard(0, 2)).num_bytes_read
    assert share < 0.7 * model.num_bytes_read


def test_a_quantized_module_is_a_plain_product_if_that_is_asked_for(pair: Pair) -> None:
    checkpoint = open_checkpoint(pair.quantized.checkpoint)
    for dtype, quantization in ((torch.float32, "auto"), (BFLOAT16, "none")):
        model = load(checkpoint, dtype, CPU, quantization=quantization)
        assert isinstance(model, Decoder)
        assert isinstance(model.layers[0].qkv.product, Linear)


def test_int8_is_refused_for_a_checkpoint_that_is_quantized_already(pair: Pair) -> None:
    checkpoint = open_checkpoint(pair.quantized.checkpoint)
    given = LlmSettings(model=str(checkpoint.path))
    with pytest.raises(BadSetting, match="the checkpoint is quantized already"):
        check_settings(replace(given, quantization="int8"), checkpoint)
    for quantization in ("auto", "none"):
        check_settings(replace(given, quantization=quantization), checkpoint)
    check_settings(replace(given, quantization="int8"), open_checkpoint(pair.meant.checkpoint))
