"""Tool calls are taken out of an answer, however its text is cut into pieces."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.detokenizer.tool_calls import ToolCallParser

CALL = (
    '<tool_call>\n{"name": "f", "arguments": {"a": "<tool_call>\\"}", "b": [1, {}]}}\n</tool_call>'
)
ARGUMENTS = '{"a": "<tool_call>\\"}", "b": [1, {}]}'
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "\n", " ", "{", "}", "[", "]", '"', "\\", ",", ":", "<", "e"),
    *('{"name": "f", "arguments": ', '{"name": "g"', '"arguments": {"a": 1}', '{"x": "y"}', "1.5"),
    *("é", "text", CALL, CALL[:-12], "\x00"),
]


def parsed(pieces: Iterable[str]) -> tuple[str, list[dict[str, Any]], int]:
    """Return the text, the calls with all of their parts joined, and how many are complete."""
    parser = ToolCallParser("r")
    text = ""
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        found = parser.push(piece)
        text += found.text
        indices = [part["index"] for part in found.parts]
        assert len(set(indices)) == len(indices), "at most one part of each call"
        for part in found.parts:
            text += part.pop("text", "")
            if part["index"] == len(calls):
                calls.append({**part})
            else:
                assert part.keys().isdisjoint({"id", "name"})
                calls[part["index"]]["arguments"] += part["arguments"]
                calls[part["index"]] |= {k: v for k, v in part.items() if k == "withdrawn"}
    return text + parser.finish(), calls, parser.num_complete


def seen(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls that a client of a whole answer sees.

    They must not depend on the pieces in which the text comes.
    """
    whole = parsed([text])
    assert parsed(text) == whole
    for cut in range(1, len(text)):
        assert parsed([text[:cut], text[cut:]]) == whole
    rest, calls, _ = whole
    return rest, [(c["name"], c["arguments"]) for c in calls if "withdrawn" not in c]


def test_arguments_are_those_that_the_model_wrote() -> None:
    assert seen(CALL) == ("", [("f", ARGUMENTS)])


def test_text_around_calls_stays_and_white_space_that_stands_alone_does_not() -> None:
    answer = f"\n{CALL}\n\n{CALL}\n"
    assert seen(answer) == ("", [("f", ARGUMENTS)] * 2)
    assert seen(f"Look: {CALL} and{CALL}\n.") == ("Look:  and\n.", [("f", ARGUMENTS)] * 2)


@pytest.mark.parametrize(
    "text", ["", "plain", "  plain <tool", "\n\n", "a </tool_call>", "<<tool_"]
)
def test_text_without_calls_stays_as_it_is(text: str) -> None:
    assert seen(text) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno JSON\n</tool_call> and more",
        '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {oops}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": "b\nc"}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1]}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {}, "more": 1}\n</tool_call>',
        '<tool_call>\n{"name": "\\x", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n["f"]\n</tool_call>',
    ],
)
def test_a_malformed_call_is_text(text: str) -> None:
    assert seen(text) == (text, [])


def test_arguments_nested_too_deeply_are_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 2000 + "1" + "}" * 2001
    rest, [call], num_complete = parsed([text])
    assert (rest, call["withdrawn"], num_complete) == (text, True, 0)


def test_what_follows_a_malformed_call_is_read() -> None:
    assert seen(f"<tool_call>\n{CALL}") == ("<tool_call>\n", [("f", ARGUMENTS)])


def test_a_call_may_have_its_name_last_or_no_arguments() -> None:
    backwards = '<tool_call>{"arguments": {"x": ["name"]}, "name": "g"}</tool_call>'
    assert seen(backwards) == ("", [("g", '{"x": ["name"]}')])
    assert seen('<tool_call>{"name": "g"}</tool_call>') == ("", [("g", "{}")])


def test_the_end_mark_may_be_missing() -> None:
    assert seen(CALL[:-12]) == ("", [("f", ARGUMENTS)])
    assert seen(f"{CALL[:-12]}{CALL}!") == ("!", [("f", ARGUMENTS)] * 2)


@pytest.mark.parametrize("length", range(len(CALL)))
def test_a_call_that_is_cut_off_is_text_until_its_arguments_begin(length: int) -> None:
    begun = CALL.index('{"a"')
    text, calls = seen(CALL[:length])
    if length <= begun:
        assert (text, calls) == (CALL[:length], [])
    else:
        arguments = CALL[begun:length]
        assert (text, calls) == ("", [("f", arguments[: len(ARGUMENTS)])])


def test_arguments_come_while_they_are_written() -> None:
    parser = ToolCallParser("r")
    begun = CALL.index('{"a"')
    parser.push(CALL[:begun])
    assert parser.push(CALL[begun : begun + 5]).parts[0]["arguments"] == CALL[begun : begun + 5]
    assert parser.push(CALL[begun + 5 : begun + 7]).parts == [
        {"index": 0, "arguments": CALL[begun + 5 : begun + 7]}
    ]


def test_text_after_a_call_comes_with_the_part_that_it_follows() -> None:
    parsed = ToolCallParser("r").push(f"a{CALL}b{CALL}")
    assert (parsed.text, [part.get("text") for part in parsed.parts]) == ("a", ["b", None])


def test_ids_are_those_of_the_request_and_differ() -> None:
    def ids(request_id: str) -> list[str]:
        parts = ToolCallParser(request_id).push(CALL + CALL).parts
        return [part["id"] for part in parts]

    assert ids("r") == ids("r")
    assert len({*ids("r"), *ids("s")}) == 4
    assert all(id.startswith("call_") for id in ids("r"))


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.data())
def test_nothing_is_lost_and_pieces_do_not_matter(fragments: list[str], data: Any) -> None:
    text = "".join(fragments)
    whole = parsed([text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(pieces) == whole
    assert parsed(text) == whole
    rest, calls, num_complete = whole
    kept = [call for call in calls if "withdrawn" not in call]
    assert num_complete <= len(kept) <= num_complete + 1
    for call in kept[:num_complete]:
        assert isinstance(json.loads(call["arguments"]), dict)
    if not kept:
        assert rest == text, "an answer without calls is its text"
