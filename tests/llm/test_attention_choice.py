"""The attention of a group: what the settings name, or what was measured to be fastest."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.config import BadSetting
from common.families import ModelSizes
from common.settings import ATTENTIONS, LlmSettings
from compute.attention_choice import Trial
from compute.device import Device
from services.llm.attention_backends import BACKENDS, choice
from services.llm.attention_backends.by_triton import ByTriton
from services.llm.attention_backends.by_varlen import ByVarlen
from services.llm.attention_backends.choice import ChosenAttention, choose_attention
from services.llm.attention_backends.protocol import PagedBackend, Shapes
from services.llm.attention_backends.trials import Room
from services.llm.parallel import Shard

CUDA = Device(torch.device("cuda"))
CPU = Device(torch.device("cpu"))
SIZES = ModelSizes(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
)
CHECKPOINT: Any = SimpleNamespace(sizes=SIZES, max_model_len=5000)
TIMES = {"triton": (10, 10, 10), "varlen": (20, 5, 9), "flashinfer": (30, 30, 30)}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[str, Shapes]:
    """The shapes with which each backend was tried. Their times are TIMES."""
    tried = {}

    def try_backend(
        kind: type[PagedBackend], shapes: Shapes, room: Room, device: torch.device
    ) -> Trial:
        assert room == Room(64, 5000)
        tried[kind.name] = shapes
        return Trial(kind.name, TIMES[kind.name])

    monkeypatch.setattr(choice, "try_backend", try_backend)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return tried


def chosen(device: Device = CUDA, shard: Shard = Shard(), **settings: Any) -> ChosenAttention:
    return choose_attention(LlmSettings(**settings), CHECKPOINT, device, torch.bfloat16, shard)


def test_every_backend_can_be_named() -> None:
    assert set(ATTENTIONS) == {"auto", "gather", *BACKENDS}


def test_the_fastest_is_chosen_with_the_size_of_its_blocks(tried: dict[str, Shapes]) -> None:
    """Batches count twice: 20 * 5 * 5 * 9 is less than 10 ** 4."""
    assert chosen() == ChosenAttention(ByVarlen, 256)
    assert {name: shapes.block_size for name, shapes in tried.items()} == {
        "triton": 128,
        "varlen": 256,
        "flashinfer": 64,
    }


def test_a_given_size_of_blocks_binds_every_backend(tried: dict[str, Shapes]) -> None:
    assert chosen(block_size=32).block_size == 32
    assert {shapes.block_size for shapes in tried.values()} == {32}


def test_a_rank_tries_the_shapes_of_its_own_heads(tried: dict[str, Shapes]) -> None:
    chosen(shard=Shard(rank=3, world_size=4))
    assert tried["triton"] == Shapes(2, 1, 16, torch.bfloat16, 128)


def test_ranks_choose_by_the_slowest_of_them(tried: dict[str, Shapes]) -> None:
    """On another rank varlen takes a millisecond."""
    shard = Shard(world_size=2, agree=lambda count: -(10**6) if count == -5 else count)
    assert chosen(shard=shard) == ChosenAttention(ByTriton, 128)


def test_without_any_backend_blocks_are_gathered(
    monkeypatch: pytest.MonkeyPatch, tried: dict[str, Shapes]
) -> None:
    monkeypatch.setattr(
        choice, "try_backend", lambda kind, *_: Trial(kind.name, objection="broken")
    )
    assert chosen() == ChosenAttention(None, 16)
    assert chosen(block_size=48) == ChosenAttention(None, 48)


def test_nothing_is_tried_where_nothing_is_to_be_chosen(tried: dict[str, Shapes]) -> None:
    assert chosen(CPU) == ChosenAttention(None, 16)
    assert chosen(CUDA, attention="gather") == ChosenAttention(None, 16)
    assert not tried


def test_a_named_backend_is_taken_without_measuring(
    monkeypatch: pytest.MonkeyPatch, tried: dict[str, Shapes]
) -> None:
    monkeypatch.setattr(choice, "objection_to", lambda *_: "")
    assert chosen(attention="triton") == ChosenAttention(ByTriton, 128)
    assert not tried


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_not_named_for_a_cpu(name: str) -> None:
    with pytest.raises(BadSetting, match=f"--attention {name} runs on CUDA, not on cpu"):
        chosen(CPU, attention=name)


def test_a_named_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it may be otherwise, it takes no blocks of this size."""
    with pytest.raises(BadSetting, match="--attention varlen: it takes blocks of a multiple"):
        chosen(attention="varlen", block_size=16)


def test_a_named_backend_that_another_rank_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "objection_to", lambda *_: "")
    with pytest.raises(BadSetting, match="--attention varlen: another rank"):
        chosen(shard=replace(Shard(world_size=2), agree=lambda count: 0), attention="varlen")
