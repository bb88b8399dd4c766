"""A request goes to the least busy language group, or to one that has computed its prefix."""

import numpy as np
import pytest

from common.messages import Adapter, Adapters, LlmLoad, Peer
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
    """Return a prompt of tokens that count up from `start`.

    Those of the last step are shifted by `tail`. The image, if any, is in the first step.
    """
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


def test_the_least_busy_group_is_chosen_and_the_request_counts_until_its_next_report() -> None:
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


def test_a_prompt_goes_where_its_prefix_was_computed_before() -> None:
    made = groups("a", "b", "c")
    first = chosen(made, prompt())
    assert [chosen(made, prompt(tail=n)) for n in range(1, CLEARLY_BUSIER + 1)] == [
        first
    ] * CLEARLY_BUSIER


def test_a_prompt_leaves_the_group_with_its_prefix_if_that_is_clearly_busier() -> None:
    made = groups("a", "b")
    first = chosen(made, prompt())
    tell(made, first, running=20)
    assert chosen(made, prompt(tail=1)) != first


def test_equal_tokens_with_another_image_are_another_prefix() -> None:
    made = groups("a", "b")
    first = chosen(made, prompt(image=True), "aa")
    assert chosen(made, prompt(image=True), "bb") != first
    assert chosen(made, prompt(image=True), "aa") == first


def test_short_prompts_have_no_prefix_to_share() -> None:
    made = groups("a", "b")
    assert {chosen(made, prompt(num_tokens=PREFIX_TOKENS - 1)) for _ in range(2)} == {"a", "b"}


def test_a_group_without_room_for_the_prompt_is_chosen_last() -> None:
    made = groups("a", "b")
    tell(made, "a", free_tokens=LONG - 1)
    tell(made, "b", running=30)
    assert chosen(made, prompt()) == "b"


def test_a_group_to_be_avoided_or_that_is_lost_is_not_chosen() -> None:
    made = groups("a", "b")
    assert {chosen(made, prompt(1000 * n), avoid="a") for n in range(4)} == {"b"}
    made.remove("b")
    assert made.choose(prompt(), [], "a") is None
    assert chosen(made, prompt()) == "a"


def test_a_draining_group_is_chosen_only_if_there_is_no_other() -> None:
    made = groups("a", "b")
    made.drain("a")
    assert {chosen(made, prompt(1000 * n)) for n in range(4)} == {"b"}
    made.remove("b")
    assert chosen(made, prompt()) == "a"


def test_requests_wait_for_a_successor_while_the_only_group_drains() -> None:
    now = 100.0
    made = LlmGroups(lambda: now)
    made.add(Peer("a", "ipc:///a"))
    made.drain("a")
    assert not made.has_other("") and not made.missing_too_long()
    now += MISSING_SECONDS - 1
    made.remove("a")
    now += 2
    assert not made.missing_too_long(), "from its end on as long again"
    made.add(Peer("b", "ipc:///b"))
    assert made.has_other("")


def test_a_group_that_drains_for_long_gets_new_requests_again() -> None:
    now = 100.0
    made = LlmGroups(lambda: now)
    made.add(Peer("a", "ipc:///a"))
    made.drain("a")
    now += MISSING_SECONDS + 1
    assert made.missing_too_long() and chosen(made, prompt()) == "a"


@pytest.mark.parametrize("name", ["a", "unknown"])
def test_reports_about_a_group_that_is_gone_are_ignored(name: str) -> None:
    made = groups("a")
    made.remove("a")
    tell(made, name)
    made.drain(name)
    assert len(made) == 0 and made.choose(prompt(), []) is None


def test_a_request_with_an_adapter_goes_to_a_group_that_has_it() -> None:
    made = groups(*"abcdefghijkl")
    for name in "abcdefghijk":
        tell(made, name)
    tell(made, "l", running=50)
    assert made.choose(prompt(), [], adapter="x") is None
    made.update_adapters("l", Adapters(adapters=(Adapter("x", "/x"),)))
    found = made.choose(prompt(), [], adapter="x")
    assert found and found.id == "l"
    assert chosen(made, prompt()) != "l", "its prefix is that of another model"
    made.update_adapters("l", Adapters(adapters=()))
    assert made.choose(prompt(), [], adapter="x") is None
