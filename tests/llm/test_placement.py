"""The KV cache leaves room on a card for the weights and for others; blocks are of a size that the
device's attention takes."""

import pytest
import torch

from common.checkpoint import open_checkpoint
from common.sizing import TP_SIZES
from compute.torch_tensors import DTYPES
from services.llm.families.qwen2_5_vl import TextConfig
from services.llm.model_runner import ModelRunner
from services.llm.parallel import Shard
from services.llm.placement import (
    available_memory,
    default_block_size,
    make_runner,
    use_own_card,
    weight_bytes,
)
from tests.golden import CASES, GoldenCase

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_the_cache_of_a_card_leaves_room_for_weights_and_for_a_fifth_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert available_memory(CUDA, 1, 300) == 500
    assert available_memory(CUDA, 2, 300) == 500, "each rank has a card of its own"
    assert available_memory(CUDA, 1, 900) == 0


def test_ranks_share_the_memory_of_a_host() -> None:
    assert available_memory(CPU, 8, 0) < available_memory(CPU, 2, 0) / 2


def test_the_cache_takes_its_share_of_what_the_container_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.cgroup.container_memory", lambda root: [1000])
    assert available_memory(CPU, 2, 0) == 100


@pytest.mark.parametrize("name", CASES)
def test_weight_bytes_are_those_that_are_loaded(name: str) -> None:
    checkpoint = open_checkpoint(GoldenCase(name).checkpoint)
    stored = DTYPES[checkpoint.dtype]
    config = TextConfig.of(checkpoint)
    for world_size in filter(config.is_divisible, TP_SIZES):
        runner = ModelRunner(
            checkpoint, stored, CPU, 1, 16, shard=Shard(world_size - 1, world_size)
        )
        assert weight_bytes(checkpoint, stored, world_size) == runner.num_bytes_read
        assert (
            weight_bytes(checkpoint, torch.bfloat16, world_size)
            == runner.num_bytes_read // stored.itemsize * 2
        )


def test_blocks_are_large_only_where_the_attention_needs_it() -> None:
    assert (
        default_block_size(torch.bfloat16, CUDA) == default_block_size(torch.float16, CUDA) == 256
    )
    assert default_block_size(torch.float32, CUDA) == default_block_size(torch.bfloat16, CPU) == 16


def test_ranks_take_the_cards_of_a_host_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in range(3):
        use_own_card(CUDA, rank)
        use_own_card(CPU, rank)
    assert taken == [0, 1, 0]


def test_the_cpu_has_the_plain_runner() -> None:
    checkpoint = open_checkpoint(GoldenCase("d_text").checkpoint)
    runner = make_runner(checkpoint, torch.float32, CPU, 4, 16, lambda fraction: None, Shard(), 8)
    assert type(runner) is ModelRunner
