"""The ranks' collectives: every rank gets the sum, or the whole, of what all brought."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.llm import parallel
from services.llm.parallel import Shard, SharedMemory, join_group, names_of_ranks

MAX_ELEMENTS = 64


def run_ranks(
    tmp_path: Path, world_size: int, work: Callable[[int, SharedMemory], list[torch.Tensor]]
) -> list[list[torch.Tensor]]:
    """What `work` gives on each rank; the ranks are threads."""
    path = tmp_path / "memory"
    path.touch()
    results: list[list[torch.Tensor]] = [[] for _ in range(world_size)]

    def run(rank: int) -> None:
        results[rank] = work(rank, SharedMemory(path, rank, world_size, MAX_ELEMENTS))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_sums_of_many_reductions(tmp_path: Path, world_size: int) -> None:
    parts = [
        [torch.full((n % 5 + 1, 3), float(10 * n + rank)) for n in range(50)]
        for rank in range(world_size)
    ]
    results = run_ranks(
        tmp_path, world_size, lambda rank, memory: [memory.all_reduce(part) for part in parts[rank]]
    )
    expected = [sum(parts[rank][n] for rank in range(world_size)) for n in range(50)]
    for found in results:
        assert len(found) == 50
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gathered_parts_stand_in_the_order_of_ranks(tmp_path: Path) -> None:
    results = run_ranks(
        tmp_path, 2, lambda rank, memory: [memory.all_gather(torch.full((2, 3), float(rank)))]
    )
    for (found,) in results:
        assert found.tolist() == [[0, 0, 0, 1, 1, 1]] * 2


def test_bfloat16_is_summed_in_float32(tmp_path: Path) -> None:
    part = torch.tensor([1.0, 2**-8], dtype=torch.bfloat16)
    results = run_ranks(
        tmp_path, 2, lambda rank, memory: [memory.all_reduce(part[rank : rank + 1])]
    )
    assert results[0][0].dtype == torch.bfloat16
    assert results[0][0].item() == torch.tensor(1 + 2**-8).to(torch.bfloat16).item()


def test_an_empty_part_is_no_obstacle(tmp_path: Path) -> None:
    results = run_ranks(
        tmp_path,
        2,
        lambda rank, memory: [
            memory.all_reduce(torch.zeros(0, 3)),
            memory.all_gather(torch.zeros(0, 3)),
        ],
    )
    assert [tuple(t.shape) for t in results[0]] == [(0, 3), (0, 6)]


def test_ranks_learn_each_others_names_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["llm-ä.0", "llm.1" * 40, ""]
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(parallel, "all_gather", lambda part: parts.append(part) or part)
    shards = [Shard(rank, 3) for rank in range(3)]
    for name, shard in zip(names, shards, strict=True):
        assert names_of_ranks(name, shard, torch.device("cpu")) == [name]
    monkeypatch.setattr(parallel, "all_gather", lambda part: torch.cat(parts, -1))
    assert names_of_ranks(names[0], shards[0], torch.device("cpu")) == names


def test_one_rank_needs_nobody() -> None:
    alone = join_group(0, 1, "", torch.device("cpu"), MAX_ELEMENTS)
    assert alone.world_size == 1 and alone.agree(7) == 7
    part = torch.ones(3)
    assert alone.all_reduce(part) is part and alone.all_gather(part) is part


def test_ranks_share_a_key_head_where_there_are_fewer_heads_than_ranks() -> None:
    assert [Shard(rank, 8).split_kv_heads(2) for rank in range(8)] == [(0, 1)] * 4 + [(1, 2)] * 4
    assert [Shard(rank, 2).split_kv_heads(4) for rank in range(2)] == [(0, 2), (2, 4)]
