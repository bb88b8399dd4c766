"""A family that the product does not know, through all processes: equal to plain loops."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import open_checkpoint
from common.families import FAMILIES
from common.vocabulary import Vocabulary, open_vocabulary
from tests.system.running import Running, data_uri
from tests.toy_family.checkpoint import (
    PATCH,
    PATCHES_PER_TOKEN,
    PICTURE_ID,
    make_checkpoint,
)
from tests.toy_family.description import MODEL_TYPE, Toy
from tests.toy_family.plain import PlainModel
from tests.toy_family.preprocessing import TOKENS_PER_PARAMETER

pytestmark = pytest.mark.system
NUM_TOKENS = 24
TIE = 3e-4
TOKEN_COLUMNS = PATCH * PATCHES_PER_TOKEN
SIZES = [((20, 50),), ((8, 24), (33, 70)), ((16, 48),), ((41, 25),), (), ((24, 72), (9, 9))]
"""(height, width) of the pictures of each question. Most need padding."""
KV_BYTES_PER_TOKEN = 512


class Question:
    """A chat message with pictures, and what the plain loops answer."""

    def __init__(self, number: int, model: PlainModel, vocabulary: Vocabulary) -> None:
        random = np.random.default_rng(number)
        self.pictures = [
            random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES[number]
        ]
        self.text = f" The question {number} is: what is in the picture? " * (1 + number % 3)
        ids = vocabulary.encode("<turn>user:")
        positions = [(i, i) for i in range(len(ids))]
        items: dict[int, Tensor] = {}
        counter = len(ids)
        for picture in self.pictures:
            rows = embeddings(model, picture)
            items |= {len(ids) + i: row for i, row in enumerate(rows)}
            ids += [PICTURE_ID] * len(rows)
            positions += [(counter, counter + i) for i in range(len(rows))]
            counter += len(rows) // 2 + 1
        rest = vocabulary.encode(f"{self.text}<end><turn>assistant: ")
        positions += [(counter + i, counter + i) for i in range(len(rest))]
        self.prompt_ids = ids + rest
        self.answer, self.gap = model.generate(
            self.prompt_ids,
            positions,
            items,
            1 + len(self.prompt_ids) // TOKENS_PER_PARAMETER,
            counter - len(ids),
            NUM_TOKENS,
        )

    @property
    def messages(self) -> list[dict[str, Any]]:
        urls = [{"url": data_uri(png(picture))} for picture in self.pictures]
        pictures = [{"type": "image_url", "image_url": url} for url in urls]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": self.text}]}]


def embeddings(model: PlainModel, picture: np.ndarray) -> Tensor:
    """Return the embeddings of a picture, cut into patches pixel by pixel."""
    height, width, _ = picture.shape
    rows = -(-height // PATCH)
    columns = -(-width // TOKEN_COLUMNS) * PATCHES_PER_TOKEN
    padded = np.zeros((rows * PATCH, columns * PATCH, 3), dtype=np.uint8)
    padded[:height, :width] = picture
    patches = [
        padded[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].transpose(2, 0, 1).ravel()
        for y in range(rows)
        for x in range(columns)
    ]
    return model.embeddings(torch.from_numpy(np.stack(patches)), columns, (height, width))


def png(picture: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[Question]:
    """Questions whose answers have no near tie, which rounding might decide otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, MODEL_TYPE, Toy())
        vocabulary = open_vocabulary(open_checkpoint(folder))
    model = PlainModel(folder)
    asked = [Question(number, model, vocabulary) for number in range(len(SIZES))]
    clear = [question for question in asked if question.gap > TIE]
    assert len(clear) >= 4
    return clear


def serving(folder: Path, *arguments: str) -> Running:
    common = ("--model", str(folder), "--dtype", "float32", "--block-size", "4")
    return Running(*common, *arguments, module="tests.toy_family.serve")


def ask(system: Running, question: Question) -> dict[str, Any]:
    status, answer = system.chat(
        question.messages, max_tokens=NUM_TOKENS, ignore_eos=True, return_token_ids=True
    )
    assert status == 200, answer
    assert answer["prompt_token_ids"] == question.prompt_ids
    assert answer["choices"][0]["token_ids"] == question.answer
    return answer


def ask_all(system: Running, questions: list[Question]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: ask(system, question), questions))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--max-num-batched-tokens", "7", "--vision-buckets", "12,48", "--vision", "2"),
        ("--tp", "2", "--max-num-batched-tokens", "16"),
    ],
    ids=["plain", "chunks-and-static-towers", "tensor-parallel"],
)
def test_answers_equal_plain_loops(
    folder: Path, questions: list[Question], arguments: tuple[str, ...]
) -> None:
    with serving(folder, *arguments) as system:
        ask_all(system, questions)
        again = ask_all(system, questions)
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in again]
        assert min(cached) > 0


def test_answers_equal_plain_loops_with_room_for_two_of_many(
    folder: Path, questions: list[Question]
) -> None:
    longest = max(len(question.prompt_ids) for question in questions) + NUM_TOKENS
    memory = str(2 * longest * KV_BYTES_PER_TOKEN)
    with serving(folder, "--max-model-len", str(longest), "--kv-memory", memory) as system:
        ask_all(system, questions * 3)


def test_answers_survive_the_death_of_a_language_model(
    folder: Path, questions: list[Question]
) -> None:
    asked = questions * 4
    with serving(folder, "--llm", "2") as system:
        victims = [system.members("llm")[0].pid]

        def stream(number: int) -> list[int]:
            token_ids: list[int] = []
            body = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True}
            for event in system.stream(asked[number].messages, **body):
                assert "error" not in event, event
                for choice in event["choices"]:
                    token_ids += choice.get("token_ids", [])
                if number == 0 and token_ids and victims:
                    os.kill(victims.pop(), signal.SIGKILL)
            return token_ids

        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(stream, range(len(asked))))
        assert found == [question.answer for question in asked]
        assert system.logged(event="retrying"), "the victim held an answer"
