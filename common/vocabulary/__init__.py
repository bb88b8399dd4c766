"""Tokens as ids, text and bytes, read from any of four kinds of vocabulary file."""

from pathlib import Path

from common.checkpoint import Checkpoint
from common.families import BadCheckpoint
from common.vocabulary.sentencepiece import read_sentencepiece
from common.vocabulary.tiktoken import read_tiktoken
from common.vocabulary.tokenizer_json import read_tokenizer_json
from common.vocabulary.vocabulary import Vocabulary
from common.vocabulary.wordpiece import read_wordpiece

__all__ = ["Vocabulary", "open_vocabulary"]

MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a file raises that has other values than the readers expect."""


def open_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Read the vocabulary file that the checkpoint's family names.

    Raises
    ------
    BadCheckpoint
        if the file is damaged, or uses something that is not supported.
    """
    file = checkpoint.path / checkpoint.family.vocabulary_file
    try:
        vocabulary = read_vocabulary(file, checkpoint)
    except BadCheckpoint:
        raise
    except MALFORMED as e:
        raise BadCheckpoint(f"{file} is malformed ({type(e).__name__}): download it again") from e
    return vocabulary.with_markup(checkpoint.family.markup_tokens)


def read_vocabulary(file: Path, checkpoint: Checkpoint) -> Vocabulary:
    match file.suffix:
        case ".json":
            return read_tokenizer_json(file)
        case ".tiktoken":
            return read_tiktoken(
                file, checkpoint.family.tiktoken, checkpoint.family.num_ranks(checkpoint)
            )
        case ".model":
            return read_sentencepiece(file)
        case ".txt":
            return read_wordpiece(file)
    raise BadCheckpoint(f"{file} is not a vocabulary file of a known kind")
