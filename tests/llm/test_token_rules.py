"""What is drawn under biases, allowed tokens and bad words, and which rules are refused."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from common.messages import Stopping, TokenRules
from common.wire import Tensor
from services.llm.sampler import SampledTokens, Sampler
from services.llm.token_rules import objection_to_rules
from tests.llm.builders import create_prompt
from tests.llm.test_engine import answer, create_engine, outputs_of, undisturbed
from tests.llm.test_sampler import NO_IDS, outputs, sampling

VOCAB_SIZE = 8


def rules(
    bias: dict[int, float] | None = None,
    allowed: list[int] | None = None,
    words: list[list[int]] | None = None,
) -> TokenRules:
    return TokenRules(
        bias_token_ids=Tensor.of_int64([*bias]) if bias else None,
        bias_values=Tensor.of(np.array([*bias.values()], np.float32)) if bias else None,
        allowed_token_ids=None if allowed is None else Tensor.of_int64(allowed),
        bad_words=Tensor.of_bytes(msgspec.json.encode(words)) if words else None,
    )


def sampler_with(
    one: TokenRules, output: list[int] | None = None, stopping: Stopping = Stopping(), **fields: Any
) -> Sampler:
    sampler = Sampler()
    sampler.add("r", sampling(**fields), stopping, NO_IDS, output or [], (0,), one)
    return sampler


def drawn(one: TokenRules, logits: list[float], count: int = 1, **fields: Any) -> list[int]:
    return outputs(sampler_with(one, **fields), logits, count)


def sampled(
    one: TokenRules, logits: list[float], mask: list[bool] | None = None, **fields: Any
) -> SampledTokens:
    masks = {} if mask is None else {0: np.array(mask)}
    return sampler_with(one, **fields).sample(torch.tensor([logits]), ["r"], [0], masks)


def test_a_bias_is_added_to_the_logit() -> None:
    assert drawn(rules({2: 1.5}), [0.0, 2.0, 1.0]) == [2]
    assert drawn(rules({2: 0.5}), [0.0, 2.0, 1.0]) == [1]


def test_a_bias_and_a_penalty_of_the_same_token_add_up() -> None:
    biased = rules({0: 3.0})
    assert drawn(biased, [0.0, 2.0], 2, presence_penalty=0.5) == [0, 0]
    assert drawn(biased, [0.0, 2.0], 2, presence_penalty=1.5) == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_the_largest_biases_force_and_ban_whatever_the_logits_are(temperature: float) -> None:
    seeds = range(20)
    logits = [500.0, 499.0, -500.0, 0.0]
    for seed in seeds:
        fields = {"temperature": temperature, "seed": seed}
        assert drawn(rules({2: 100.0}), logits, **fields) == [2]
        assert drawn(rules({0: -100.0, 1: -100.0, 3: -100.0}), logits, **fields) == [2]


def test_a_grammar_decides_if_it_leaves_none_of_the_forced_tokens() -> None:
    one = rules({2: 100.0})
    assert sampled(one, [3.0, 1.0, 0.0], [True, True, False]).token_ids == [0]
    assert sampled(one, [3.0, 1.0, 0.0], [True, False, True]).token_ids == [2]


def test_only_allowed_tokens_are_drawn_whatever_else_is_asked() -> None:
    assert drawn(rules(allowed=[0, 2]), [0.0, 5.0, 1.0]) == [2]
    assert drawn(rules({2: 100.0}, allowed=[0, 1]), [0.0, 5.0, 1.0]) == [1]
    for seed in range(20):
        hot = drawn(rules(allowed=[0, 2]), [0.0, 5.0, 1.0], 5, temperature=100.0, seed=seed)
        assert set(hot) <= {0, 2}


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = [0.0, 5.0, 1.0]
    found = sampled(rules({0: 7.0}, allowed=[0, 2]), logits, num_logprobs=1)
    expected = torch.tensor(logits).log_softmax(0)
    assert found.token_ids == [0]
    assert found.logprobs[0].logprob == pytest.approx(expected[0].item())
    assert found.logprobs[0].top_token_ids.tolist() == [1]


@pytest.mark.parametrize(
    ("one", "mask", "stopping"),
    [
        (rules(allowed=[1]), [True, False, True], Stopping()),
        (rules({0: -100.0, 1: -100.0, 2: -100.0}), None, Stopping()),
        (rules(allowed=[0]), None, Stopping(min_tokens=1)),
        (rules(allowed=[1], words=[[1]]), None, Stopping()),
    ],
)
def test_rules_that_leave_nothing_are_not_the_models_fault(
    one: TokenRules, mask: list[bool] | None, stopping: Stopping
) -> None:
    found = sampled(one, [0.0, 5.0, 1.0], mask, stopping=stopping)
    assert (found.ruled_out_rows, found.bad_rows) == ([0], [])
    bad = sampled(one, [torch.nan] * 3, mask, stopping=stopping)
    assert (bad.ruled_out_rows, bad.bad_rows) == ([], [0])


def test_a_sequence_may_not_be_completed_and_its_beginning_may_be_written() -> None:
    logits = [0.0, 4.0, 3.0, 2.0]
    # After 1, 1 is banned; after 1, 2 the token 1 is.
    one = rules(words=[[1, 1], [1, 2, 1], [3]])
    assert drawn(one, logits, 5) == [1, 2, 2, 1, 2]


def test_a_word_begun_before_a_failover_may_not_be_completed_after_it() -> None:
    logits = [0.0, 4.0, 3.0, 2.0]
    one = rules(words=[[1, 1], [1, 2, 1], [2, 2]])
    whole = drawn(one, logits, 12)
    for cut in range(12):
        resumed = sampler_with(one, whole[:cut])
        assert outputs(resumed, logits, 12 - cut, first=cut) == whole[cut:]


def test_a_request_without_rules_keeps_its_logits_in_a_batch_with_one_that_has_some() -> None:
    sampler = sampler_with(rules({0: -100.0}, allowed=[0, 1], words=[[2]]))
    sampler.add("free", sampling(), Stopping(), NO_IDS, [], ())
    logits = torch.tensor([[5.0, 1.0, 2.0]] * 2)
    assert sampler.sample(logits, ["r", "free"], [0, 0]).token_ids == [1, 0]
    assert logits.tolist() == [[5.0, 1.0, 2.0]] * 2


def test_rules_that_leave_nothing_end_their_request_alone_as_invalid() -> None:
    engine = create_engine()
    impossible = rules(allowed=[5], words=[[5]])
    engine.add(msgspec.structs.replace(create_prompt("a"), token_rules=impossible))
    engine.add(create_prompt("b"))
    outputs = outputs_of(engine)
    [ended] = [output for output in outputs if output.request.prompt.request_id == "a"]
    assert ended.error_code == "InvalidRequest" and "allowed_token_ids" in ended.error
    assert answer(outputs, "b")[0] == undisturbed()
    assert not engine.requests


OBJECTIONS: dict[str, TokenRules] = {
    "do not fit each other": TokenRules(bias_token_ids=Tensor.of_int64([1])),
    "int64": TokenRules(allowed_token_ids=Tensor.of(np.zeros(2, np.float32))),
    "bias_token_ids has a value outside": rules({VOCAB_SIZE: 1.0}),
    "bias_values has a value outside": rules({1: float("nan")}),
    "bias_values is": TokenRules(
        bias_token_ids=Tensor.of_int64([1]), bias_values=Tensor.of(np.zeros(2, np.float32))
    ),
    "allowed_token_ids is": rules(allowed=[]),
    "allowed_token_ids has a value outside": rules(allowed=[-1]),
    "names a token twice": rules(allowed=[1, 1]),
    "an empty sequence": rules(words=[[]]),
    "bad_words has a token outside": rules(words=[[1, VOCAB_SIZE]]),
    "bad_words: ": TokenRules(bad_words=Tensor.of_text('[["a"]]')),
    "bytes of JSON": TokenRules(bad_words=Tensor.of_int64([1])),
}


@pytest.mark.parametrize("objection", OBJECTIONS)
def test_rules_of_a_preprocess_are_not_trusted(objection: str) -> None:
    assert objection in objection_to_rules(OBJECTIONS[objection], VOCAB_SIZE)


def test_sound_rules_and_none_are_accepted() -> None:
    sound = rules({1: 2.0, 2: -100.0}, allowed=[0, 7], words=[[1, 2], [7]])
    assert objection_to_rules(sound, VOCAB_SIZE) == objection_to_rules(None, VOCAB_SIZE) == ""


def without_repeats(size: int) -> TokenRules:
    return TokenRules(no_repeat_ngram_size=size)


def reference(logits: list[float], size: int, count: int, before: list[int]) -> list[int]:
    """Draw greedily, and look at the whole answer for each token."""
    answer = list(before)
    for _ in range(count):
        seen = {tuple(answer[n : n + size]) for n in range(len(answer) - size + 1)}
        tail = answer[len(answer) - size + 1 :] if size > 1 else []
        order = sorted(range(len(logits)), key=lambda token: -logits[token])
        answer.append(next(token for token in order if (*tail, token) not in seen))
    return answer[len(before) :]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("before", [[], [3, 3, 2, 3]])
def test_no_sequence_of_a_size_comes_twice(size: int, before: list[int]) -> None:
    logits = [0.0, 1.0, 2.0, 3.0, 2.5, 1.5, 0.5, 0.25]
    count = 4
    found = outputs(sampler_with(without_repeats(size), before), logits, count)
    assert found == reference(logits, size, count, before)
