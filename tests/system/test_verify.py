"""`twinlens verify`: what it finds right, what it finds wrong, and where."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.serving import ROOT
from tests.golden import GoldenCase
from tests.system.running import RECEIPT, Running

pytestmark = pytest.mark.system
MODEL = ROOT / "models" / "tiny-ocr"
OTHER_FAMILY_MEMBER = GoldenCase("a_image").checkpoint
TENSOR = "model.layers.2.mlp.down_proj.weight"


def found_by(said: str) -> dict[str, Any]:
    return json.loads(said.splitlines()[-1])


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the embedded model in which one tensor is a little larger."""
    folder = tmp_path_factory.mktemp("models") / "tiny-ocr"
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[TENSOR] = tensors[TENSOR] * 1.25
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def system(changed: Path) -> Iterator[Running]:
    with Running("--model", str(changed), "--dtype", "float32", "--tp", "2") as running:
        yield running


def test_float32_on_two_ranks_is_within_a_thousandth(system: Running, changed: Path) -> None:
    status, said = system.verify(changed, "--dtype", "float32", "--image", str(RECEIPT))
    assert status == 0, said
    found = found_by(said)
    assert (found["is_within"], found["tolerance"], found["agreement"]) == (True, 1e-3, 1)
    assert 0 < found["max_difference"] < 2e-4
    assert [question["question"] for question in found["questions"]] == [
        "text",
        "long text",
        "image",
        "images together",
    ]
    assert {question["prompt"] for question in found["questions"]} == {"equal"}
    assert "OK: all 4 questions are answered within 0.001" in said


def test_weights_that_are_not_those_of_the_directory_are_found(system: Running) -> None:
    status, said = system.verify(MODEL, "--dtype", "float32", "--max-tokens", "4")
    assert status == 1, said
    found = found_by(said)
    assert {question["prompt"] for question in found["questions"]} == {"equal"}
    first = found["questions"][0]["comparison"]["first"]
    assert first["index"] == 0 and first["difference"] > 1e-3
    assert "text: step 0: another" in said
    assert "DIFFERS in 5 of 5 questions: outside 0.001" in said


def test_another_model_is_told_apart_from_other_numbers(system: Running) -> None:
    status, said = system.verify(OTHER_FAMILY_MEMBER, "--max-tokens", "2")
    assert status == 1, said
    assert {q["prompt"] for q in found_by(said)["questions"]} == {"differs"}
    assert "the prompts are others. Does 'tiny-ocr' serve" in said


def test_other_limits_of_pixels_are_told_apart_from_other_numbers(
    system: Running, changed: Path
) -> None:
    status, said = system.verify(changed, "--max-pixels", "50000", "--max-tokens", "2")
    assert status == 1, said
    prompts = {q["question"]: q["prompt"] for q in found_by(said)["questions"]}
    assert prompts["text"] == "equal" and prompts["image 1"] == "differs"


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", "none"), ("bfloat16", "int8")], ids=str
)
def test_smaller_numbers_lie_within_their_bounds(dtype: str, quantization: str) -> None:
    arguments = ("--dtype", dtype, "--quantization", quantization)
    bound = dtype if quantization == "none" else quantization
    with Running("--model", str(MODEL), *arguments) as running:
        status, said = running.verify(MODEL, "--dtype", bound)
        assert status == 0, said
        assert found_by(said)["max_difference"] > 1e-3
