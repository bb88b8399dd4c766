"""The fields of a SentencePiece model file (sentencepiece_model.proto) that decide its tokens."""

import math
import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from common.families.family import BadCheckpoint
from common.model_files import read_file
from common.vocabulary.protobuf import BadProtobuf, read_fields
from common.vocabulary.vocabulary import MAX_TOKEN_BYTES, MAX_TOKENS

Fields = dict[int, int | bytes]


class PieceType(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """TrainerSpec.ModelType."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, slots=True)
class ModelPiece:
    """One token of the model."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A model file. The id of a piece is its index."""

    pieces: list[ModelPiece]
    model_type: ModelType
    byte_fallback: bool
    charsmap: bytes
    """Compiled rules that replace characters; empty if there are none."""
    add_dummy_prefix: bool
    """Whether text begins with an additional space."""
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    """Whether spaces are written as U+2581."""


def read_model(file: Path) -> SentencePieceModel:
    """Read a model file. Raises BadCheckpoint if it is damaged."""
    data = read_file(file)
    try:
        return parse_model(data)
    except ValueError as e:
        raise BadCheckpoint(f"{file} is not a SentencePiece model: {e}; download it again") from e


def parse_model(data: bytes) -> SentencePieceModel:
    pieces = []
    trainer: Fields = {}
    normalizer: Fields = {}
    for number, value in read_fields(data):
        match number:
            case 1:
                pieces.append(parse_piece(fields_of(value)))
                if len(pieces) > MAX_TOKENS:
                    raise BadProtobuf(f"it has more than {MAX_TOKENS} pieces")
            case 2:
                trainer = fields_of(value)
            case 3:
                normalizer = fields_of(value)
    if not pieces:
        raise BadProtobuf("it has no pieces")
    return SentencePieceModel(
        pieces,
        model_type=ModelType(number_of(trainer, 3, ModelType.UNIGRAM)),
        byte_fallback=bool(number_of(trainer, 35, 0)),
        charsmap=bytes_of(normalizer, 2),
        add_dummy_prefix=bool(number_of(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(number_of(normalizer, 4, 1)),
        escape_whitespaces=bool(number_of(normalizer, 5, 1)),
    )


def parse_piece(fields: Fields) -> ModelPiece:
    score = bytes_of(fields, 2) or bytes(4)
    if len(score) != 4:
        raise BadProtobuf("the score of a piece is not a float")
    piece = ModelPiece(
        bytes_of(fields, 1).decode(),
        struct.unpack("<f", score)[0],
        PieceType(number_of(fields, 3, PieceType.NORMAL)),
    )
    if len(piece.text) > MAX_TOKEN_BYTES or not math.isfinite(piece.score):
        raise BadProtobuf(f"a piece is longer than {MAX_TOKEN_BYTES}, or its score is no number")
    if piece.type is PieceType.BYTE and not re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece.text):
        raise BadProtobuf("a byte piece is not of the form <0x0A>")
    return piece


def fields_of(value: int | bytes) -> Fields:
    """Return the last value of each field of a nested message."""
    if isinstance(value, int):
        raise BadProtobuf("a number where a message is expected")
    return dict(read_fields(value))


def number_of(fields: Fields, number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise BadProtobuf(f"field {number} is not a number")
    return value


def bytes_of(fields: Fields, number: int) -> bytes:
    value = fields.get(number, b"")
    if not isinstance(value, bytes):
        raise BadProtobuf(f"field {number} is a number")
    return value
