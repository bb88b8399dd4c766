"""The language group of a request: the least busy one, or the one that has computed the prompt's
beginning before."""

import numpy as np
import pytest

from common.messages import LlmLoad, Peer
from services.preprocess.in_flight import MISSING_SECONDS
from services.preprocess.llm_groups import CLEARLY_BUSIER, PREFIX_TOKENS, LlmGroups
from services.preprocess.prepared import ExpandedPrompt

LONG = 4 * PREFIX_TOKENS


def groups(*names: str) -> LlmGroups:
    made = LlmGroups()
    for name in names:
        made.add(Peer(name, f"ipc:///{name}"))
    return made


def prompt(
    start: int = 0, num_tokens: int = LONG, tail: int = 0, image: bool = False
) -> ExpandedPrompt:
    """Tokens that count up from `start`, the last step's from `tail`; an image in the first
    step."""
    ids = np.arange(start, start + num_tokens)
    ids[-PREFIX_TOKENS:] += tail
    placeholders = np.array([[4, 8]] if image else [], np.int64).reshape(-1, 2)
    return ExpandedPrompt(ids, np.zeros((3, num_tokens), np.int64), 0, placeholders)


def chosen(made: LlmGroups, asked: ExpandedPrompt, *mm_hashes: str, avoid: str = "") -> str:
    peer = made.choose(asked, list(mm_hashes), avoid)
    assert peer is not None
    return peer.id


def tell(
    made: LlmGroups, name: str, running: int = 0, waiting: int = 0, free_tokens: int = 10**6
) -> None:
    made.update_load(name, LlmLoad(running=running, waiting=waiting, free_tokens=free_tokens))


def test_the_least_busy_group_gets_the_request_and_it_counts_until_the_group_tells_its_load() -> (
    None
):
    made = groups("a", "b")
    tell(made, "a", running=2, waiting=1)
    assert [chosen(made, prompt(1000 * n)) for n in range(3)] == ["b", "b", "b"]
    tell(made, "b", running=9)
    assert chosen(made, prompt(9000)) == "a"


def test_equally_busy_groups_take_turns() -> None:
    made = groups("a", "b", "c")
    assert sorted(chosen(made, prompt(1000 * n)) for n in range(6)) == [
        "a",
        "a",
        "b",
        "b",
        "c",
        "c",
    ]


def test_a_prompt_goes_where_its_beginning_was_computed_before() -> None:
    made = groups("a", "b", "c")
    first = chosen(made, prompt())
    assert [chosen(made, prompt(tail=n)) for n in range(1, CLEARLY_BUSIER + 1)] == [
        first
    ] * CLEARLY_BUSIER


def test_unless_that_group_is_clearly_busier() -> None:
    made = groups("a", "b")
    first = chosen(made, prompt())
    tell(made, first, running=20)
    assert chosen(made, prompt(tail=1)) != first


def test_equal_tokens_with_another_image_are_another_beginning() -> None:
    made = groups("a", "b")
    first = chosen(made, prompt(image=True), "aa")
    assert chosen(made, prompt(image=True), "bb") != first
    assert chosen(made, prompt(image=True), "aa") == first


def test_short_prompts_have_no_beginning_to_share() -> None:
    made = groups("a", "b")
    assert {chosen(made, prompt(num_tokens=PREFIX_TOKENS - 1)) for _ in range(2)} == {"a", "b"}


def test_a_group_without_room_for_the_prompt_is_taken_last() -> None:
    made = groups("a", "b")
    tell(made, "a", free_tokens=LONG - 1)
    tell(made, "b", running=30)
    assert chosen(made, prompt()) == "b"


def test_a_group_to_be_avoided_or_that_is_lost_is_not_chosen() -> None:
    made = groups("a", "b")
    assert {chosen(made, prompt(1000 * n), avoid="a") for n in range(4)} == {"b"}
    made.lose("b")
    assert made.choose(prompt(), [], "a") is None
    assert chosen(made, prompt()) == "a"


def test_a_draining_group_is_chosen_only_where_there_is_no_other() -> None:
    made = groups("a", "b")
    made.drain("a")
    assert {chosen(made, prompt(1000 * n)) for n in range(4)} == {"b"}
    made.lose("b")
    assert chosen(made, prompt()) == "a"


def test_the_successor_of_the_only_group_is_waited_for_while_it_drains() -> None:
    now = 100.0
    made = LlmGroups(lambda: now)
    made.add(Peer("a", "ipc:///a"))
    made.drain("a")
    assert not made.has_other("") and not made.missing_too_long()
    now += MISSING_SECONDS - 1
    made.lose("a")
    now += 2
    assert not made.missing_too_long(), "from its end on as long again"
    made.add(Peer("b", "ipc:///b"))
    assert made.has_other("")


def test_a_group_that_drains_for_long_gets_what_is_new_again() -> None:
    now = 100.0
    made = LlmGroups(lambda: now)
    made.add(Peer("a", "ipc:///a"))
    made.drain("a")
    now += MISSING_SECONDS + 1
    assert made.missing_too_long() and chosen(made, prompt()) == "a"


@pytest.mark.parametrize("name", ["a", "unknown"])
def test_what_is_told_of_a_group_that_is_gone_changes_nothing(name: str) -> None:
    made = groups("a")
    made.lose("a")
    tell(made, name)
    made.drain(name)
    assert len(made) == 0 and made.choose(prompt(), []) is None
