"""Prompts and items of any family: token ids, placeholders, and names of content."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from common.chat import ChatOptions
from common.checkpoint import open_checkpoint
from common.errors import InvalidRequest, UnreadableImage
from services.preprocess.prepared import PreparedItem
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.prompts import Piece, PromptParts
from tests.preprocess.builders import create_preprocessor
from tests.preprocess.cases import CASES, checkpoint_path, encoded, expected, noise


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    return create_preprocessor(open_checkpoint(checkpoint_path("a_image")))


def image_of(preprocessor: Preprocessor, height: int, width: int) -> PreparedItem:
    return preprocessor.prepare_item("image", encoded(noise(height, width)))


@pytest.mark.parametrize("case", CASES)
def test_golden_texts_tokenize_as_in_the_reference(case: str) -> None:
    preprocessor = create_preprocessor(open_checkpoint(checkpoint_path(case)))
    probes = expected(case)["tokenizer_probes"]
    assert probes
    for probe in probes:
        assert preprocessor.encode([Piece(probe["text"])]).tolist() == probe["ids"]


def test_equal_pixels_have_one_hash_in_any_file_format(preprocessor: Preprocessor) -> None:
    rgb = noise(60, 90)
    png, webp = (
        preprocessor.prepare_item("image", encoded(rgb, format, lossless=True))
        for format in ("PNG", "WEBP")
    )
    small = preprocessor.prepare_item("image", encoded(rgb, "PNG", compress_level=0))
    assert png.mm_hash == webp.mm_hash == small.mm_hash
    assert len(bytes.fromhex(png.mm_hash)) == 32


def hash_of(preprocessor: Preprocessor, rgb: np.ndarray) -> str:
    return preprocessor.prepare_item("image", encoded(rgb)).mm_hash


def test_other_pixels_shapes_limits_and_models_have_other_hashes(
    preprocessor: Preprocessor,
) -> None:
    rgb = noise(60, 90)
    changed = rgb.copy()
    changed[30, 40, 1] ^= 128  # a lesser change may vanish when the image is resized
    checkpoint = preprocessor.checkpoint
    limited = create_preprocessor(checkpoint, max_pixels=3136)
    other = create_preprocessor(open_checkpoint(checkpoint_path("d_text")))
    hashes = [
        hash_of(preprocessor, rgb),
        hash_of(preprocessor, changed),
        hash_of(preprocessor, rgb.reshape(90, 60, 3)),
        hash_of(limited, rgb),
        hash_of(other, rgb),
    ]
    assert len(set(hashes)) == 5


def test_max_model_len_is_the_models_or_less() -> None:
    checkpoint = open_checkpoint(checkpoint_path("a_image"))
    assert create_preprocessor(checkpoint).max_model_len == 4096
    assert create_preprocessor(checkpoint, max_model_len=100).max_model_len == 100
    for refused in (4097, 0):
        with pytest.raises(
            ValueError, match=f"max_model_len is {refused}, but the model's context is 4096"
        ):
            create_preprocessor(checkpoint, max_model_len=refused)


@pytest.mark.parametrize(
    ("data", "error"), [(b"x", UnreadableImage), (encoded(noise(1, 201)), InvalidRequest)]
)
def test_unusable_images_are_refused_by_name(
    preprocessor: Preprocessor, data: bytes, error: type
) -> None:
    with pytest.raises(error) as caught:
        preprocessor.prepare_item("image", data)
    assert type(caught.value) is error


def token_ids_of(preprocessor: Preprocessor, content: Any) -> np.ndarray:
    """Return the token ids of one message of a user."""
    return preprocessor.encode(preprocessor.render([{"role": "user", "content": content}]))


def test_token_ids_are_taken_as_they_are(preprocessor: Preprocessor) -> None:
    found = preprocessor.check_token_ids(np.array([513, preprocessor.placeholder_id, 0, 543]))
    assert found.tolist() == [513, 524, 0, 543]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 544], "token id 544 is outside the model's vocabulary of 544"),
        ([-1], "token id -1"),
        ([], "empty"),
    ],
)
def test_token_ids_that_are_not_the_models_are_refused(
    preprocessor: Preprocessor, ids: list[int], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        preprocessor.check_token_ids(np.array(ids, dtype=np.int64))


def test_half_a_surrogate_pair_is_refused(preprocessor: Preprocessor) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        token_ids_of(preprocessor, "\ud83d")


def test_a_text_far_beyond_the_context_is_refused_before_it_is_tokenized() -> None:
    short = create_preprocessor(open_checkpoint(checkpoint_path("a_image")), max_model_len=10)
    assert len(short.encode([Piece("a" * 160)])) == 160
    with pytest.raises(InvalidRequest, match=r"is 10 tokens\. Your prompt has 161 characters"):
        short.encode([Piece("a" * 161)])


def test_placeholders_must_match_the_images(preprocessor: Preprocessor) -> None:
    image = image_of(preprocessor, 56, 56)
    two = token_ids_of(preprocessor, [{"type": "image"}, {"type": "image"}])
    with pytest.raises(InvalidRequest, match="2 image placeholders for 1 images"):
        preprocessor.expand(two, [image])
    with pytest.raises(InvalidRequest, match="2 image placeholders for 3 images"):
        preprocessor.expand(two, [image] * 3)
    assert preprocessor.expand(two, [image] * 2).placeholders[:, 1].sum() == 8


def test_a_placeholder_too_many_in_a_raw_prompt_is_refused(preprocessor: Preprocessor) -> None:
    token_ids = preprocessor.encode([Piece("<|image_pad|> what is <|image_pad|>?")])
    with pytest.raises(InvalidRequest, match=r"leave <\|image_pad\|> out of the text"):
        preprocessor.expand(token_ids, [image_of(preprocessor, 56, 56)])


def changed_tokenizer(folder: Path, **changes: Any) -> Preprocessor:
    """A preprocessor of a model whose tokenizer.json was changed."""
    shutil.copytree(checkpoint_path("a_image"), folder / "model")
    file = folder / "model" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return create_preprocessor(open_checkpoint(folder / "model"))


def test_the_tokenizers_own_padding_and_truncation_are_switched_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_path("a_image") / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    assert len(tokenizer.encode("a b c d e f").ids) == 2
    truncation = json.loads(tokenizer.to_str())["truncation"]
    assert (
        len(changed_tokenizer(tmp_path, truncation=truncation).encode([Piece("a b c d e f")])) > 2
    )


def test_a_tokenizer_that_would_add_tokens_adds_none_to_a_finished_prompt(
    preprocessor: Preprocessor, tmp_path: Path
) -> None:
    want = preprocessor.encode([Piece("a b")]).tolist()
    tokenizer = Tokenizer.from_file(str(checkpoint_path("a_image") / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 512)]
    )
    assert tokenizer.encode("a b").ids == [512, *want]
    post_processor = json.loads(tokenizer.to_str())["post_processor"]
    changed = changed_tokenizer(tmp_path, post_processor=post_processor)
    assert changed.encode([Piece("a b")]).tolist() == want


def test_thirty_images_in_ten_thousand_tokens_take_milliseconds(preprocessor: Preprocessor) -> None:
    image = image_of(preprocessor, 504, 504)
    token_ids = np.tile(np.array([1, 2, 521, preprocessor.placeholder_id, 522]), 30)
    started = time.perf_counter()
    found = preprocessor.expand(token_ids, [image] * 30)
    assert time.perf_counter() - started < 0.5
    assert found.num_tokens == 30 * (4 + 324)


def test_a_family_may_say_messages_by_itself(
    preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat_prompt(messages: list[dict[str, Any]], options: ChatOptions) -> PromptParts:
        return [7, Piece(messages[0]["content"], frozenset()), 8]

    monkeypatch.setattr(preprocessor.rules, "chat_prompt", chat_prompt)
    name = preprocessor.placeholder
    found = preprocessor.encode(preprocessor.render([{"role": "user", "content": f"a{name}"}]))
    assert (found[0], found[-1]) == (7, 8)
    assert preprocessor.placeholder_id not in found
    with pytest.raises(InvalidRequest, match="role"):
        preprocessor.render([{"role": "nobody", "content": ""}])
