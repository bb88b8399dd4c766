"""The vocabulary of an uncased BERT: equal to the published tokenizer."""

from pathlib import Path

import pytest

from common.checkpoint import BadCheckpoint
from common.vocabulary.wordpiece import read_wordpiece
from tests.golden import GoldenCase

FILE = GoldenCase("vqa_base", "vlmo").checkpoint / "vocab.txt"
TEXTS = (
    "What color is the circle?",
    "  TWO\tdogs\n playing... (ball)!  ",
    "Ünprintable café naïve",
    "图片 red中有",
    "unprintable" * 12,
    "a\u0000b\ufffdc \u200d d",
    "don't 3.14 x_y 🙂",
    "",
)


def test_texts_become_the_tokens_of_the_reference() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertTokenizer(vocab=str(FILE), vocab_file=str(FILE))
    vocabulary = read_wordpiece(FILE)
    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False)
        assert vocabulary.encode(text, frozenset()) == expected, text


def test_users_cannot_write_special_tokens() -> None:
    vocabulary = read_wordpiece(FILE)
    separator = vocabulary.id_of("[SEP]")
    assert vocabulary.encode("a [SEP]").count(separator or 0) == 1
    assert separator not in vocabulary.encode("a [SEP]", frozenset())


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"[PAD]\n[UNK]\n[CLS]\na\n", "lacks \\[SEP\\]"), (b"\xff\xfe", "not UTF-8"), (b"", "lacks")],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=words):
        read_wordpiece(file)
