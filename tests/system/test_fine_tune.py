"""A fine-tune in a newer layout, with the embeddings in a file of their own, and RolmOCR's name."""

from collections.abc import Iterator
from typing import Any

import pytest

from common.settings import ExtractSettings
from services.commands.extract import extract
from tests import fine_tunes
from tests.golden import GoldenCase
from tests.preprocess.test_request_defaults import INSTRUCTION
from tests.system.running import GOLDEN, Running, ask_about, golden_messages

pytestmark = pytest.mark.system
CASE = GoldenCase("b_two_images_tied")
PICTURE = next(CASE.inputs.glob("*.png"))
EXACT: dict[str, Any] = {
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    model = fine_tunes.write(CASE, "nested", folder / "RolmOCR").checkpoint
    assert extract(ExtractSettings(model=str(model), out=str(folder))) == 0
    arguments = ("--embeddings", str(folder), "--dtype", "float32", "--tp", "2")
    with Running("--model", str(model), *arguments) as running:
        yield running


def test_the_answer_is_the_reference(system: Running) -> None:
    ids = CASE.expected["greedy_ids"]
    _, answer = system.chat(golden_messages(GOLDEN / CASE.name), max_tokens=len(ids), **EXACT)
    assert answer["choices"][0]["token_ids"] == ids


def test_a_request_without_text_gets_the_models_prompt(system: Running) -> None:
    """Over HTTP and gRPC."""
    _, said = system.chat(ask_about(PICTURE, INSTRUCTION), max_tokens=4, **EXACT)
    image_only = ask_about(PICTURE)
    del image_only[0]["content"][1]
    _, unsaid = system.chat(image_only, max_tokens=4, **EXACT)
    assert unsaid["prompt_token_ids"] == said["prompt_token_ids"]
    assert unsaid["choices"][0]["token_ids"] == said["choices"][0]["token_ids"]
    _, other = system.chat(ask_about(PICTURE, "OCR:"), max_tokens=4, **EXACT)
    assert other["prompt_token_ids"] != said["prompt_token_ids"]
    asked = system.twinlens("generate", "", "--image", str(PICTURE), "--max-tokens", "4", "--json")
    assert f'"prompt_tokens": {said["usage"]["prompt_tokens"]}' in asked.stdout
