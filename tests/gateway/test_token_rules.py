"""What clients may say about single tokens, at both doors."""

import json
from typing import Any

import pytest

from common.messages import Repetition
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.generation import GenerationRequest
from services.gateway.grpc_messages import to_generation
from services.gateway.invalid_field import InvalidField
from services.gateway.token_rules import make_token_rules, read_ngram_size
from tests.gateway.test_schema import generation, refusal


def grpc_generation(**messages: Any) -> GenerationRequest:
    request = inference_pb2.GenerateRequest(text="hi", **messages)
    return to_generation(request, (), "id", None, 4096)


def test_both_doors_make_the_same_rules() -> None:
    words = ["no", "näh", "no"]
    http = generation(
        logit_bias={"5": 1.5, "7": -100}, allowed_token_ids=[9, 7, 9], bad_words=words
    )
    sampling = inference_pb2.SamplingParams(
        logit_bias={5: 1.5, 7: -100}, allowed_token_ids=[9, 7, 9], bad_words=words
    )
    rules = http.token_rules
    assert rules == grpc_generation(sampling=sampling).token_rules
    assert rules is not None and rules.bias_token_ids and rules.bias_values
    pairs = zip(rules.bias_token_ids.numpy(), rules.bias_values.numpy(), strict=True)
    assert dict(pairs) == {5: 1.5, 7: -100}
    assert rules.allowed_token_ids and rules.allowed_token_ids.numpy().tolist() == [7, 9]
    assert rules.bad_words and json.loads(rules.bad_words.bytes()) == ["no", "näh"]


def test_without_rules_there_are_none() -> None:
    assert generation().token_rules is None
    assert grpc_generation().token_rules is None


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("logit_bias", {"5": 101}, "logit_bias: 101.0 of token 5 is outside [-100, 100]"),
        ("logit_bias", {"word": 1}, "logit_bias: 'word' is not a token id"),
        ("logit_bias", {"-1": 1}, "logit_bias: '-1' is not a token id"),
        ("logit_bias", {"²": 1}, "logit_bias: '²' is not a token id"),
        ("logit_bias", {"9" * 5000: 1}, "logit_bias: '" + "9" * 40 + "' is not a token id"),
        ("logit_bias", {str(n): 1 for n in range(1025)}, "logit_bias: more than 1024 tokens"),
        ("logit_bias", {"5": "1"}, "logit_bias.5: input should be a valid number"),
        ("allowed_token_ids", [], "allowed_token_ids: no token is allowed"),
        ("allowed_token_ids", [-1], "allowed_token_ids: a token id is outside"),
        ("allowed_token_ids", [2**31], "allowed_token_ids: a token id is outside"),
        ("bad_words", [""], "bad_words: a text has 0 characters"),
        ("bad_words", ["x" * 257], "bad_words: a text has 257 characters"),
        ("bad_words", [str(n) for n in range(129)], "bad_words: more than 128 texts"),
        ("bad_words", "word", "bad_words: input should be a valid array"),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any, problem: str) -> None:
    assert refusal(**{name: value}).message.startswith(problem)


def test_a_bias_that_is_not_a_number_is_refused_at_the_grpc_door() -> None:
    sampling = inference_pb2.SamplingParams(logit_bias={5: float("nan")})
    with pytest.raises(InvalidField, match="nan of token 5 is outside"):
        grpc_generation(sampling=sampling)


def test_a_stop_string_is_included_if_asked_at_either_door() -> None:
    assert generation(include_stop_str_in_output=True).stopping.include_stop
    stopping = inference_pb2.StoppingParams(include_stop_str_in_output=True)
    assert grpc_generation(stopping=stopping).stopping.include_stop
    assert not generation().stopping.include_stop
    assert not grpc_generation().stopping.include_stop


LOOPS = {"max_pattern_size": 20, "min_pattern_size": 2, "min_count": 3}


@pytest.mark.parametrize("values", [LOOPS, {"max_pattern_size": 5, "min_count": 2}, {}])
def test_loops_end_an_answer_if_asked_at_either_door(values: dict[str, int]) -> None:
    http = generation(repetition_detection=values).stopping.repetition
    loops = inference_pb2.RepetitionDetection(**values)
    stopping = inference_pb2.StoppingParams(repetition_detection=loops)
    assert http == grpc_generation(stopping=stopping).stopping.repetition == Repetition(**values)


def test_without_a_word_about_loops_the_models_default_holds() -> None:
    assert generation().stopping.repetition is None
    assert generation(repetition_detection=None).stopping.repetition is None
    assert grpc_generation().stopping.repetition is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({**LOOPS, "max_pattern_size": 1025}, ".max_pattern_size: expected int <= 1024, got 1025"),
        ({**LOOPS, "min_count": 1}, ": min_count is 1; a loop repeats itself 2 times or more"),
        ({**LOOPS, "min_pattern_size": 21}, ": min_pattern_size is 21 and max_pattern_size 20"),
        ({**LOOPS, "size": 1}, ".size: extra inputs are not permitted"),
        ({**LOOPS, "min_count": 2.5}, ".min_count: input should be a valid integer"),
        (True, ": input should be an object"),
    ],
)
def test_wrong_values_about_loops_are_refused_by_name(values: Any, problem: str) -> None:
    message = refusal(repetition_detection=values).message
    assert message.startswith("repetition_detection" + problem)


def test_the_size_of_sequences_that_do_not_repeat_is_taken_where_mineru_sends_it() -> None:
    for size, arguments in ((5, None), (None, {"no_repeat_ngram_size": 5, "debug": False})):
        rules = make_token_rules(None, None, None, read_ngram_size(size, arguments))
        assert rules and rules.no_repeat_ngram_size == 5


@pytest.mark.parametrize(
    ("size", "arguments", "param"),
    [
        (2000, None, "no_repeat_ngram_size"),
        (-1, None, "no_repeat_ngram_size"),
        (5, {"no_repeat_ngram_size": 6}, "vllm_xargs.no_repeat_ngram_size"),
        (None, {"no_repeat_ngram_size": "6"}, "vllm_xargs.no_repeat_ngram_size"),
        (None, {"colour": 1}, "vllm_xargs.colour"),
    ],
)
def test_other_arguments_and_sizes_are_refused(size: Any, arguments: Any, param: str) -> None:
    with pytest.raises(InvalidField) as caught:
        make_token_rules(None, None, None, read_ngram_size(size, arguments))
    assert caught.value.param == param
