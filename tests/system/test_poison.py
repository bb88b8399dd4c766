"""Requests that end processes fail alone; ten innocents next to each of them are all answered."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.apart import MAX_DEATHS
from common.membership import READY
from tests.preprocess.cases import encoded, noise
from tests.system.poisoned import COLOURS, LLM_MARKS, PREPROCESS_MARK, coloured
from tests.system.running import Running, ask_about, until

pytestmark = pytest.mark.system
NUM_INNOCENTS = 10


@pytest.fixture(scope="module")
def system() -> Iterator[Running]:
    with Running("--vision", "2", module="tests.system.poisoned") as running:
        yield running


def text(words: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": words}]


POISONS = {
    "preprocess killed": ("preprocess", lambda: text(PREPROCESS_MARK)),
    "vision killed": ("vision", lambda: ask_about(coloured(COLOURS["killed"]))),
    "vision hung": ("vision", lambda: ask_about(coloured(COLOURS["hung"]))),
    "llm killed": ("llm", lambda: text(LLM_MARKS["killed"])),
}


def attack(
    system: Running, role: str, poison: list[dict[str, Any]], num_processes: int = 1
) -> None:
    """Ask a poison among innocents, and compare how each of them ends with what must happen.

    The poison ends `num_processes` at once.
    """
    innocents = [ask_about(encoded(noise(56, 56, n)), f"Read {n}.") for n in range(NUM_INNOCENTS)]
    questions = [*innocents[:5], poison, *innocents[5:]]
    restarts = num_restarts(system, role)
    workers = num_working(system, role)
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(
            pool.map(lambda q: system.chat(q, max_tokens=12, ignore_eos=True), questions)
        )
    status, body = answers.pop(5)
    assert [status for status, _ in answers] == [200] * NUM_INNOCENTS
    assert status == 500 and "in a row ended while they worked on" in body["error"]["message"], body
    assert role in body["error"]["message"]
    # A member that hangs is killed later than its request fails.
    until(lambda: num_working(system, role) == workers, f"every {role} is back")
    assert num_restarts(system, role) - restarts <= MAX_DEATHS * num_processes
    system.await_idle()


def num_restarts(system: Running, role: str) -> int:
    restarts = system.logged(event="service exited, restarting it")
    return sum(entry["name"].startswith(role) for entry in restarts)


def num_working(system: Running, role: str) -> int:
    """Return how many members of the role are ready and make progress."""
    return sum(m.role == role and m.state == READY and not m.hung for m in system.members())


@pytest.mark.parametrize("name", POISONS)
def test_of_ten_innocents_next_to_a_poison_all_are_answered(system: Running, name: str) -> None:
    role, poison = POISONS[name]
    attack(system, role, poison())


def test_a_prompt_that_ends_another_rank_of_its_group_fails_alone() -> None:
    with Running("--tp", "2", module="tests.system.poisoned") as system:
        attack(system, "llm", text(LLM_MARKS["rank killed"]), num_processes=2)
