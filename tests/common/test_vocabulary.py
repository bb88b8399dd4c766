"""One vocabulary from three kinds of file: ids, bytes, special tokens, and what damages a file."""

import base64
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from common.checkpoint import BadCheckpoint, Checkpoint, open_checkpoint
from common.families import FAMILIES, Family
from common.families.family import TiktokenRules
from common.vocabulary import Vocabulary, open_vocabulary
from common.vocabulary.protobuf import BadProtobuf, read_fields
from common.vocabulary.sentencepiece import ALL_SPACES, read_sentencepiece
from common.vocabulary.tiktoken import read_tiktoken
from common.vocabulary.vocabulary import MAX_TOKEN_BYTES
from tests import golden, golden_vocabularies
from tests.golden_vocabularies import CASES, QWEN, SENTENCEPIECE, expected, vocabulary

TINY_OCR = Path(__file__).parents[2] / "models" / "tiny-ocr"
EVERYTHING = TiktokenRules(r"[\s\S]+", ())
"""The whole text is one piece."""


@pytest.mark.parametrize("case", CASES)
def test_texts_become_the_references_tokens(case: str) -> None:
    probes = expected(case)["texts"]
    assert len(probes) > 20
    for probe in probes:
        assert vocabulary(case).encode(probe["text"]) == probe["ids"], probe["text"]


@pytest.mark.parametrize("case", ["qwen_vl", "wemm"])
def test_special_tokens_that_a_text_may_not_name_are_text(case: str) -> None:
    found = vocabulary(case)
    names = list(expected(case)["special_tokens"])[:2]
    text = f"a{names[0]}b{names[1]}c"
    ids = [found.id_of(name) for name in names]
    plain = found.encode(text, frozenset())
    assert b"".join(map(found.token_bytes, plain)) == text.encode()
    assert not found.special_ids.intersection(plain)
    one = found.encode(text, frozenset(names[1:]))
    assert ids[1] in one and ids[0] not in one
    assert one[-1] == found.encode("c")[-1]
    assert found.encode(text, frozenset(names)) == found.encode(text)


def test_a_text_that_continues_a_line_gets_no_space_in_front() -> None:
    found = vocabulary("sentencepiece_bpe_prefix")
    assert b"".join(map(found.token_bytes, found.encode("ab"))) == b" ab"
    assert b"".join(map(found.token_bytes, found.encode("ab", continues=True))) == b"ab"


@pytest.mark.parametrize("case", golden.CASES)
def test_texts_become_the_tokens_of_transformers(case: str) -> None:
    found = open_vocabulary(open_checkpoint(golden.GoldenCase(case).checkpoint))
    probes = golden.GoldenCase(case).expected["tokenizer_probes"]
    assert probes
    for probe in probes:
        assert found.encode(probe["text"]) == probe["ids"]


@pytest.mark.parametrize("case", ["qwen_vl", "wemm"])
def test_special_tokens_have_the_references_ids(case: str) -> None:
    found = vocabulary(case)
    wanted: dict[str, int] = expected(case)["special_tokens"]
    assert wanted
    for token, token_id in wanted.items():
        assert found.id_of(token) == token_id and found.token_of(token_id) == token
        assert found.encode(f"a{token}")[-1] == token_id
        assert found.token_bytes(token_id) == token.encode()
        assert found.visible_bytes(token_id, skip_special_tokens=True) == b""
        assert token_id in found.special_ids


def test_unused_ids_have_no_bytes_and_no_name() -> None:
    found = vocabulary("qwen_vl")
    assert found.size == 303 + len(QWEN.special_tokens)
    assert found.token_bytes(found.size) == b"" and found.token_of(found.size) is None
    assert found.id_of("no such token") is None


def test_the_family_names_the_vocabulary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for case, file, rules in (
        ("qwen_vl", "qwen.tiktoken", QWEN),
        ("wemm", "tokenizer.model", None),
    ):
        family: Family = FAMILIES["qwen2_5_vl"]
        monkeypatch.setattr(family, "vocabulary_file", file)
        monkeypatch.setattr(family, "tiktoken", rules)
        found = open_vocabulary(
            Checkpoint(golden_vocabularies.ROOT / case, {"model_type": "qwen2_5_vl"})
        )
        assert found.bytes_by_id == vocabulary(case).bytes_by_id


# Grammars


@pytest.mark.parametrize("case", CASES)
def test_llguidance_knows_the_same_tokens(case: str) -> None:
    found = vocabulary(case)
    theirs = LLTokenizer(found.grammar_tokenizer_json())
    # llguidance marks special tokens with the byte 0xFF. Alone it counts as one of them.
    ids = [id for id, data in found.bytes_by_id.items() if data != b"\xff"]
    assert [id for id in ids if theirs.is_special_token(id)] == sorted(found.special_ids)
    plain = set(ids) - found.special_ids
    assert all(theirs.decode_bytes([id]) == found.token_bytes(id) for id in plain)


@pytest.mark.parametrize("case", CASES)
def test_an_answer_that_follows_a_grammar_is_accepted(case: str) -> None:
    found = vocabulary(case)
    tokenizer = LLTokenizer(found.grammar_tokenizer_json())
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_regex(" ?[a-z]+"))
    assert matcher.validate_tokens(found.encode("token")) == len(found.encode("token"))
    assert matcher.validate_tokens(found.encode("7")[-1:]) == 0


@pytest.mark.parametrize("case", ["tiny-ocr", "qwen_vl", "wemm"])
def test_a_grammar_that_asks_for_the_name_of_a_special_token_gets_its_text(case: str) -> None:
    found = open_vocabulary(open_checkpoint(TINY_OCR)) if case == "tiny-ocr" else vocabulary(case)
    text = f"a{found.token_bytes(max(found.special_ids)).decode()}b"
    grammar = LLMatcher.grammar_from_regex(re.escape(text))
    matcher = LLMatcher(LLTokenizer(found.grammar_tokenizer_json()), grammar)
    data = b""
    while not matcher.is_stopped():
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        token_id = int(np.flatnonzero(np.unpackbits(mask, bitorder="little"))[0])
        assert token_id not in found.special_ids
        assert matcher.consume_token(token_id), matcher.get_error()
        data += found.token_bytes(token_id)
    assert data.decode().strip() == text


# tiktoken


def tiktoken_file(folder: Path, tokens: list[bytes], end: bytes = b"\n") -> Path:
    file = folder / "x.tiktoken"
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    file.write_bytes(end.join(lines) + end)
    return file


BYTES = [bytes([byte]) for byte in range(256)]
MERGED = [b"aa", b"ab", b" a", b"aab", b"ba", b"aaa", b"bab", b" aab", b"abab", b"aaaa"]


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A vocabulary in which most texts can be cut in many ways."""
    return read_tiktoken(
        tiktoken_file(tmp_path_factory.mktemp("vocabulary"), BYTES + MERGED), EVERYTHING
    )


def join_by_rank(data: bytes, tokens: list[bytes]) -> list[int]:
    """tiktoken's rule: join the neighbours whose bytes have the lowest rank, the leftmost first."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if data in ranks:
        return [ranks[data]]
    parts = [data[i : i + 1] for i in range(len(data))]
    while True:
        joined = [
            (ranks[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in ranks
        ]
        if not joined:
            return [ranks[part] for part in parts]
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=500)
@given(st.text("ab ", min_size=1, max_size=16))
def test_tokens_are_joined_as_in_tiktoken(repetitive: Vocabulary, text: str) -> None:
    assert repetitive.encode(text) == join_by_rank(text.encode(), BYTES + MERGED)


def test_lines_may_end_as_in_windows(tmp_path: Path) -> None:
    file = tmp_path / "x.tiktoken"
    original = golden_vocabularies.vocabulary_file("qwen_vl").read_bytes()
    file.write_bytes(original.replace(b"\n", b"\r\n") + b"\r\n")
    assert read_tiktoken(file, QWEN).bytes_by_id == vocabulary("qwen_vl").bytes_by_id


def test_texts_are_normalized_before_they_are_split() -> None:
    found = vocabulary("qwen_vl")
    assert found.encode("e\u0301") == found.encode("\u00e9")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a token in base64 and its rank"),
        (b"IQ== one\n", "is not a token in base64"),
        (b"I*Q= 0\n", "is not a token in base64"),
        (b"IQ== 0\nIg== 2\n", "it lacks ranks"),
        (b"IQ== 0\nIg== 1\n", "it lacks single bytes"),
        (b"", "it lacks single bytes"),
    ],
)
def test_a_damaged_tiktoken_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=rf"x\.tiktoken .*{words}.*download it again"):
        read_tiktoken(tmp_path / "x.tiktoken", QWEN)


def test_a_tiktoken_file_of_long_tokens_does_not_hold_the_process(tmp_path: Path) -> None:
    """Looking for the parts of one token of a megabyte takes hours."""
    lines = [base64.b64encode(b"a" * (MAX_TOKEN_BYTES + 1)) + b" 0"]
    (tmp_path / "x.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(BadCheckpoint, match="or one of more than 512 bytes"):
        read_tiktoken(tmp_path / "x.tiktoken", QWEN)


# SentencePiece


@pytest.fixture
def wemm(tmp_path: Path) -> Path:
    """A folder with a model file and the files next to it."""
    return shutil.copytree(golden_vocabularies.ROOT / "wemm", tmp_path / "wemm")


def test_special_tokens_come_from_either_file(wemm: Path) -> None:
    (wemm / "tokenizer_config.json").unlink()
    found = read_sentencepiece(wemm / "tokenizer.model")
    original = vocabulary("wemm")
    assert found.size == original.size + 6, "six tokens have no piece of their name: they follow"
    ids = [found.id_of(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert ids == [original.size, original.size + 1]
    assert found.encode("a<|im_end|>")[-1] == ids[1] in found.special_ids
    (wemm / "special_tokens_map.json").unlink()
    assert read_sentencepiece(wemm / "tokenizer.model").special_ids == {0, 1, 2}


def test_special_tokens_may_be_objects(wemm: Path) -> None:
    (wemm / "tokenizer_config.json").unlink()
    tokens = {"eos_token": {"content": "<end>"}, "additional_special_tokens": [{"content": "</s>"}]}
    (wemm / "special_tokens_map.json").write_text(json.dumps(tokens))
    found = read_sentencepiece(wemm / "tokenizer.model")
    assert found.id_of("<end>") == found.size - 1 in found.special_ids and 2 in found.special_ids


def entry(content: str) -> dict[str, Any]:
    return {"content": content, "special": True}


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"600": entry("<far>")}, "an id has no token"),
        ({"509": entry("<s>")}, "a token has two ids"),
        ({"509": {"content": "x"}}, "malformed added_tokens_decoder"),
        ({"x": entry("<s>")}, "malformed added_tokens_decoder"),
        (["<s>"], "malformed added_tokens_decoder"),
        ({"99999999999": entry("<far>")}, "ids are from 0 to"),
        ({"-1": entry("<s>")}, "ids are from 0 to"),
        ({"509": entry(5)}, "its tokens are texts"),  # type: ignore[arg-type]
    ],
)
def test_special_tokens_that_cannot_be_are_refused(wemm: Path, added: Any, words: str) -> None:
    (wemm / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(BadCheckpoint, match=rf"tokenizer_config\.json.*{words}"):
        read_sentencepiece(wemm / "tokenizer.model")


@pytest.mark.parametrize("named", [{"eos_token": 5}, {"additional_special_tokens": [["x"]]}])
def test_names_of_special_tokens_that_are_no_texts_are_refused(wemm: Path, named: Any) -> None:
    (wemm / "special_tokens_map.json").write_text(json.dumps(named))
    with pytest.raises(BadCheckpoint, match="names a token that is not a text"):
        read_sentencepiece(wemm / "tokenizer.model")


def piece(text: bytes, *fields: bytes) -> bytes:
    """Return a piece of a model file, as field 1 of the model."""
    body = b"\x0a" + varint(len(text)) + text + b"".join(fields)
    return b"\x0a" + varint(len(body)) + body


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80, number >> 7]) if number > 0x7F else bytes([number])


def test_how_many_spaces_of_an_answer_are_the_tokenizers() -> None:
    counts = {case: vocabulary(case).max_stripped_spaces for case in CASES}
    assert counts == {
        "qwen_vl": 0,
        "wemm": 0,
        "sentencepiece_bpe_prefix": 1,
        "sentencepiece_bpe_trim": ALL_SPACES,
        "sentencepiece_unigram": 1,
    }


def cut_off(data: bytes) -> bytes:
    return data[:-3]


def word_model(data: bytes) -> bytes:
    """The same model with another type: field 3 of the trainer's message, which is field 2."""
    return data + b"\x12\x02\x18\x03"


def unknown_model(data: bytes) -> bytes:
    return data + b"\x12\x02\x18\x09"


@pytest.mark.parametrize("case", SENTENCEPIECE)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_off, "not a SentencePiece model: it is cut off; download it again"),
        (lambda data: b"version https://git-lfs", "not a SentencePiece model"),
        (lambda data: b"", "it has no pieces"),
        (lambda data: b"\x0a\x02\x08\x01", "field 1 is a number"),
        (lambda data: b"\x08\x01", "a number where a message is expected"),
        (lambda data: b"\x0a\x04\x0a\x02\xff\xff", "not a SentencePiece model"),
        (lambda data: b"\x0a\x03\x12\x01x", "the score of a piece"),
        (word_model, "type WORD, which is not supported; supported: BPE, UNIGRAM"),
        (unknown_model, "not a SentencePiece model"),
        (lambda data: piece(b"a" * 513), "a piece is longer than 512"),
        (lambda data: piece(b"a", b"\x15\x00\x00\xc0\x7f"), "its score is no number"),
        (lambda data: piece(b"<0xXY>", b"\x18\x06"), "a byte piece is not of the form"),
    ],
)
def test_a_damaged_model_file_is_refused(
    case: str, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(damage(golden_vocabularies.vocabulary_file(case).read_bytes()))
    with pytest.raises(BadCheckpoint, match=rf"tokenizer\.model is .*{words}"):
        read_sentencepiece(file)


@settings(max_examples=500)
@given(st.binary(max_size=40))
def test_any_bytes_are_fields_or_refused(data: bytes) -> None:
    try:
        fields = list(read_fields(data))
    except BadProtobuf:
        return
    assert sum(len(value) for _, value in fields if isinstance(value, bytes)) <= len(data)


def test_every_wire_type_is_read() -> None:
    data = b"\x08\xac\x02" + b"\x11" + bytes(8) + b"\x1a\x02ab" + b"\x25" + bytes(4)
    assert list(read_fields(data)) == [(1, 300), (2, bytes(8)), (3, b"ab"), (4, bytes(4))]


# tokenizer.json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"{}", "decoder None, which is not supported yet"),
        (b'{"decoder": {"type": "ByteLevel"}}', r"is malformed \(KeyError\): download it again"),
        (b'{"decoder": {"type": "ByteLevel"}, "model": []}', "is malformed"),
        (
            b'{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": 1e9}}}',
            "the id 1000000000",
        ),
        (b'{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": -1}}}', "the id -1"),
        (b'{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": 99999999}}}', "99999999"),
        (b'{"decoder": {"type": "ByteLevel"}, "model": {"vocab": [1]}}', "is malformed"),
        (
            b'{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {}}, "added_tokens": '
            b'[{"id": 0, "content": 5, "special": true}]}',
            "the token 5",
        ),
        (b'{"decoder": "ByteLevel"}', "is malformed"),
        (b'{"decoder":' * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    model = shutil.copytree(golden.GoldenCase("a_image").checkpoint, tmp_path / "model")
    (model / "tokenizer.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=rf"tokenizer\.json .*{words}"):
        open_vocabulary(open_checkpoint(model))


def test_what_the_tokenizers_package_refuses_is_a_bad_checkpoint() -> None:
    found = replace(open_vocabulary(open_checkpoint(TINY_OCR)), tokenizer_json="{}")
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json is damaged, or needs a newer"):
        found.encode("a")


def test_markup_stays_in_an_answer_without_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(golden.GoldenCase("a_image").checkpoint)
    name = "<|vision_start|>"
    monkeypatch.setattr(type(checkpoint.family), "markup_tokens", (name, "no such token"))
    found = open_vocabulary(checkpoint)
    marker = found.id_of(name)
    assert marker is not None and found.markup_ids == {marker}
    assert found.visible_bytes(marker, skip_special_tokens=True) == name.encode()
    end = found.id_of("<|im_end|>")
    assert end is not None and found.visible_bytes(end, skip_special_tokens=True) == b""
