"""The ways in which a tower may attend compute the same, and the fastest is chosen."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import open_checkpoint
from compute import triton_kernels
from compute.attention_choice import Trial
from services.vision import attention_choice
from services.vision.attention import (
    AttendToGroups,
    TowerAttention,
    by_torch,
    by_triton,
    by_varlen,
)
from services.vision.attention_choice import AttendingTower, AttentionShapes, choose_attention
from services.vision.eager_tower import EagerTower
from services.vision.families import load
from tests.golden import GoldenCase, max_difference
from tests.llm.cuda_on_cpu import CPU, ReplayedPool
from tests.vision.test_qwen2_5_vl import embed, tower_of

needs_triton = pytest.mark.skipif(
    not triton_kernels.is_installed(), reason="Triton is not installed"
)
GROUPS = ((2, 5), (1, 3), (1, 1))


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, same: Tensor, longest: int, most: int
) -> Tensor:
    """torch's varlen_attn without a table, written out; torch 2.11 has it."""
    assert starts.dtype == torch.int32 and starts.equal(same)
    assert starts[0] == 0 and starts[-1] == len(query)
    assert longest == most == starts.diff().max()
    lens = starts.diff().tolist()
    parts = zip(query.split(lens), key.split(lens), value.split(lens), strict=True)
    return torch.cat(
        [by_torch(torch.cat(part, 1), query.shape[1], ((1, len(part[0])),), None) for part in parts]
    ).view(query.shape)


@pytest.fixture(autouse=True)
def _varlen_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)


@pytest.mark.parametrize("attend", [pytest.param(by_triton, marks=needs_triton), by_varlen])
def test_each_way_attends_inside_of_groups_alone(attend: AttendToGroups) -> None:
    qkv = torch.randn(14, 6, 16, generator=torch.Generator().manual_seed(0))
    starts = TowerAttention(full=attend).starts_of(GROUPS, CPU)
    assert starts is not None and starts.tolist() == [0, 5, 10, 13, 14]
    found = attend(qkv, 2, GROUPS, starts)
    assert max_difference(found.numpy(), by_torch(qkv, 2, GROUPS, None).numpy()) < 1e-5


def test_a_tower_that_attends_by_torch_makes_no_starts() -> None:
    assert TowerAttention().starts_of(GROUPS, CPU) is None


@pytest.mark.parametrize("name", ["a_image", "e_video"])
@pytest.mark.parametrize("attend", [pytest.param(by_triton, marks=needs_triton), by_varlen])
def test_embeddings_equal_the_reference(name: str, attend: AttendToGroups) -> None:
    case = GoldenCase(name)
    tower = tower_of(case)
    tower.attention = TowerAttention(attend, attend)
    assert max_difference(embed(EagerTower(tower), case), case.embeddings) < 1e-4


@pytest.mark.parametrize(
    ("family", "name", "kinds"),
    [
        ("qwen2_5_vl", "a_image", ["windowed", "full"]),
        ("qwen_vl", "a_chat_image", ["full"]),
        ("wemm", "a_image", ["full"]),
    ],
)
def test_the_fastest_way_is_chosen_for_each_kind(
    family: str, name: str, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = GoldenCase(name, family)
    tower = load(open_checkpoint(case.checkpoint), torch.float32, CPU)
    assert isinstance(tower, AttendingTower)
    tried = []
    times = {"torch": (30, 30), "triton": (20, 20), "varlen": (10, 30)}

    def try_way(name: str, kind: str, shapes: AttentionShapes, tower: AttendingTower) -> Trial:
        tried.append(kind)
        if kind == "windowed" and name == "varlen":
            return Trial(name, objection="broken")
        return Trial(name, times[name])

    monkeypatch.setattr(attention_choice, "try_way", try_way)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    choose_attention(tower)
    assert list(dict.fromkeys(tried)) == kinds
    assert tower.attention.full is by_varlen
    assert tower.attention.windowed is (by_triton if "windowed" in kinds else by_torch)


SHAPES = AttentionShapes(2, 16, {"full": (((1, 6),), ((2, 3), (1, 2)))})


def tried(name: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Trial:
    monkeypatch.setattr(attention_choice, "GraphPool", ReplayedPool)
    tower: Any = SimpleNamespace(dtype=dtype, device=CPU)
    return attention_choice.try_way(name, "full", SHAPES, tower)


def test_a_way_is_timed_at_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tried("torch", monkeypatch)
    assert len(trial.nanoseconds) == 2 and not trial.objection


def test_a_way_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_choice.WAYS, "torch", lambda qkv, *_: qkv[:, :2].flatten(1))
    assert "its results are wrong by" in tried("torch", monkeypatch).objection


def test_a_way_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> Tensor:
        raise RuntimeError("no kernel for this card\nand more")

    monkeypatch.setitem(attention_choice.WAYS, "torch", fail)
    assert tried("torch", monkeypatch).objection == "RuntimeError: no kernel for this card"


def test_what_a_way_does_not_compute_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not torch.float32" in tried("varlen", monkeypatch).objection
    assert tried("varlen", monkeypatch, torch.float16).nanoseconds
    monkeypatch.setattr(triton_kernels, "objection", lambda: "no compiler")
    assert tried("triton", monkeypatch).objection == "no compiler"
