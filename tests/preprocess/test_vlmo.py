"""VLMo's prompts and images, equal to the published code's."""

import numpy as np
import pytest

from common.checkpoint import open_checkpoint
from common.errors import InvalidRequest
from common.messages import Embeddings, Failed, ItemKind, Prompt
from services.preprocess import families
from services.preprocess.families import ItemLimits
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.prompts import Piece
from tests.golden import GoldenCase, max_difference
from tests.preprocess.builders import LLM, Preprocess, abort, arrived, rejected, reserved, submit

CASES = ("vqa_base", "vqa_base_plus", "retrieval_base")
SIDE = 4
PATCH = 16
TEXT_LEN = 40
PICTURE = GoldenCase("vqa_base", "vlmo").inputs / "a.png"
IMAGE = {"type": "image"}


def open_case(name: str) -> Preprocessor:
    checkpoint = open_checkpoint(GoldenCase(name, "vlmo").checkpoint)
    return Preprocessor(checkpoint, families.load(checkpoint))


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def encode(preprocessor: Preprocessor, *parts: dict[str, str]) -> list[int]:
    messages = [{"role": "user", "content": list(parts)}]
    return preprocessor.encode(preprocessor.render(messages)).tolist()


@pytest.mark.parametrize("name", CASES)
def test_texts_become_the_tokens_of_the_reference(name: str) -> None:
    case = GoldenCase(name, "vlmo")
    preprocessor = open_case(name)
    image = [] if name == "retrieval_base" else [IMAGE]
    assert len(case.expected["texts"]) > 1
    for number, content in enumerate(case.expected["texts"]):
        found = encode(preprocessor, *image, text(content))
        assert found[:TEXT_LEN] == case.tensors["text_ids"][number].tolist()
        kinds: list[ItemKind] = ["image" for _ in image]
        assert len(preprocessor.find_placeholders(np.array(found), kinds)) == len(image)


@pytest.mark.parametrize("name", CASES)
def test_images_become_the_pixels_of_the_reference(name: str) -> None:
    case = GoldenCase(name, "vlmo")
    preprocessor = open_case(name)
    files = sorted(case.inputs.glob("*.png"))
    assert len(files) > 1
    for file, expected in zip(files, case.tensors["image_pixels"], strict=True):
        item = preprocessor.prepare_item("image", file.read_bytes())
        cells = item.patches().reshape(SIDE, SIDE, 3, PATCH, PATCH).transpose(2, 0, 3, 1, 4)
        rgb = cells.reshape(3, SIDE * PATCH, SIDE * PATCH)
        assert max_difference((rgb / 255 - 0.5) / 0.5, expected) < 1e-6
        assert item.num_tokens == item.num_patches == SIDE**2


def test_the_image_stands_behind_the_text_and_the_prompt_is_whole() -> None:
    preprocessor = open_case("vqa_base")
    item = preprocessor.prepare_item("image", PICTURE.read_bytes())
    prompt = preprocessor.expand(np.array(encode(preprocessor, IMAGE, text("what"))), [item])
    assert prompt.whole and prompt.placeholders.tolist() == [[TEXT_LEN + 1, SIDE**2]]


def test_a_user_cannot_write_special_tokens() -> None:
    preprocessor = open_case("retrieval_base")
    separator = preprocessor.vocabulary.id_of("[SEP]")
    assert encode(preprocessor, text("a [SEP] b")).count(separator) == 1


@pytest.mark.parametrize(
    ("name", "parts", "words"),
    [
        ("vqa_base", [text("what?")], "one image and one text"),
        ("vqa_base", [IMAGE], "one image and one text"),
        ("vqa_base", [IMAGE, IMAGE, text("what?")], "one image and one text"),
        ("retrieval_base", [IMAGE, text("what?")], "either one image or one text"),
        ("retrieval_base", [text("a"), text("b")], "either one image or one text"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    name: str, parts: list[dict[str, str]], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        encode(open_case(name), *parts)


def test_a_conversation_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="one user message"):
        open_case("vqa_base").render([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    ("num_before", "num_after"), [(TEXT_LEN, 0), (0, TEXT_LEN + 1), (TEXT_LEN + 2, 0)]
)
def test_token_ids_of_another_form_are_refused(num_before: int, num_after: int) -> None:
    preprocessor = open_case("vqa_base")
    item = preprocessor.prepare_item("image", PICTURE.read_bytes())
    placeholder = preprocessor.placeholder_ids["image"]
    token_ids = np.array([*[5] * num_before, placeholder, *[5] * num_after])
    with pytest.raises(InvalidRequest, match="chat messages only"):
        preprocessor.expand(token_ids, [item])


class Direct(Preprocess):
    """Preprocess of a model without a tower, with one request that has room for its image."""

    def __init__(self) -> None:
        super().__init__(preprocessor=open_case("vqa_base"))
        self.item = self.worker._preprocessor.prepare_item("image", PICTURE.read_bytes())
        sent = self.play(submit("r", PICTURE.read_bytes(), task="classify"))
        (self.prompt,) = (m for _, m in sent if isinstance(m, Prompt))
        self.sent = self.play(reserved("r"))


def test_items_go_to_the_language_group_itself_once_it_has_room() -> None:
    direct = Direct()
    assert (direct.prompt.task, direct.prompt.whole) == ("classify", True)
    ((receiver, embeddings),) = direct.sent
    assert receiver == LLM.id and isinstance(embeddings, Embeddings)
    assert embeddings.mm_hash == direct.item.mm_hash
    assert (embeddings.embeddings.numpy() == direct.item.patches()).all()
    assert direct.member.missing == [], "it waits for no vision replica"
    assert direct.play(reserved("r")) == [], "it is sent once"
    direct.play(arrived(0))
    assert direct.encoded == ["r"] and direct.holds_nothing


def test_an_item_that_the_group_refuses_ends_its_request() -> None:
    direct = Direct()
    sent = direct.play(rejected(0))
    assert [(m.code, m.item) for _, m in sent if isinstance(m, Failed)] == [("Internal", 0)]
    assert direct.holds_nothing


def test_an_abort_frees_an_item_that_is_on_its_way() -> None:
    direct = Direct()
    assert direct.play(abort("r")) == [] and direct.holds_nothing
    assert direct.play(arrived(0), rejected(0)) == []


def test_what_another_head_would_do_is_refused() -> None:
    preprocess = Preprocess(preprocessor=open_case("vqa_base"))
    sent = preprocess.play(submit("r", PICTURE.read_bytes(), task="embed"))
    (failed,) = (m for _, m in sent if isinstance(m, Failed))
    assert "cannot embed, it can classify" in failed.message


def test_limits_of_pixels_that_no_image_keeps_are_refused() -> None:
    checkpoint = open_checkpoint(GoldenCase("vqa_base", "vlmo").checkpoint)
    with pytest.raises(ValueError, match="64 x 64"):
        families.load(checkpoint, ItemLimits(max_pixels=100))


def test_a_text_by_itself_is_not_padded() -> None:
    preprocessor = open_case("vqa_base")
    assert preprocessor.encode([Piece("")], is_chat=False).tolist() == []
    found = preprocessor.encode([Piece("red [SEP]")], is_chat=False).tolist()
    assert found == preprocessor.vocabulary.encode("red [SEP]") and len(found) > 1
