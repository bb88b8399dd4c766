"""Token rules on their way through preprocess: checked, and with texts as token sequences."""

import json

import numpy as np
import pytest

from common.errors import InvalidRequest
from common.messages import (
    MAX_BAD_WORDS,
    MAX_PROMPT_LOGPROBS,
    Failed,
    Prompt,
    Sampling,
    TokenRules,
)
from common.wire import Tensor
from services.preprocess.submit_checks import check_prompt_logprobs
from services.preprocess.token_rules import check_token_rules, word_sequences
from tests import golden_vocabularies
from tests.preprocess.builders import PREPROCESSOR, Preprocess, submit

VOCABULARY = PREPROCESSOR.vocabulary
VOCAB_SIZE = PREPROCESSOR.vocab_size


def words(*texts: str) -> bytes:
    return json.dumps(texts).encode()


def text_of(token_ids: list[int]) -> str:
    return b"".join(map(VOCABULARY.token_bytes, token_ids)).decode()


def test_a_text_is_spelled_within_a_word_and_after_a_space() -> None:
    found = word_sequences(VOCABULARY, words("  the"))
    assert found[0] == VOCABULARY.encode("the")
    assert set(map(text_of, found)) <= {"the", " the"}


@pytest.mark.parametrize("case", golden_vocabularies.CASES)
def test_every_vocabulary_rules_a_word_out_wherever_it_stands(case: str) -> None:
    vocabulary = golden_vocabularies.vocabulary(case)
    found = word_sequences(vocabulary, words("the"))
    for line in ("the", " the"):
        ids = vocabulary.encode(line, continues=True)
        assert any(ids[-len(sequence) :] == sequence for sequence in found)


def test_white_space_alone_is_ruled_out_as_it_is() -> None:
    assert word_sequences(VOCABULARY, words("\n"))[0] == VOCABULARY.encode("\n")


@pytest.mark.parametrize(
    "given",
    [
        b"{",
        b'"the"',
        b"[5]",
        b'[""]',
        b'["\\ud800"]',
        words("x" * 257),
        words(*map(str, range(MAX_BAD_WORDS + 1))),
    ],
)
def test_bad_words_of_a_gateway_are_not_trusted(given: bytes) -> None:
    with pytest.raises(InvalidRequest, match="bad_words"):
        word_sequences(VOCABULARY, given)


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        (TokenRules(bias_token_ids=Tensor.of_int64([1])), "values are missing"),
        (
            TokenRules(
                bias_token_ids=Tensor.of_int64([VOCAB_SIZE]),
                bias_values=Tensor.of(np.zeros(1, np.float32)),
            ),
            f"logit_bias: token {VOCAB_SIZE} is outside",
        ),
        (
            TokenRules(
                bias_token_ids=Tensor.of_int64([1]),
                bias_values=Tensor.of(np.array([np.nan], np.float32)),
            ),
            "a value is outside",
        ),
        (TokenRules(allowed_token_ids=Tensor.of_int64([-1])), "allowed_token_ids: token -1"),
        (TokenRules(allowed_token_ids=Tensor.of_int64([])), "allowed_token_ids must be"),
        (TokenRules(allowed_token_ids=Tensor.of_int64([1, 1])), "one of them twice"),
        (TokenRules(bad_words=Tensor.of_int64([1])), "bad_words"),
    ],
)
def test_rules_that_are_not_the_models_are_refused(rules: TokenRules, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        check_token_rules(rules, VOCAB_SIZE)


def test_a_prompt_has_the_rules_with_the_sequences_of_the_texts() -> None:
    preprocess = Preprocess("vision-1")
    allowed = Tensor.of_int64([5, 6])
    rules = TokenRules(allowed_token_ids=allowed, bad_words=Tensor.of_bytes(words("the")))
    sent = preprocess.play(submit("r", token_rules=rules))
    [prompt] = [message for _, message in sent if isinstance(message, Prompt)]
    assert prompt.token_rules is not None and prompt.token_rules.bad_words is not None
    assert prompt.token_rules.allowed_token_ids == allowed
    found = json.loads(prompt.token_rules.bad_words.bytes())
    assert found == word_sequences(VOCABULARY, words("the"))


def test_a_token_outside_the_vocabulary_is_the_clients_mistake() -> None:
    preprocess = Preprocess("vision-1")
    rules = TokenRules(allowed_token_ids=Tensor.of_int64([VOCAB_SIZE]))
    sent = preprocess.play(submit("r", token_rules=rules))
    [failed] = [message for _, message in sent if isinstance(message, Failed)]
    assert failed.code == "InvalidRequest" and "vocabulary" in failed.message
    assert preprocess.holds_nothing


def test_more_log_probabilities_of_a_prompt_than_can_be_written_are_refused() -> None:
    check_prompt_logprobs(Sampling(num_prompt_logprobs=1), MAX_PROMPT_LOGPROBS // 2)
    check_prompt_logprobs(Sampling(), MAX_PROMPT_LOGPROBS + 1)
    with pytest.raises(InvalidRequest, match="2 for each of"):
        check_prompt_logprobs(Sampling(num_prompt_logprobs=1), MAX_PROMPT_LOGPROBS // 2 + 1)
