"""Each reference equals what the published code computed: prompts, pixels and log-probabilities."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import open_checkpoint
from services.commands.verification.families.qwen2_5_vl import Qwen25VLReference
from services.commands.verification.families.qwen_vl import QwenVLReference
from services.commands.verification.families.vlmo import VlmoReference
from services.commands.verification.families.wemm import WemmReference
from services.commands.verification.questions import Question
from services.commands.verification.reference import (
    ChatReference,
    PixelLimits,
    PromptMismatch,
)
from tests.fine_tunes import LAYOUTS, write
from tests.golden import CASES, GoldenCase, max_difference
from tests.golden.qwen_vl_requests import GoldenRequest, requests_of

LIMIT = 1e-3
WEMM = [GoldenCase("a_image", "wemm"), GoldenCase("a_image_renamed", "wemm")]
VQA = [GoldenCase("vqa_base", "vlmo"), GoldenCase("vqa_base_plus", "vlmo")]
QWEN_VL = [
    r for name in ("a_chat_image", "b_long_ntk_logn", "c_box_two_images") for r in requests_of(name)
]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def check_answer(
    reference: ChatReference,
    question: Question,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    logits: np.ndarray,
) -> None:
    """Check the log-probabilities of an answer against the logits of the published code."""
    found = reference.log_probs(question, prompt_ids, answer_ids)
    assert max_difference(found, log_softmax(logits[: len(answer_ids)])) < LIMIT


@pytest.mark.parametrize("name", CASES)
def test_transformers_as_we_run_it_equals_transformers_as_published(name: str) -> None:
    case = GoldenCase(name)
    reference = Qwen25VLReference(open_checkpoint(case.checkpoint), PixelLimits())
    prompt_ids = case.expected["input_ids"]
    if question := question_of(case):
        assert reference.prompt_ids(question) == prompt_ids
    else:
        question = Question("images", "", images_of(case))
    check_answer(
        reference, question, prompt_ids, case.expected["greedy_ids"], case.tensors["greedy_logits"]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_reads_each_layout_of_fine_tunes(layout: str, tmp_path: Path) -> None:
    case = GoldenCase("b_two_images_tied")
    tuned = write(case, layout, tmp_path / "model")
    reference = Qwen25VLReference(open_checkpoint(tuned.checkpoint), PixelLimits())
    question = Question("images", "", images_of(case))
    answer_ids = case.expected["greedy_ids"][:4]
    prompt_ids = case.expected["input_ids"]
    check_answer(reference, question, prompt_ids, answer_ids, case.tensors["greedy_logits"])
    assert reference.prompt_ids(Question("text", "Hello")) == Qwen25VLReference(
        open_checkpoint(case.checkpoint), PixelLimits()
    ).prompt_ids(Question("text", "Hello"))


def test_a_head_that_is_stored_although_it_is_tied_is_not_read(tmp_path: Path) -> None:
    case = GoldenCase("b_two_images_tied")
    tuned = write(case, "twice", tmp_path / "model")
    tensors = load_file(tuned.checkpoint / "model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, tuned.checkpoint / "model.safetensors")
    reference = Qwen25VLReference(open_checkpoint(tuned.checkpoint), PixelLimits())
    question = Question("images", "", images_of(case))
    answer_ids = case.expected["greedy_ids"][:2]
    prompt_ids = case.expected["input_ids"]
    check_answer(reference, question, prompt_ids, answer_ids, case.tensors["greedy_logits"])


def messages_of(case: GoldenCase) -> list[dict[str, Any]]:
    return json.loads((case.inputs / "messages.json").read_text())


def images_of(case: GoldenCase) -> tuple[bytes, ...]:
    parts = [p for m in messages_of(case) if isinstance(m["content"], list) for p in m["content"]]
    names = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return tuple((case.inputs / name).read_bytes() for name in names)


def question_of(case: GoldenCase) -> Question | None:
    """Return a case's conversation if it is one that `twinlens verify` could ask."""
    messages = messages_of(case)
    content = messages[0]["content"]
    if len(messages) != 1:
        return None
    if isinstance(content, str):
        return Question("text", content)
    *images, last = content
    is_plain = last["type"] == "text" and all(part["type"] == "image_url" for part in images)
    return Question("images", last["text"], images_of(case)) if is_plain else None


def test_a_prompt_without_places_for_the_images_is_a_mismatch() -> None:
    case = GoldenCase("a_image")
    reference = Qwen25VLReference(open_checkpoint(case.checkpoint), PixelLimits())
    question = Question("image", "", images_of(case))
    prompt_ids = case.expected["input_ids"]
    with pytest.raises(PromptMismatch, match=r"has 34 placeholders .* makes 35"):
        reference.log_probs(question, [*prompt_ids[:30], *prompt_ids[31:]], [5, 6])


@pytest.mark.parametrize("golden", QWEN_VL, ids=lambda g: f"{g.case.name}-{g.number}")
def test_qwen_vl_equals_the_published_code(golden: GoldenRequest) -> None:
    reference = QwenVLReference(open_checkpoint(golden.case.checkpoint), PixelLimits())
    images = tuple((golden.case.inputs / name).read_bytes() for name in golden.pictures)
    placeholder = golden.case.expected["special_tokens"]["<imgpad>"]
    prompt_ids = golden.token_ids
    for start, length in golden.spans:
        prompt_ids[start : start + length] = placeholder
    question = Question("images", "", images)
    check_answer(reference, question, prompt_ids.tolist(), golden.answer, golden.logits)


def test_qwen_vl_asks_as_the_published_code() -> None:
    golden = requests_of("a_chat_image")[0]
    reference = QwenVLReference(open_checkpoint(golden.case.checkpoint), PixelLimits())
    images = tuple((golden.case.inputs / name).read_bytes() for name in golden.pictures)
    found = reference.prompt_ids(Question("image", "Describe the picture in detail.", images))
    start, length = golden.spans[0]
    expected = golden.token_ids.tolist()
    placeholder = golden.case.expected["special_tokens"]["<imgpad>"]
    expected[start : start + length] = [placeholder] * length
    assert found == expected


@pytest.mark.parametrize("case", WEMM, ids=lambda case: case.name)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_wemm_equals_its_golden_cases(case: GoldenCase, number: int) -> None:
    reference = WemmReference(open_checkpoint(case.checkpoint), PixelLimits())
    request = case.expected["requests"][number]
    images: tuple[bytes, ...] = ()
    prompt_ids = list(request["ids_before_image"])
    if request["image"]:
        images = ((case.inputs / request["image"]).read_bytes(),)
        start, end = request["image_rows"]
        prompt_ids += [512] * (end - start) + request["ids_after_image"]
    question = Question("request", request["text"], images)
    assert reference.prompt_ids(question) == prompt_ids
    if images:
        pixels = case.tensors[f"pixel_values.{request['image']}"]
        assert max_difference(reference.pixels(question).numpy(), pixels) < 1e-6
    logits = case.tensors[f"req{number}.greedy_logits"]
    check_answer(reference, question, prompt_ids, request["greedy_ids"], logits)


@pytest.mark.parametrize("case", VQA, ids=lambda case: case.name)
def test_vlmo_answers_as_the_published_code(case: GoldenCase) -> None:
    reference = VlmoReference(open_checkpoint(case.checkpoint), PixelLimits())
    logits = case.tensors["vqa_logits"]
    for asked, expected in zip(case.expected["questions"], log_softmax(logits), strict=True):
        image = (case.inputs / asked["image"]).read_bytes()
        found = reference.pool(Question("image", asked["question"], (image,)))
        assert max_difference(found, expected) < LIMIT
        assert found.argmax() == asked["label"]


def test_vlmo_embeds_as_the_published_code() -> None:
    case = GoldenCase("retrieval_base", "vlmo")
    reference = VlmoReference(open_checkpoint(case.checkpoint), PixelLimits())
    for text, expected in zip(case.expected["texts"], case.tensors["text_feats"], strict=True):
        assert max_difference(reference.pool(Question("text", text)), expected) < LIMIT
    for name, expected in zip(("a", "b", "c"), case.tensors["image_feats"], strict=True):
        image = (case.inputs / f"{name}.png").read_bytes()
        assert max_difference(reference.pool(Question("image", "", (image,))), expected) < LIMIT
