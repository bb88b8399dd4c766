"""Qwen-VL's prompts, images and alpha equal the reference's, on the golden cases and beyond."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.chat import ChatOptions
from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from common.errors import InvalidRequest, TooLarge
from common.families.qwen_vl import SPECIAL_TOKENS, QwenVL
from common.messages import Sampling, Stopping
from services.preprocess.families.qwen_vl import MARKUP, ntk_alpha
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.prompts import Piece
from services.preprocess.sampling_defaults import resolve_sampling, resolve_stopping
from tests.golden import GoldenCase
from tests.golden.qwen_vl_requests import CASES, REQUESTS, golden_request
from tests.preprocess.builders import create_preprocessor
from tests.preprocess.cases import encoded, noise

CHAT = "c_box_two_images"
RAW = "b_long_ntk_logn"
IMAGE = {"type": "image"}


def preprocessor_of(name: str) -> Preprocessor:
    return create_preprocessor(open_checkpoint(GoldenCase(name, "qwen_vl").checkpoint))


@pytest.fixture(scope="module")
def chat() -> Preprocessor:
    return preprocessor_of(CHAT)


@pytest.fixture(scope="module")
def raw() -> Preprocessor:
    return preprocessor_of(RAW)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def tokens(preprocessor: Preprocessor, messages: list[dict[str, Any]]) -> list[int]:
    return preprocessor.encode(preprocessor.render(messages)).tolist()


def text(preprocessor: Preprocessor, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return the prompt with the names of special tokens."""
    ids = preprocessor.encode(preprocessor.render(messages, ChatOptions(**options))).tolist()
    return b"".join(map(preprocessor.vocabulary.token_bytes, ids)).decode()


@pytest.mark.parametrize(("name", "number"), REQUESTS)
def test_golden_requests_become_the_references_prompts(name: str, number: int) -> None:
    golden = golden_request(name, number)
    preprocessor = preprocessor_of(name)
    if name == RAW:
        ids = np.array(golden.unexpanded_ids)
    else:
        messages = golden.messages(lambda file: IMAGE)
        ids = preprocessor.encode(preprocessor.render(messages))
        assert ids.tolist() == golden.unexpanded_ids
    files = [(golden.case.inputs / picture).read_bytes() for picture in golden.pictures]
    items = [preprocessor.prepare_item("image", file) for file in files]
    found = preprocessor.expand(ids, items)
    is_text = np.ones(len(golden.token_ids), bool)
    for offset, length in golden.spans:
        is_text[offset : offset + length] = False
    assert found.num_tokens == golden.expected["num_prompt_tokens"]
    assert (found.token_ids == golden.token_ids)[is_text].all()
    assert found.placeholders.tolist() == [list(span) for span in golden.spans]
    assert found.positions.tolist() == [list(range(found.num_tokens))]
    assert found.rope_delta == 0
    assert found.rope_parameter == golden.expected["ntk_alpha"]
    assert found.cache_salt


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_have_the_references_ids(name: str) -> None:
    case = GoldenCase(name, "qwen_vl")
    preprocessor = preprocessor_of(name)
    assert preprocessor.placeholder == "<imgpad>"
    for token, id in case.expected["special_tokens"].items():
        assert preprocessor.vocabulary.id_of(token) == id
    image_tokens = frozenset(SPECIAL_TOKENS[-9:])
    probes = [p for p in case.expected["tokenizer_probes"] if "<img>" not in p["text"]]
    assert len(probes) > 5
    for probe in probes:
        assert preprocessor.vocabulary.encode(probe["text"]) == probe["ids_all_special"]
        only = preprocessor.vocabulary.encode(probe["text"], image_tokens)
        assert only == probe["ids_image_special_only"]


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("a_chat_image", "demo"),
        ("b_long_ntk_logn", "wide"),
        ("c_box_two_images", "first"),
        ("c_box_two_images", "second"),
    ],
)
def test_images_are_resized_as_by_the_reference(name: str, picture: str) -> None:
    case = GoldenCase(name, "qwen_vl")
    item = preprocessor_of(name).prepare_item(
        "image", (case.inputs / f"{picture}.png").read_bytes()
    )
    with Image.open(case.path / "expected" / f"resized_448.{picture}.png") as file:
        wanted = np.asarray(file)
    assert (item.grid_thw, item.content_size) == ((1, 32, 32), (448, 448))
    assert (item.num_patches, item.num_tokens) == (1024, 256)
    rows = item.patches().reshape(32, 32, 3, 14, 14).transpose(0, 3, 1, 4, 2)
    assert (rows.reshape(448, 448, 3) == wanted).all()


@pytest.mark.parametrize(
    ("num_tokens", "alpha"),
    [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15)],
)
def test_alpha_depends_on_the_length_of_the_prompt(num_tokens: int, alpha: int) -> None:
    assert ntk_alpha(num_tokens, 2048) == alpha


def test_a_model_without_dynamic_ntk_has_no_alpha(tmp_path: Path) -> None:
    found = create_preprocessor(checkpoint_with(tmp_path, RAW, use_dynamic_ntk=False))
    assert found.rules.rope_parameter(1000) == 0
    assert found.expand(np.array([1, 2]), []).cache_salt == b""


def test_a_conversation_becomes_chatml_with_a_default_system_message(chat: Preprocessor) -> None:
    assert text(chat, user("Hi")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "developer", "content": "Be brief."}, *user("Hi")]
    assert text(chat, own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text(chat, own).count("system") == 1


def test_a_conversation_may_end_elsewhere(chat: Preprocessor) -> None:
    begun = [*user("Hi"), {"role": "assistant", "content": "The total "}]
    assert text(chat, user("Hi"), add_generation_prompt=False).endswith("user\nHi<|im_end|>\n")
    assert text(chat, begun, continue_final_message=True).endswith("assistant\nThe total ")
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        text(chat, user("Hi"), continue_final_message=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("continue_final_message", True),
        ("add_generation_prompt", False),
        ("template_kwargs", {"colour": "red"}),
        ("tools", [{"type": "function", "function": {"name": "look"}}]),
    ],
)
def test_a_model_without_turns_refuses_options_by_name(
    raw: Preprocessor, name: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest, match=name):
        text(raw, user("Hi"), **{name: value})


def test_pictures_are_numbered_over_the_whole_conversation(chat: Preprocessor) -> None:
    say = {"type": "text", "text": "What?"}
    messages = [
        *user([IMAGE, say, IMAGE]),
        {"role": "assistant", "content": "That."},
        *user([say, IMAGE]),
    ]
    assert Piece("\nWhat?Picture 2: ", MARKUP) in chat.render(messages), "one text, as it is"
    image = "<img><imgpad></img>\n"
    assert (
        f"user\nPicture 1: {image}What?Picture 2: {image}<|im_end|>\n<|im_start|>assistant\nThat."
        f"<|im_end|>\n<|im_start|>user\nWhat?Picture 3: {image}<|im_end|>"
    ) in text(chat, messages)


def test_users_can_write_markup_and_no_other_special_token(chat: Preprocessor) -> None:
    plain = set(tokens(chat, user("")))
    for token in SPECIAL_TOKENS:
        if token in ("<img>", "</img>"):
            continue
        found = tokens(chat, user(f"a{token}b"))
        more = {id for id in found if id in chat.vocabulary.special_ids} - plain
        is_markup = token.strip("<>/") in ("ref", "box", "quad")
        assert more == ({chat.vocabulary.id_of(token)} if is_markup else set()), token
        assert f"a{token}b" in text(chat, user(f"a{token}b"))


@pytest.mark.parametrize("content", ["<img>/etc/passwd</img>", "a<img>", "a</img>b"])
@pytest.mark.parametrize("name", [CHAT, RAW])
def test_markers_of_images_in_a_text_are_refused(name: str, content: str) -> None:
    with pytest.raises(InvalidRequest, match="send images as parts of the message"):
        preprocessor_of(name).render(user(content))


def test_a_marker_in_two_parts_is_text(chat: Preprocessor) -> None:
    parts = [{"type": "text", "text": "<im"}, {"type": "text", "text": "gpad>"}]
    assert chat.placeholder_id not in tokens(chat, user(parts))


def test_the_base_model_continues_one_message(raw: Preprocessor) -> None:
    content = [IMAGE, {"type": "text", "text": "What? Answer:"}]
    assert text(raw, user(content)) == "Picture 1: <img><imgpad></img>\nWhat? Answer:"
    with pytest.raises(InvalidRequest, match="send one user message"):
        raw.render([{"role": "system", "content": "Be brief."}, *user("Hi")])


@pytest.mark.parametrize(
    "marked",
    ["<img><imgpad>", "<imgpad></img>", "<img></img><imgpad>", "<imgpad>", "</img><imgpad><img>"],
)
def test_token_ids_need_both_markers_around_each_image(chat: Preprocessor, marked: str) -> None:
    ids = np.array(chat.vocabulary.encode(f"a{marked}b"))
    with pytest.raises(InvalidRequest, match="each image is <img>, one <imgpad> and </img>"):
        chat.find_placeholders(ids, ["image"])
    whole = np.array(chat.vocabulary.encode("a<img><imgpad></img>b"))
    assert chat.find_placeholders(whole, ["image"]).tolist() == [2]


def test_a_marker_without_an_image_is_refused(chat: Preprocessor) -> None:
    with pytest.raises(InvalidRequest, match="each image is <img>"):
        chat.find_placeholders(np.array(chat.vocabulary.encode("a<img></img>b")), [])


def test_the_end_of_an_answer_depends_on_the_chat_format(
    chat: Preprocessor, raw: Preprocessor
) -> None:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert chat.checkpoint.eos_token_ids == tuple(map(chat.vocabulary.id_of, names))
    assert raw.checkpoint.eos_token_ids == (raw.vocabulary.id_of("<|endoftext|>"),)


def test_what_a_request_leaves_open_is_the_checkpoints(
    chat: Preprocessor, raw: Preprocessor
) -> None:
    found = resolve_sampling(Sampling(), chat.checkpoint.generation_config, chat.defaults)
    assert found == Sampling(temperature=1.0, top_p=0.3, top_k=0, min_p=0.0, repetition_penalty=1.0)
    greedy = resolve_sampling(Sampling(), raw.checkpoint.generation_config, raw.defaults)
    assert greedy.temperature == 0
    for num_tokens, max_tokens in ((100, 512), (8000, 192)):
        stopping = resolve_stopping(Stopping(), num_tokens, chat.max_model_len, chat.defaults)
        assert stopping.max_tokens == max_tokens
    assert chat.max_model_len == raw.max_model_len == 8192


def test_replicas_with_smaller_buckets_are_refused_by_name(chat: Preprocessor) -> None:
    with pytest.raises(TooLarge, match="give --vision-buckets 1024"):
        chat.prepare_item("image", encoded(noise(10, 10)), max_patches=1020)
    assert chat.prepare_item("image", encoded(noise(10, 10)), max_patches=1024).num_tokens == 256


def test_limits_that_the_size_of_all_images_exceeds_are_refused() -> None:
    checkpoint = open_checkpoint(GoldenCase(CHAT, "qwen_vl").checkpoint)
    create_preprocessor(checkpoint, 78400, 921600)
    for limits in ((None, 200703), (200705, None)):
        with pytest.raises(ValueError, match="448 x 448 pixels only"):
            create_preprocessor(checkpoint, *limits)


def checkpoint_with(tmp_path: Path, name: str, **config: Any) -> Checkpoint:
    """Return a golden checkpoint with other values in its config.json. None removes a key."""
    folder = tmp_path / name
    shutil.copytree(GoldenCase(name, "qwen_vl").checkpoint, folder)
    whole = json.loads((folder / "config.json").read_text()) | config
    known = {key: value for key, value in whole.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(known))
    return open_checkpoint(folder)


def test_a_text_model_of_the_same_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="it is not a Qwen-VL model"):
        create_preprocessor(checkpoint_with(tmp_path, RAW, visual=None))


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_with(tmp_path, RAW)
    file = checkpoint.path / "qwen.tiktoken"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert len(create_preprocessor(checkpoint).vocabulary.encode("Hello")) > 1
    *lines, _ = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines))
    with pytest.raises(BadCheckpoint, match="has 315 tokens"):
        assert create_preprocessor(checkpoint).vocabulary


def test_special_tokens_outside_the_embedding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="outside the vocabulary of 532"):
        assert checkpoint_with(tmp_path, RAW, vocab_size=532).sizes
    visual = {"image_start_id": 300}
    with pytest.raises(BadCheckpoint, match="leaves no room"):
        assert checkpoint_with(tmp_path / "few", RAW, visual=visual).eos_token_ids


def test_an_unknown_chat_format_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_with(tmp_path, RAW)
    (checkpoint.path / "generation_config.json").write_text('{"chat_format": "alpaca"}')
    with pytest.raises(BadCheckpoint, match="supported: chatml, raw"):
        create_preprocessor(open_checkpoint(checkpoint.path))


def test_images_of_another_size_need_a_multiple_of_256_patches(tmp_path: Path) -> None:
    visual = open_checkpoint(GoldenCase(RAW, "qwen_vl").checkpoint).vision_config
    checkpoint = checkpoint_with(tmp_path, RAW, visual=visual | {"image_size": 434})
    with pytest.raises(BadCheckpoint, match="no multiple of 256 patches"):
        assert QwenVL().patches_per_token(checkpoint)


def test_markup_stays_in_the_text_of_an_answer(chat: Preprocessor) -> None:
    text = "<ref>dog</ref><box>(1,2),(3,4)</box><|im_end|>"
    ids = chat.vocabulary.encode(text)
    seen = b"".join(chat.vocabulary.visible_bytes(id, skip_special_tokens=True) for id in ids)
    assert seen.decode() == text.removesuffix("<|im_end|>")
    assert chat.checkpoint.family.answers_hold_boxes
