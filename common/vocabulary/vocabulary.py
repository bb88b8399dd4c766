"""The vocabulary of a model: text to token ids, and token ids to bytes."""

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.families.family import BadCheckpoint

MAX_TOKENS = 2**22
"""The most token ids. The largest vocabularies have a sixteenth of it."""
MAX_TOKEN_BYTES = 512
"""The longest token that is built from others. Looking for its parts takes quadratic time."""
UNWRITABLE = "\uffff{}\uffff"
"""A name that no text has: U+FFFF is not a character."""
ONE_MARK_PER_BYTE = "one_mark_per_byte"
"""The error handler of `codecs` that replaces each byte of a broken character by U+FFFD.

Python's own "replace" puts one mark in the place of all bytes of a cut-off character.
"""


def mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Handle a decoding error as SentencePiece does."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(ONE_MARK_PER_BYTE, mark_each_byte)


def pattern_of(token: dict[str, Any]) -> str:
    """Return a pattern that matches an added token as the tokenizer does."""
    before = r"\s*" if token.get("lstrip") else ""
    after = r"\s*" if token.get("rstrip") else ""
    name = f"({re.escape(token['content'])})"
    if token.get("single_word"):
        name = rf"(?<!\w){name}(?!\w)"
    return before + name + after


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a model. It does not depend on the kind of file that they were read from."""

    file: Path
    """The file that it was read from. Error messages name it."""
    tokenizer_json: str
    """The tokenizer as a tokenizer.json of Hugging Face describes it."""
    bytes_by_id: dict[int, bytes]
    """The bytes that each token adds to an answer. Special tokens have those of their name."""
    special_ids: frozenset[int]
    decode_errors: str = "replace"
    """The error handler of `codecs` for answers that are not UTF-8."""
    max_stripped_spaces: int = 0
    """How many spaces at the start of an answer are the tokenizer's, and not part of the text."""
    markup_ids: frozenset[int] = frozenset()
    """The special tokens that stay in an answer without special tokens."""

    def with_markup(self, names: Iterable[str]) -> "Vocabulary":
        """Return the vocabulary whose special tokens of these names stay in answers, too."""
        texts = {name.encode() for name in names}
        markup = {id for id in self.special_ids if self.bytes_by_id.get(id) in texts}
        return replace(self, markup_ids=self.markup_ids | markup)

    def grammar_tokenizer_json(self) -> str:
        """Return the tokenizer for answers that follow a grammar: no text names a special token.

        Otherwise, a grammar that asks for the text `<box>` would get the token of that name, which
        is not that text.
        """
        described = json.loads(self.tokenizer_json)
        added = [token for token in described["added_tokens"] if token["special"]]
        names = {token["content"]: UNWRITABLE.format(token["id"]) for token in added}
        for token in added:
            token["content"] = names[token["content"]]
        model = described["model"]
        if (unknown := model.get("unk_token")) is not None:
            model["unk_token"] = names.get(unknown, unknown)
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {names.get(name, name): id for name, id in vocab.items()}
        else:
            model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
        return json.dumps(described)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._open(self.tokenizer_json)

    @cached_property
    def _continuing_tokenizer(self) -> Tokenizer:
        """The tokenizer without the space that it puts in front of each text."""
        described = json.loads(self.tokenizer_json)
        normalizer = described["normalizer"]
        if normalizer and normalizer["type"] == "Sequence":
            steps = normalizer["normalizers"]
            normalizer["normalizers"] = [step for step in steps if step["type"] != "Prepend"]
        return self._open(json.dumps(described))

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        """The tokenizer of texts in which no name is a token. It shares the model with the other
        one, which takes long to read."""
        tokenizer = Tokenizer(self._tokenizer.model)
        if self._tokenizer.normalizer is not None:
            tokenizer.normalizer = self._tokenizer.normalizer
        if self._tokenizer.pre_tokenizer is not None:
            tokenizer.pre_tokenizer = self._tokenizer.pre_tokenizer
        return tokenizer

    @cached_property
    def _added(self) -> list[dict[str, Any]]:
        """The added tokens, which have names, as a tokenizer.json describes them."""
        added = json.loads(self.tokenizer_json).get("added_tokens") or []
        return [token for token in added if token["content"]]

    @cached_property
    def _names(self) -> re.Pattern[str]:
        """What matches the name of any added token, with the spaces that belong to it."""
        if not self._added:
            return re.compile(r"(?!)")
        added = sorted(self._added, key=lambda token: len(token["content"]), reverse=True)
        # Only where one can begin are all names tried: it makes the search ten times as fast.
        begins = rf"(?=[\s{re.escape(self.first_characters)}])"
        return re.compile(f"{begins}(?:{'|'.join(map(pattern_of, added))})")

    @cached_property
    def first_characters(self) -> str:
        """The characters that the names of added tokens begin with."""
        return "".join({token["content"][0] for token in self._added})

    def prepare_marked(self) -> None:
        """Make what `encode_marked` needs, for all processes that are forked from this one."""
        self.encode_marked("", self.first_characters)

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Return the token ids of a text in which a mark keeps names from being tokens.

        The mark is not part of the text. Names that it is not in are tokens, special or not.
        """
        token_ids: list[int] = []
        end = 0
        for name in self._names.finditer(text):
            token_ids += encode(self._plain_tokenizer, text[end : name.start()].replace(mark, ""))
            assert name.lastindex is not None
            token_id = self.id_of(name.group(name.lastindex))
            assert token_id is not None, f"{name.group()} is not a token of {self.file}"
            token_ids.append(token_id)
            end = name.end()
        return token_ids + encode(self._plain_tokenizer, text[end:].replace(mark, ""))

    def _open(self, tokenizer_json: str) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as e:
            raise BadCheckpoint(
                f"{self.file} is damaged, or needs a newer tokenizers package: {e}; "
                "download it again"
            ) from e
        # A file may ask for padding or truncation, which would change prompts silently.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @property
    def size(self) -> int:
        """The number of token ids, unused ids below the largest one included."""
        return max(self.bytes_by_id, default=-1) + 1

    def encode(
        self, text: str, special_tokens: frozenset[str] | None = None, continues: bool = False
    ) -> list[int]:
        """Return the token ids of a text.

        Parameters
        ----------
        special_tokens
            are those whose names in the text become these tokens; None for all. The names of the
            others are text. No special tokens are added.
        continues
            says that the text continues a line: a SentencePiece model puts no space in front of it.
        """
        tokenizer = self._continuing_tokenizer if continues else self._tokenizer
        tokenizer.encode_special_tokens = special_tokens is not None
        if not special_tokens:
            return encode(tokenizer, text)
        token_ids: list[int] = []
        longest_first = sorted(special_tokens, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first))
        for part in re.split(f"({names})", text):
            if part in special_tokens:
                token_id = self.id_of(part)
                assert token_id is not None, f"{part} is not a token of {self.file}"
                token_ids.append(token_id)
            elif part:
                token_ids += encode(tokenizer, part)
        return token_ids

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name in the file, or None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        """Return the name of a token in the file, or None if the id is unused."""
        return self._tokenizer.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token, or none if the id is unused.

        Models have more output rows than their tokenizer has tokens.
        """
        return self.bytes_by_id.get(token_id, b"")

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of tokens, in which special tokens stand by their names."""
        data = b"".join([self.token_bytes(token_id) for token_id in token_ids])
        text = data.decode(errors=self.decode_errors)
        stripped = text.lstrip(" ")
        return text[min(self.max_stripped_spaces, len(text) - len(stripped)) :]

    def visible_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """Return the bytes that a token adds to an answer with or without special tokens."""
        hidden = token_id in self.special_ids and token_id not in self.markup_ids
        if skip_special_tokens and hidden:
            return b""
        return self.token_bytes(token_id)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
