"""The reference of a quantized checkpoint computes with the weights that it means."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quantized import w4a16
from common.checkpoint import open_checkpoint
from services.commands.verification.families.qwen2_5_vl import Qwen25VLReference
from services.commands.verification.questions import Question
from services.commands.verification.reference import PixelLimits
from services.commands.verification.weights import Float32Weights
from tests.commands.verification.test_references import images_of
from tests.golden import GoldenCase, max_difference
from tests.llm.test_quantized import ONE_OF_EACH
from tests.quantized import FORMATS, quantize

CASE = GoldenCase("a_image")


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_is_what_its_bytes_mean(name: str, tmp_path: Path) -> None:
    pair = quantize(CASE, FORMATS[name], tmp_path)
    checkpoint = open_checkpoint(pair.quantized.checkpoint)
    weights = Float32Weights(checkpoint)
    meant = load_file(pair.meant.checkpoint / "model.safetensors")
    for stored_name, tensor in meant.items():
        name = checkpoint.family.canonical_name(stored_name)
        assert name in weights and weights[name].equal(tensor.float())
    plain = Float32Weights(open_checkpoint(pair.meant.checkpoint))
    assert weights.bytes_needed == plain.bytes_needed


def test_packed_weights_need_not_fill_their_integers(tmp_path: Path) -> None:
    tower = "visual.blocks.0.mlp.down_proj.weight"
    format = w4a16(-1, symmetric=False)
    pair = quantize(GoldenCase("c_gqa_tp8"), format, tmp_path, lambda name: name.endswith(tower))
    weights = Float32Weights(open_checkpoint(pair.quantized.checkpoint))
    meant = load_file(pair.meant.checkpoint / "model.safetensors")
    (expected,) = (tensor for name, tensor in meant.items() if name.endswith(tower))
    assert weights[f"model.{tower}"].equal(expected)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_transformers_computes_with_them(name: str, tmp_path: Path) -> None:
    pair = quantize(CASE, FORMATS[name], tmp_path)
    question = Question("images", "", images_of(CASE))
    found, expected = (
        Qwen25VLReference(open_checkpoint(case.checkpoint), PixelLimits()).log_probs(
            question, CASE.expected["input_ids"], CASE.expected["greedy_ids"][:2]
        )
        for case in (pair.quantized, pair.meant)
    )
    assert max_difference(found, expected) < 1e-5
    plain = torch.from_numpy(CASE.tensors["greedy_logits"][:2]).log_softmax(-1)
    assert max_difference(found, plain.numpy()) > 1e-3
