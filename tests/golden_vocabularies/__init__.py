"""Small vocabulary files of each kind, with what the reference implementations make of them.

<case>/expected.json holds `texts` (a text and its token ids), `answers` (token ids and their text)
and, if there are any, `special_tokens` by name. The references:

qwen_vl                   the published tokenizer code of Qwen-VL on tiktoken 0.14.0
wemm                      sentencepiece 0.2.3 with special tokens, the layout of WeMM-Chat-2k-CN
sentencepiece_bpe_prefix  sentencepiece 0.2.3: byte fallback, user-defined pieces, a leading space
sentencepiece_bpe_trim    sentencepiece 0.2.3: no byte fallback, rules that replace characters and
                          trim spaces
sentencepiece_unigram     sentencepiece 0.2.3: a Unigram model with user-defined pieces
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from common.families.qwen_vl import QwenVL
from common.vocabulary import Vocabulary
from common.vocabulary.sentencepiece import read_sentencepiece
from common.vocabulary.tiktoken import read_tiktoken

ROOT = Path(__file__).parent
SENTENCEPIECE = (
    "wemm",
    "sentencepiece_bpe_prefix",
    "sentencepiece_bpe_trim",
    "sentencepiece_unigram",
)
CASES = ("qwen_vl", *SENTENCEPIECE)
QWEN = QwenVL.tiktoken


def vocabulary_file(case: str) -> Path:
    return ROOT / case / ("qwen.tiktoken" if case == "qwen_vl" else "tokenizer.model")


@cache
def vocabulary(case: str) -> Vocabulary:
    file = vocabulary_file(case)
    return read_tiktoken(file, QWEN) if case == "qwen_vl" else read_sentencepiece(file)


@cache
def expected(case: str) -> dict[str, Any]:
    return json.loads((ROOT / case / "expected.json").read_text())
