"""The routing policy in simulated time: near the ideal, and no dearer in a larger fleet."""

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from benchmarks.pool_loads import Arrival, Spec, arrivals, equal_fleet, ideal, mixed_fleet
from benchmarks.pool_simulation import simulate
from benchmarks.serving import ROOT
from common.messages import LlmLoad, Peer
from services.preprocess import vision_replicas
from services.preprocess.llm_groups import PREFIX_TOKENS, Group, LlmGroups
from services.preprocess.prepared import ExpandedPrompt
from tests.preprocess.test_vision_pool import Pool, serve

GROWTH = 1.25
"""How much more a fleet of 16 times the size may cost for each item."""


def test_the_benchmark_runs_and_is_near_the_ideal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pool", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["routing"]
    assert {(row["fleet"], row["preprocess"]) for row in rows} == {
        (fleet, count) for fleet in ("equal", "mixed") for count in (2, 10)
    }
    assert all(row["of_ideal_rate"] > 0.8 for row in rows if row["load"] > 1), done.stdout


def test_the_ideal_queue_takes_the_oldest_item_that_fits() -> None:
    fleet = [Spec(), Spec(buckets=(1024,))]
    large = Spec().seconds(4096)
    items = [Arrival(0.0, 0, 4096, 0), Arrival(0.0, 0, 4096, 1), Arrival(0.0, 0, 256, 2)]
    finished = ideal(fleet, items)
    assert finished.waits == [0.0, 0.0, large], "the small one passes, the second large one waits"
    assert finished.begins == [0.0, 0.0, large]


def test_a_simulation_repeats_itself() -> None:
    fleet = mixed_fleet(10)
    items = arrivals(fleet, 10, 0.9, 150, seed=3)
    first, second = (simulate(fleet, 10, items) for _ in range(2))
    assert first[0] == second[0] and first[1].messages == second[1].messages


def test_the_messages_for_an_item_do_not_grow_with_the_preprocesses() -> None:
    fleet = equal_fleet(24)
    items = arrivals(fleet, 96, 0.7, 400, seed=0)
    few = [Arrival(one.time, one.preprocess % 12, one.num_patches, one.content) for one in items]
    many = sum(simulate(fleet, 96, items)[1].messages.values())
    assert many <= GROWTH * sum(simulate(fleet, 12, few)[1].messages.values())


def calls_for_choices(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how often times are looked up while this number of replicas serves 400 items."""
    calls = Counter[str]()

    def expected(*arguments: Any) -> float:
        calls["expected"] += 1
        return found(*arguments)

    found = vision_replicas.expected_seconds
    pool = Pool(**{f"v{n}": 0.1 for n in range(count)})
    for n in range(0, count, 3):
        pool.update_replica(f"v{n}", False, 0.15)
    with monkeypatch.context() as patched:
        patched.setattr(vision_replicas, "expected_seconds", expected)
        for content in range(400):
            pool.put(content)
            for vision_id, _ in pool.offers():
                pool.on_answer(vision_id, False, 0.1)
            pool.clock.now += 0.1 / count
            pool.update_replica(f"v{content % count}", True, 0.0)
    return calls["expected"]


def test_the_replicas_that_a_choice_looks_at_do_not_grow_with_the_fleet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = calls_for_choices(64, monkeypatch)
    assert calls_for_choices(1024, monkeypatch) <= GROWTH * small


def test_many_replicas_all_get_work() -> None:
    pool = Pool(**{f"v{n}": 0.1 for n in range(200)})
    pool.put(*range(2000))
    done = serve(pool, 2000)
    assert len(done) == 200 and max(done.values()) <= 12 and min(done.values()) >= 8


def looked_at(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many groups 200 choices look at. All groups know the beginning of the prompts."""
    calls = Counter[str]()
    match = Group.match
    is_full = Group.is_full_for

    def counted_match(group: Group, steps: list[bytes]) -> int:
        calls["match"] += 1
        return match(group, steps)

    def counted_is_full(group: Group, num_tokens: int) -> bool:
        calls["is_full"] += 1
        return is_full(group, num_tokens)

    groups = LlmGroups()
    for n in range(count):
        groups.add(Peer(f"llm-{n}", "ipc:///x"))
        groups.update_load(f"llm-{n}", LlmLoad(running=0, waiting=0, free_tokens=10**6))
        groups.choose(prompt(0), [])
    with monkeypatch.context() as patched:
        patched.setattr(Group, "match", counted_match)
        patched.setattr(Group, "is_full_for", counted_is_full)
        for tail in range(200):
            groups.choose(prompt(1 + tail % 50), [])
    return calls.total()


def prompt(tail: int) -> ExpandedPrompt:
    """Return a prompt of four steps, of which the first three are always the same."""
    ids = np.arange(4 * PREFIX_TOKENS)
    ids[-PREFIX_TOKENS:] += tail
    return ExpandedPrompt(ids, np.zeros((1, len(ids)), np.int64), 0, np.zeros((0, 2), np.int64))


def test_the_groups_that_a_choice_looks_at_do_not_grow_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert looked_at(1024, monkeypatch) <= GROWTH * looked_at(64, monkeypatch)


def test_old_entries_of_a_heap_are_dropped() -> None:
    pool = Pool(a=0.1)
    for n in range(10_000):
        pool.update_replica("a", n % 2 == 0, 0.1)
    [alike] = pool._replicas._kinds.values()
    assert len(alike.open._heap) + len(alike.full._heap) < 200
