"""Adapters come and go while a group serves: on all ranks or on none."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import open_checkpoint
from common.config import BadSetting
from common.events import Received
from common.messages import (
    AdapterChanged,
    AdapterPrepared,
    DropAdapter,
    LoadAdapter,
    PrepareAdapter,
    UnloadAdapter,
    UseAdapter,
)
from common.settings import LlmSettings
from services.llm.lora_loading import GroupAdapters, RankAdapters
from services.llm.lora_registry import LoraRegistry, Resident
from services.llm.parallel import Shard
from services.llm.ranks import follow
from tests.fakes import FakeLinks
from tests.golden import GoldenCase
from tests.llm.test_ranks import LIMITS, ScriptedMember
from tests.lora import write_adapter

CHECKPOINT = open_checkpoint(GoldenCase("d_text").checkpoint)


class Runner:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.adapters: set[int] = set()
        self.error: Exception | None = None

    def prepare_adapter(self, files: Any) -> Any:
        if self.error:
            raise self.error
        return files.identity

    def use_adapter(self, adapter: int, layers: Any) -> None:
        self.adapters.add(adapter)

    def drop_adapter(self, adapter: int) -> None:
        self.adapters.discard(adapter)


class Rank:
    """A rank 0 whose thread posts what it has read."""

    def __init__(self, root: Path, ranks: Sequence[str] = (), max_loras: int = 2) -> None:
        settings = LlmSettings(lora_root=str(root), max_loras=max_loras)
        self.links = FakeLinks()
        self.runner = Runner()
        self.posted = threading.Event()
        self.own = RankAdapters(self.runner, CHECKPOINT, settings)
        self.registry = LoraRegistry(max_loras=max_loras)
        self.group = GroupAdapters(
            self.registry,
            self.own,
            settings,
            self,  # type: ignore[arg-type]
            frozenset(ranks),
        )

    def post(self, event: Any) -> None:
        self.event: AdapterPrepared = event
        self.posted.set()

    def load(self, name: str, path: str, replace: bool = False) -> AdapterChanged | None:
        """Load an adapter as far as rank 0 can, and return its answer if there is one."""
        self.links.take()
        self.posted.clear()
        self.group.load("gateway", LoadAdapter(task="t", name=name, path=path, replace=replace))
        if not self.links.of(AdapterChanged):
            assert self.posted.wait(60)
            self.group.on_prepared("", self.event)
        return next(iter(self.links.of(AdapterChanged)), None)

    def unload(self, name: str) -> str:
        self.links.take()
        self.group.unload("gateway", UnloadAdapter(task="u", name=name))
        return self.links.of(AdapterChanged)[0].code


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("first", "second")):
        write_adapter(tmp_path / "root" / name, CHECKPOINT.path, ("q_proj",), seed=number)
    return tmp_path / "root"


def test_a_loaded_adapter_is_named_used_and_replaced(root: Path) -> None:
    rank = Rank(root)
    assert rank.load("a", "first") == AdapterChanged(task="t")
    assert rank.group.changed and rank.runner.adapters == {1}
    answer = rank.load("a", "second")
    assert answer and answer.code == "InvalidRequest" and "is loaded already" in answer.reason
    first = rank.registry.find("a")
    assert first and rank.load("a", "second", replace=True) == AdapterChanged(task="t")
    second = rank.registry.find("a")
    assert second and second.identity != first.identity
    rank.group.drop_unused([first])
    assert rank.runner.adapters == {1, 2}, "a request still uses the old one"
    rank.group.drop_unused([second])
    assert rank.runner.adapters == {2}


def test_an_unloaded_adapter_is_kept_until_its_last_request_ends(root: Path) -> None:
    rank = Rank(root)
    rank.load("a", "first")
    resident = rank.registry.find("a")
    assert (rank.unload("a"), rank.unload("a")) == ("", "NotFound")
    assert rank.registry.find("a") is None
    rank.group.drop_unused([resident, None])
    assert rank.runner.adapters == {1}
    rank.group.drop_unused([None])
    assert rank.runner.adapters == set()


def test_all_ranks_use_an_adapter_once_the_last_one_has_read_it(root: Path) -> None:
    rank = Rank(root, ranks=("r1", "r2"))
    assert rank.load("a", "first") is None
    assert rank.links.of(PrepareAdapter) == 2 * [PrepareAdapter(adapter=1, path="first")]
    identity = rank.event.identity
    rank.group.on_prepared("r1", AdapterPrepared(adapter=1, identity=identity))
    assert not rank.links.of(UseAdapter) and rank.registry.find("a") is None
    rank.group.on_prepared("r2", AdapterPrepared(adapter=1, identity=identity))
    assert rank.links.of(UseAdapter) == 2 * [UseAdapter(adapter=1)]
    assert rank.registry.find("a") and rank.links.of(AdapterChanged)[0].code == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (AdapterPrepared(adapter=1, error="no such directory"), "no such directory"),
        (AdapterPrepared(adapter=1, identity=b"other"), "different files"),
    ],
)
def test_if_one_rank_cannot_no_rank_uses_it(
    root: Path, answer: AdapterPrepared, reason: str
) -> None:
    rank = Rank(root, ranks=("r1",))
    rank.load("a", "first")
    rank.group.on_prepared("r1", answer)
    assert rank.links.of(DropAdapter) and not rank.links.of(UseAdapter)
    assert not rank.registry.names and not rank.runner.adapters and not rank.own._prepared
    assert reason in rank.links.of(AdapterChanged)[0].reason


def test_an_answer_of_a_stranger_counts_for_nothing(root: Path) -> None:
    rank = Rank(root, ranks=("r1",))
    rank.load("a", "first")
    rank.group.on_prepared("stranger", AdapterPrepared(adapter=1, identity=rank.event.identity))
    rank.group.on_prepared("r1", AdapterPrepared(adapter=7))
    assert not rank.registry.names


def test_no_more_adapters_are_loaded_than_the_setting_allows(root: Path) -> None:
    rank = Rank(root, max_loras=1)
    rank.load("a", "first")
    answer = rank.load("b", "second")
    assert answer and "--max-loras" in answer.reason
    used = rank.registry.find("a")
    rank.unload("a")
    answer = rank.load("b", "second")
    assert answer and answer.code == "Exhausted", "the unloaded one still takes memory"
    rank.group.drop_unused([])
    assert rank.load("b", "second") == AdapterChanged(task="t") and used


@pytest.mark.parametrize("path", ["..", "/", "../other", "first/../../other", "link", "linked"])
def test_nothing_outside_of_the_root_is_read(root: Path, path: str) -> None:
    outside = write_adapter(root.parent / "other", CHECKPOINT.path, ("q_proj",))
    (root / "link").symlink_to(outside)
    linked = write_adapter(root / "linked", CHECKPOINT.path, ("q_proj",))
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    rank = Rank(root)
    answer = rank.load("a", path)
    assert answer and "not within --lora-root" in answer.reason


def test_without_a_root_nothing_is_loaded_at_run_time(root: Path) -> None:
    rank = Rank(root)
    rank.group._can_load = False
    answer = rank.load("a", "first")
    assert answer and "--lora-root" in answer.reason
    assert rank.unload("a") == "InvalidRequest"


def test_a_bug_while_reading_is_an_answer_too(root: Path) -> None:
    rank = Rank(root)
    rank.runner.error = RuntimeError("out of memory")
    answer = rank.load("a", "first")
    assert answer and "RuntimeError" in answer.reason


def test_another_rank_prepares_uses_and_drops(root: Path) -> None:
    runner = Runner()
    own = RankAdapters(runner, CHECKPOINT, LlmSettings(lora_root=str(root)))
    prepare = PrepareAdapter(adapter=3, path="first")
    answered = threading.Event()
    member = ScriptedMember([Received("llm.0", "llm", prepare)])
    member.links.send = lambda peer_id, message: answered.set()  # type: ignore[method-assign]
    follow(member, "llm.0", LIMITS, lambda plan, parts: None, own)  # type: ignore[arg-type]
    assert answered.wait(60) and not runner.adapters
    for message, expected in ((UseAdapter(adapter=3), {3}), (DropAdapter(adapter=3), set())):
        member.waiting.append(Received("llm.0", "llm", message))
        follow(member, "llm.0", LIMITS, lambda plan, parts: None, own)  # type: ignore[arg-type]
        assert runner.adapters == expected


def test_ranks_that_start_with_different_files_refuse(root: Path) -> None:
    own = RankAdapters(Runner(), CHECKPOINT, LlmSettings())
    other = Shard(0, 2, agree=lambda count: max(0, count - 1))
    assert own.load_given({"a": str(root / "first")}, Shard())
    with pytest.raises(BadSetting, match="the ranks have different files"):
        own.load_given({"a": str(root / "first")}, other)


def test_numbers_are_never_given_again() -> None:
    registry = LoraRegistry([Resident(1, "a", "/a", b"x"), Resident(2, "b", "/b", b"y")])
    registry.retire("b")
    assert registry.next_number() == 3
