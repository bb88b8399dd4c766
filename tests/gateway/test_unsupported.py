"""Fields of other servers are obeyed or refused, and so are keys inside objects."""

from typing import Any

import pytest

from services.gateway.unsupported import ALIASES, HARMLESS, IN_REQUEST
from tests.gateway.test_schema import generation, refusal, user


@pytest.mark.parametrize("alias", [name for name in ALIASES if ALIASES[name] == "max_tokens"])
def test_other_names_of_max_tokens_mean_the_same(alias: str) -> None:
    assert generation(**{alias: 7}).stopping.max_tokens == 7
    assert generation(**{alias: 7, "max_tokens": 7}).stopping.max_tokens == 7
    for other in ("max_tokens", "max_completion_tokens"):
        assert refusal(**{alias: 7, other: 8}).param == alias
    assert refusal(**{alias: "many"}).param == alias


def test_the_other_aliases_are_obeyed_and_no_limit_is_none() -> None:
    asked = generation(min_new_tokens=2, stop_sequences=["x"], random_seed=3, n_predict=-1)
    stopping = asked.stopping
    assert (stopping.min_tokens, stopping.stop, asked.sampling.seed) == (2, ("x",), 3)
    assert stopping.max_tokens is None


def test_no_field_is_in_two_tables() -> None:
    names = [*ALIASES, *HARMLESS, *IN_REQUEST]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name",
    [
        "repeat_penalty",
        "bad_words_ids",
        "logprob_token_ids",
        "mirostat",
        "top_a",
        "dry_multiplier",
        "xtc_probability",
        "truncation",
        "return_hidden_states",
        "no_stop_trim",
        "custom_logit_processor",
        "context_length_exceeded_behavior",
        "transforms",
    ],
)
def test_what_other_servers_users_know_is_refused_by_name(name: str) -> None:
    assert refusal(**{name: "something"}).param == name


def test_keys_inside_objects_are_refused_by_their_path_but_for_notes_about_caches() -> None:
    note = {"cache_control": {"type": "ephemeral"}, "uuid": "u"}
    part = {"type": "text", "text": "a"}
    assert generation(user(part | note), seed=1) == generation(user(part), seed=1)
    assert refusal(messages=user(part | {"zoom": 1})).param == "messages[0].content[0].zoom"
    message = {"role": "user", "content": "a"}
    plain = generation([message], seed=1)
    assert generation([message | note | {"name": "ann"}], seed=1) == plain
    assert refusal(messages=[message | {"zoom": 1}]).param == "messages[0].zoom"
    assert refusal(messages=[message | {"name": 1}]).param == "messages[0].name"


def test_stream_options_need_a_stream_and_know_their_keys() -> None:
    assert refusal(stream_options={"include_usage": True}).param == "stream_options"
    options: dict[str, Any] = {"stream": True, "stream_options": {"zoom": 1}}
    assert refusal(**options).param == "stream_options.zoom"


def test_a_refusal_is_what_the_assistant_said() -> None:
    for message in (
        {"role": "assistant", "refusal": "no"},
        {"role": "assistant", "content": None, "refusal": "no"},
    ):
        assert b'"content":"no"' in generation([message]).prompt
    part = {"type": "refusal", "refusal": "no"}
    assert b'"text":"no"' in generation([{"role": "assistant", "content": [part]}]).prompt
    assert refusal(messages=user(part)).param == "messages[0].content[0].type"


def test_top_p_of_zero_is_legal() -> None:
    assert generation(top_p=0).sampling.top_p == 0
