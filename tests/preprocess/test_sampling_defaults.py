"""Absent values come from the model, given ones win, and the context is never exceeded."""

import pytest

from common.errors import ContextLengthExceeded
from common.families.family import RequestDefaults
from common.messages import Repetition, Sampling, Stopping
from services.preprocess.sampling_defaults import (
    add_instruction,
    resolve_sampling,
    resolve_stopping,
)

CONFIG = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "eos_token_id": 3,
}


def test_absent_values_come_from_the_checkpoint() -> None:
    found = resolve_sampling(Sampling(seed=5, num_logprobs=2), CONFIG)
    assert found == Sampling(
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        min_p=0.0,
        repetition_penalty=1.05,
        seed=5,
        num_logprobs=2,
    )


def test_given_values_win_even_if_they_are_zero() -> None:
    given = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.1, repetition_penalty=1.0)
    assert resolve_sampling(given, CONFIG) == given


def test_the_distribution_is_unchanged_without_a_configuration() -> None:
    want = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert resolve_sampling(Sampling(), {}) == want
    assert resolve_sampling(Sampling(), {"temperature": None, "top_k": -1}) == want


def test_a_checkpoint_that_does_not_sample_is_greedy_unless_asked() -> None:
    config = CONFIG | {"do_sample": False}
    assert resolve_sampling(Sampling(), config).temperature == 0.0
    assert resolve_sampling(Sampling(temperature=0.3), config).temperature == 0.3


def test_no_max_tokens_means_what_the_prompt_leaves() -> None:
    found = resolve_stopping(Stopping(stop=("x",), min_tokens=2), 90, 100)
    assert found == Stopping(max_tokens=10, stop=("x",), min_tokens=2)


def test_max_tokens_may_fill_the_context_and_no_more() -> None:
    assert resolve_stopping(Stopping(max_tokens=10), 90, 100).max_tokens == 10
    with pytest.raises(
        ContextLengthExceeded,
        match=r"^This model's maximum context length is 100 tokens\. Your prompt has 90 tokens, "
        r"image tokens included, and max_tokens is 11, which is 101 together: ask for at most 10 ",
    ):
        resolve_stopping(Stopping(max_tokens=11), 90, 100)


@pytest.mark.parametrize("num_prompt_tokens", [100, 5000])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(num_prompt_tokens: int) -> None:
    with pytest.raises(
        ContextLengthExceeded, match=rf"length is 100 tokens. Your prompt has {num_prompt_tokens} "
    ):
        resolve_stopping(Stopping(), num_prompt_tokens, 100)
    assert resolve_stopping(Stopping(), 99, 100).max_tokens == 1


# What a model does by itself

MODEL = RequestDefaults("Read it.\n", temperature=0.2, max_tokens=5)


def test_the_models_temperature_replaces_that_of_its_file_and_not_the_clients() -> None:
    found = resolve_sampling(Sampling(), CONFIG | {"do_sample": False}, MODEL)
    assert (found.temperature, found.top_p) == (0.2, 0.8)
    assert resolve_sampling(Sampling(temperature=0.0), CONFIG, MODEL).temperature == 0.0


def test_the_models_length_is_kept_as_far_as_the_context_and_the_client_allow() -> None:
    assert resolve_stopping(Stopping(), 90, 100, MODEL).max_tokens == 5
    assert resolve_stopping(Stopping(), 97, 100, MODEL).max_tokens == 3
    assert resolve_stopping(Stopping(max_tokens=9), 90, 100, MODEL).max_tokens == 9


def test_the_models_loops_end_an_answer_unless_the_client_says_otherwise() -> None:
    loops = Repetition(max_pattern_size=9, min_count=3)
    model = RequestDefaults(repetition=loops)
    others = Repetition(max_pattern_size=2, min_count=2)
    none = Repetition(max_pattern_size=0)
    assert resolve_stopping(Stopping(), 90, 100, model).repetition == loops
    assert resolve_stopping(Stopping(), 90, 100).repetition is None
    for client in (others, none):
        found = resolve_stopping(Stopping(repetition=client), 90, 100, model)
        assert found.repetition == client


IMAGE = {"type": "image"}
SAID = {"type": "text", "text": "Read it.\n"}


def user(*content: object) -> dict[str, object]:
    return {"role": "user", "content": list(content)}


SYSTEM = {"role": "system", "content": "You read."}
ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([user(IMAGE)], [user(IMAGE, SAID)]),
        ([SYSTEM, user(IMAGE, IMAGE)], [SYSTEM, user(IMAGE, IMAGE, SAID)]),
        (
            [user(IMAGE, {"type": "text", "text": " \n"})],
            [user(IMAGE, {"type": "text", "text": " \n"}, SAID)],
        ),
        ([user(IMAGE), ANSWER, user(IMAGE)], [user(IMAGE), ANSWER, user(IMAGE, SAID)]),
        (
            [user(IMAGE), {"role": "user", "content": ""}],
            [user(IMAGE, SAID), {"role": "user", "content": ""}],
        ),
    ],
)
def test_a_user_who_says_nothing_says_the_models_instruction(
    messages: list[dict[str, object]], found: list[dict[str, object]]
) -> None:
    assert add_instruction(messages, MODEL.instruction) == found


@pytest.mark.parametrize(
    "messages",
    [
        [user(IMAGE, {"type": "text", "text": "What is it?"})],
        [user({"type": "text", "text": "What is it?"}), ANSWER, user(IMAGE)],
        [user(IMAGE), {"role": "user", "content": "What is it?"}],
        [{"role": "user", "content": ""}],
        [SYSTEM],
    ],
)
def test_what_a_user_says_and_requests_without_items_stay(
    messages: list[dict[str, object]],
) -> None:
    assert add_instruction(messages, MODEL.instruction) == messages


def test_a_model_without_an_instruction_adds_none() -> None:
    assert add_instruction([user(IMAGE)], "") == [user(IMAGE)]
